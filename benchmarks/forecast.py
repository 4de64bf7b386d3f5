"""Compare forecasts with the time that runs take: `python benchmarks/forecast.py [CASE]...`.

Every case is a whole run of the command line in a fresh process and folder; the table says what its
forecast was and what the clock said, start-up and end of the process included. Quiet, two cores
need about a quarter of an hour for all cases.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_run import TINY  # noqa: E402

CLASSES = 4
LINE = re.compile(r"forecast from timed steps: about (.+?) \(")
UNITS_S = {"s": 1, "min": 60, "h": 3600}
ONE_EPOCH = (
    "blocksearch.epochs=1",
    "netsearch.train.epochs=1",
    "retrain.train.epochs=1",
)
FEW_SHARED = (
    "netsearch.estimate=shared_weights",
    "netsearch.shared_weights.epochs=10",
    "netsearch.shared_weights.checked=4",
)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        config: Name of a file in `configs`.
        changes: Of its values.
        options: Of the command.
        pictures: How many of noise are made for it; 0: none.
    """

    config: str = "quickstart"
    changes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    pictures: int = 0


CASES = {
    "tiny, 2 workers": Case(changes=TINY, options=("--workers", "2")),
    "tiny, 1 worker": Case(changes=TINY, options=("--workers", "1")),
    "tiny, until blocks": Case(changes=TINY, options=("--until", "blocks")),
    "tiny, 8 searches": Case(changes=(*TINY, "blocksearch.seeds=[0, 1, 2, 3]")),
    "60 pictures, one epoch": Case("image_folder", ONE_EPOCH, pictures=60),
    "quickstart": Case(),
    "quickstart, 1 worker": Case(options=("--workers", "1")),
    "quickstart, until blocks": Case(options=("--until", "blocks")),
    "quickstart, shared weights": Case(changes=FEW_SHARED),
    "600 pictures": Case("image_folder", pictures=600),
}


def main(names: list[str]) -> None:
    """Run the cases, all where none is named, and print a line for each as it ends."""
    print("| case | forecast, s | clock, s | ratio |")
    print("|---|---:|---:|---:|")
    worst = 1.0
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            forecast_s, clock_s = run(CASES[name], Path(folder))
        ratio = forecast_s / clock_s
        worst = max(worst, ratio, 1 / ratio)
        print(f"| {name} | {forecast_s:.0f} | {clock_s:.0f} | {ratio:.2f} |", flush=True)
    print(f"worst ratio: {worst:.2f}; within a factor of two: {worst <= 2}")


def run(case: Case, folder: Path) -> tuple[float, float]:
    """Return what the forecast said of the whole run, and the clock."""
    command = [sys.executable, str(ROOT / "run_pipeline.py"), "run"]
    command += [str(ROOT / "configs" / f"{case.config}.yaml"), "--device", "cpu"]
    command += ["--out", str(folder / "run"), *case.options]
    changes = [*case.changes]
    if case.pictures:
        draw(folder / "pictures", case.pictures)
        changes.append(f"data.root={folder / 'pictures'}")
    command += [part for change in changes for part in ("--set", change)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    clock_s = time.monotonic() - began
    found = LINE.search(done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(done.stderr[-2000:])
    return seconds(found[1]), clock_s


def seconds(text: str) -> float:
    """Read what `evaluation.terminal.progress.duration` wrote."""
    words = iter(text.split())
    return float(sum(int(number) * UNITS_S[unit] for number, unit in pairs(words)))


def pairs(words: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield two words at a time."""
    return zip(words, words, strict=True)


def draw(root: Path, count: int) -> None:
    """Write pictures of noise, 32x32, into a folder per class."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = root / f"class-{number % CLASSES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


if __name__ == "__main__":
    main(sys.argv[1:])
