"""Kill a small run at random moments until it is done, again and again, and compare the ends.

python benchmarks/soak.py --kills 200 --json

A run of the digits is started, and killed at random moments with SIGKILL, SIGTERM or SIGINT, the
parent or one of its workers; the same command goes on, until a run ends. Then its archives, blocks,
front, retrained weights and results are compared with those of a run that nobody killed. Runs
follow one another until there were enough kills; the last is then left to end. Reported are

- kills, and how many hit which stage, which process, by which signal;
- identical: runs whose every compared file is equal, to the byte or as a set of records;
- lost_lines: lines of an archive that a kill left and the end lacks;
- slow_exits: times that SIGTERM or SIGINT to the parent did not end it within ten seconds;
- unclean: times that it ended otherwise than with its status and the line that says how to go on,
  of a run that had begun (while Python still imports torch, it has no handler);
- inside_an_epoch: kills that left a checkpoint from the middle of an epoch.

Checkpoints are due after every step, so that the kills meet them.
"""

import io
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

import torch
import typer

from evaluation.training.checkpoint import DIGEST_BYTES, FORMAT

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
    "workers.checkpoint_minutes=0",
)
ENDS = {  # exit status and first word of a clean end
    signal.SIGTERM: (143, "terminated"),
    signal.SIGINT: (130, "interrupted"),
}
SIGNALS = (signal.SIGKILL, *ENDS)
OF_WORKERS = (signal.SIGKILL, signal.SIGTERM)  # they leave SIGINT to their parent
STAGES = (("blocks.json", "blocks"), ("pareto.json", "networks"), ("measured.json", "retrain"))
LONGEST_WAIT_S = 4.0  # until a kill, counted from the first sign of work
LONGEST_REPORT_S = 40.0  # the same in the last stage, which begins anew each time
PATIENCE_S = 10.0  # for a clean end
UNHURT_S = 600.0  # within which a run that nobody kills ends
POLL_S = 0.05
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
    unclean: int = 0
    inside_an_epoch: int = 0
    by: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        """Whether nothing was lost and every end was clean."""
        wrong = self.lost_lines + self.slow_exits + self.unclean
        return self.identical == self.runs and not wrong

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


def inside_an_epoch(folder: Path) -> bool:
    """Tell whether a checkpoint that a kill left is from the middle of an epoch."""
    for path in folder.rglob("*.ckpt"):
        content = path.read_bytes()[len(FORMAT) + DIGEST_BYTES :]
        saved = torch.load(io.BytesIO(content), weights_only=True)
        if saved["states"]["position"]["step"] > 0:
            return True
    return False


class Run:
    """The pipeline in a process of its own, started anew after every kill."""

    def __init__(self, folder: Path):
        """Start or continue the run of a folder."""
        self.folder = folder
        self.said = tempfile.TemporaryFile("w+")
        self.began_ns = time.time_ns()
        self.process = subprocess.Popen(command(folder), stderr=self.said)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def works(self) -> bool:
        """Whether it has written a file."""
        try:
            files = [path for path in self.folder.rglob("[!.]*") if path.is_file()]
            return any(path.stat().st_mtime_ns > self.began_ns for path in files)
        except FileNotFoundError:
            return True  # it has just removed one

    @property
    def listens(self) -> bool:
        """Whether it has a handler for SIGTERM, as Linux tells."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line[:7] == "SigCgt:")
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    def wait(self, seconds: float) -> bool:
        """Wait for its end; return whether it came."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def strike(self, draw: random.Random, report: Report) -> None:
        """Kill it or one of its workers, and count that; wait for the end of the parent."""
        workers = workers_of(self.process.pid)
        hit_worker = bool(workers) and draw.random() > OF_PARENT
        sign = draw.choice(OF_WORKERS if hit_worker else SIGNALS)
        listened = self.listens
        report.kills += 1
        place = "worker" if hit_worker else "parent"
        for key in (stage_of(self.folder), f"{sign.name} to {place}"):
            report.by[key] += 1
        if hit_worker:
            subprocess.run(["kill", f"-{int(sign)}", str(draw.choice(workers))], check=False)
            return
        self.process.send_signal(sign)
        if not self.wait(PATIENCE_S):
            report.slow_exits += 1
            print(f"{sign.name} was slow in {stage_of(self.folder)}", file=sys.stderr)
            self.process.kill()
            self.process.wait()
        elif sign in ENDS and listened:
            report.unclean += not self.ended_cleanly(sign)
        report.inside_an_epoch += inside_an_epoch(self.folder)
        print(f"kills: {report.kills}", file=sys.stderr)

    def ended_cleanly(self, sign: signal.Signals) -> bool:
        """Tell whether it ended as after this signal, or had just reached its own end."""
        self.said.seek(0)
        said = self.said.read()
        status, word = ENDS[sign]
        line = f"{word}; the same command continues the run"
        clean = self.process.returncode == status and said.splitlines()[-1:] == [line]
        if not clean and self.process.returncode:
            print(said, file=sys.stderr)
        return clean or self.process.returncode == 0


def broken_run(folder: Path, draw: random.Random, report: Report, kills: int) -> frozenset[str]:
    """Kill a run again and again until it ends; return the archive lines seen at the kills.

    Once there were enough kills, it is left alone.
    """
    seen: set[str] = set()
    run = Run(folder)
    while True:
        early = draw.random() < EARLY
        while not early and run.alive and not run.works:
            time.sleep(POLL_S)
        longest_s = LONGEST_REPORT_S if stage_of(folder) == "report" else LONGEST_WAIT_S
        enough = report.kills >= kills
        if not run.wait(UNHURT_S if enough else draw.uniform(0, longest_s)):
            run.strike(draw, report)
            seen.update(*(lines(folder, name) for name in ARCHIVES))
        if not run.alive:
            if run.process.returncode == 0:
                return frozenset(seen)
            run = Run(folder)


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments, signals and victims.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the report; exit with 1 unless every run ended as the unbroken one."""
    # A shell has what it starts in the background ignore SIGINT, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw, report = random.Random(seed), Report()
    with tempfile.TemporaryDirectory() as name:
        unbroken = Path(name, "unbroken")
        subprocess.run(command(unbroken), stderr=subprocess.DEVNULL, check=True)
        expected = contents(unbroken)
        while report.kills < kills:
            folder = Path(name, f"run-{report.runs}")
            seen = broken_run(folder, draw, report, kills)
            found = contents(folder)
            report.runs += 1
            report.identical += found == expected
            report.lost_lines += len(seen - lines(folder, ARCHIVES[0]) - lines(folder, ARCHIVES[1]))
            differing = [k for k in {*found, *expected} if found.get(k) != expected.get(k)]
            print(f"run {report.runs}: {report.kills} kills; {differing}", file=sys.stderr)
    print(json.dumps(report.to_json()) if as_json else report)
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    typer.run(main)
