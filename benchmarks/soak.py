"""Kill a small run at random moments until it is done, again and again, and compare the ends.

python benchmarks/soak.py --kills 200 --json

A run of the digits is started, and killed at random moments with SIGKILL, SIGTERM or SIGINT, the
parent or one of its workers; the same command goes on, until a run ends. Then its archives, blocks,
front, retrained weights and results are compared with those of a run that nobody killed. Runs
follow one another until there were enough kills. Reported are

- kills, and how many hit which stage, which process, by which signal;
- identical: runs whose every compared file is equal, to the byte or as a set of records;
- lost_lines: lines of an archive that a kill left and the end lacks;
- slow_exits: times that SIGTERM or SIGINT to the parent did not end it within ten seconds.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
TINY = (
    "data.max_train_images=300",
    "data.max_test_images=60",
    "blocksearch.ops=[none, skip_connect, max_pool_3x3, ghost_3x3]",
    "blocksearch.nodes=2",
    "blocksearch.channels=4",
    "blocksearch.cells=2",
    "blocksearch.epochs=6",
    "netsearch.depths=[1, 2]",
    "netsearch.widths=[4, 8, 12]",
    "netsearch.population=4",
    "netsearch.evaluations=12",
    "netsearch.train.epochs=3",
    "retrain.members=3",
    "retrain.baselines=1",
    "retrain.seeds=[0, 1]",
    "retrain.train.epochs=6",
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STAGES = (("blocks.json", "blocks"), ("pareto.json", "networks"), ("measured.json", "retrain"))
LONGEST_WAIT_S = 4.0  # until a kill, counted from the first sign of work
PATIENCE_S = 10.0  # for a clean end
EARLY = 0.1  # share of starts that are killed from their first moment on
OF_PARENT = 0.7  # share of kills that hit the parent
SAME_BYTES = ("blocks.json", "pareto.json", "retrained/*/*.json", "retrained/*/weights.*")
SAME_BYTES += ("baselines/*/*/*.json", "baselines/*/*/weights.*")
ARCHIVES = ("archive.jsonl", "random.jsonl")


@dataclass
class Report:
    """What was counted."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    lost_lines: int = 0
    slow_exits: int = 0
    by: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        return vars(self) | {"by": dict(sorted(self.by.items()))}


def command(folder: Path) -> list[str]:
    """Return the command of the run."""
    sets = [part for change in TINY for part in ("--set", change)]
    run = [sys.executable, str(ROOT / "run_pipeline.py"), "run", "--out", str(folder)]
    return [*run, "--device", "cpu", "--workers", "2", *sets]


def workers_of(parent: int) -> list[int]:
    """Return the processes that work for a parent: its children that are workers of joblib."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            line = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == parent and b"popen_loky" in line:
            found.append(int(stat.parent.name))
    return found


def contents(folder: Path) -> dict[str, object]:
    """Return what must be equal: bytes of files, records of archives as sets."""
    same: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in SAME_BYTES
        for path in folder.glob(pattern)
    }
    return same | {name: lines(folder, name) for name in ARCHIVES}


def lines(folder: Path, name: str) -> frozenset[str]:
    """Return the whole lines of an archive."""
    path = folder / name
    text = path.read_text() if path.exists() else ""
    return frozenset(text[: text.rfind("\n") + 1].splitlines())


def stage_of(folder: Path) -> str:
    """Name the stage that a run is in."""
    return next((stage for file, stage in STAGES if not (folder / file).exists()), "report")


def strike(run: subprocess.Popen[bytes], folder: Path, draw: random.Random, report: Report) -> None:
    """Kill the parent or a worker, and count it; a parent is waited for."""
    sign, workers = draw.choice(SIGNALS), workers_of(run.pid)
    hit_worker = bool(workers) and draw.random() > OF_PARENT
    try:
        if hit_worker:
            subprocess.run(["kill", f"-{int(sign)}", str(draw.choice(workers))], check=False)
        else:
            run.send_signal(sign)
            run.wait(timeout=None if sign == signal.SIGKILL else PATIENCE_S)
    except subprocess.TimeoutExpired:
        report.slow_exits += 1
        run.kill()
        run.wait()
    report.kills += 1
    for key in (stage_of(folder), "worker" if hit_worker else "parent", signal.Signals(sign).name):
        report.by[key] += 1


def broken_run(folder: Path, draw: random.Random, report: Report) -> frozenset[str]:
    """Kill a run again and again until it ends; return the archive lines seen at the kills."""
    seen: set[str] = set()
    run = None
    while True:
        if run is None or run.poll() is not None:
            if run is not None and run.returncode == 0:
                return frozenset(seen)
            run = subprocess.Popen(command(folder), stderr=subprocess.DEVNULL)
            began_ns, early = time.time_ns(), draw.random() < EARLY
            while not early and run.poll() is None and not works(folder, began_ns):
                time.sleep(0.05)
        try:
            run.wait(timeout=draw.uniform(0, LONGEST_WAIT_S))
        except subprocess.TimeoutExpired:
            strike(run, folder, draw, report)
            seen.update(*(lines(folder, name) for name in ARCHIVES))


def works(folder: Path, since_ns: int) -> bool:
    """Tell whether a file of a run was written since then, so that it got on."""
    files = [path for path in folder.rglob("[!.]*") if path.is_file()]
    try:
        return any(path.stat().st_mtime_ns > since_ns for path in files)
    except FileNotFoundError:
        return True  # it has just removed one


def main(
    kills: Annotated[int, typer.Option(min=1, help="At least so many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments, signals and victims.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the report; exit with 1 unless every run ended as the unbroken one."""
    draw, report = random.Random(seed), Report()
    with tempfile.TemporaryDirectory() as name:
        unbroken = Path(name, "unbroken")
        subprocess.run(command(unbroken), stderr=subprocess.DEVNULL, check=True)
        expected = contents(unbroken)
        while report.kills < kills:
            folder = Path(name, f"run-{report.runs}")
            seen = broken_run(folder, draw, report)
            found = contents(folder)
            report.runs += 1
            report.identical += found == expected
            report.lost_lines += len(seen - lines(folder, ARCHIVES[0]) - lines(folder, ARCHIVES[1]))
            differing = [k for k in {*found, *expected} if found.get(k) != expected.get(k)]
            print(f"run {report.runs}: {report.kills} kills; {differing}", file=sys.stderr)
    print(json.dumps(report.to_json()) if as_json else report)
    sys.exit(0 if report.identical == report.runs and not report.lost_lines else 1)


if __name__ == "__main__":
    typer.run(main)
