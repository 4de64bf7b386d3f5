"""Check the front of a finished quickstart run: `python benchmarks/check_quickstart.py DIR`.

Fails unless it holds at least 5 models, none dominated, over a factor 10 in params, the best
retrained test accuracy is at least 0.97, and random search stands beside it.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MIN_MODELS, MIN_FACTOR, MIN_ACCURACY = 5, 10.0, 0.97


def main(folder: Path) -> None:
    """Print one line per fact, and exit with 1 if one does not hold."""
    command = [sys.executable, str(ROOT / "run_pipeline.py"), "front", str(folder), "--json"]
    front = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    points = [(1 - one["valid_accuracy"], one["params"]) for one in front]
    dominated = sum(any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points) for a in points)
    params = [one["params"] for one in front]
    best = max(one["test_accuracy"] or 0.0 for one in front)
    hypervolume = json.loads((folder / "pareto.json").read_text())["hypervolume"]
    facts = [
        (f"models on the front: {len(front)}", len(front) >= MIN_MODELS),
        (f"dominated among them: {dominated}", dominated == 0),
        (
            f"factor in params: {max(params) / min(params):.1f}",
            max(params) >= MIN_FACTOR * min(params),
        ),
        (f"best mean test accuracy: {best:.4f}", best >= MIN_ACCURACY),
        (f"hypervolume: {hypervolume}", {"surrogate search", "random search"} <= set(hypervolume)),
    ]
    for fact, holds in facts:
        print("ok  " if holds else "FAIL", fact)
    sys.exit(0 if all(holds for _, holds in facts) else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
