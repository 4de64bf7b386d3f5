"""Scalars of a run for TensorBoard, forwarded from its files while it goes on.

The run writes `metrics.jsonl` and its archives whether or not somebody tracks it; whoever counts
its progress has these files read, so that no worker knows of a tracker. The tags:

- `<stage>/<task>/<scalar>` by epoch, where the task has epochs: a block search, a retraining;
- `<stage>/<scalar>` by number, for the results of tasks without: networks as they are evaluated,
  those of random search among them;
- `archive/<scalar>` and `random/<scalar>` by the number of the network in that archive: its
  validation accuracy and its costs.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import not_installed, reason_of
from evaluation.files.bounded import MAX_LOG_BYTES, check_file, parse_json

FOLDER = "tensorboard"  # in that of a run
METRICS = "metrics.jsonl"
ARCHIVES = ("archive", "random")
NOT_SCALARS = ("stage", "task", "time_s", "epoch")


@dataclass(frozen=True)
class Point:
    """One value of a scalar; `time_s` is in seconds since 1970."""

    tag: str
    step: int
    value: float
    time_s: float


class TensorBoard:
    """Event files in `<run folder>/tensorboard`, written anew by every call of a run."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        """Begin, by deleting the event files of earlier calls: their points come again.

        Args:
            folder: Of the run, which it has claimed.
            say: Called with a warning.

        Raises:
            InputError: If the packages of the extra `track` are not there.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed("track", "--tensorboard") from error
        self._folder, self._open, self._say = folder / FOLDER, SummaryWriter, say
        self._reader, self._last = Reader(folder), dict[str, int]()
        self._writer: Any = None
        self._failed = False

    def forward(self) -> None:
        """Write what is new in the files of the run.

        If that fails, which a full disk may have it do, it is said once, and nothing more is
        written: the run goes on, and its next call writes all of it.
        """
        if self._failed:
            return
        try:
            self._write(self._reader.read())
        except Exception as error:
            self._failed = True
            self._say(f"warning: --tensorboard has failed, the run goes on: {reason_of(error)}")

    def _write(self, points: list[Point]) -> None:
        if self._writer is None:
            for earlier in self._folder.glob("events.out.tfevents.*"):
                earlier.unlink()
            self._writer = self._open(str(self._folder))
        for point in points:
            if point.step > self._last.get(point.tag, -1):  # a killed run may log an epoch twice
                self._last[point.tag] = point.step
                self._writer.add_scalar(point.tag, point.value, point.step, walltime=point.time_s)
        self._writer.flush()

    def close(self) -> None:
        """Write the last points and close the file."""
        self.forward()
        if self._writer is not None and not self._failed:
            self._writer.close()


class Reader:
    """Reads what is new in the files of a run, as points."""

    def __init__(self, folder: Path):
        """Begin at the start of the files, whether or not they exist."""
        self._metrics = _NewLines(folder / METRICS)
        self._archives = {name: _NewLines(folder / f"{name}.jsonl") for name in ARCHIVES}
        self._epochs: dict[str, int] = {}  # the last of each task
        self._counts: Counter[str] = Counter()  # how often each tag has come

    def read(self) -> list[Point]:
        """Return the points that have come since the last call; none is left out at the end."""
        points = [point for event in self._metrics.read() for point in self._of_event(event)]
        for name, lines in self._archives.items():
            for record in lines.read():
                points += self._of_record(name, record)
        return points

    def _of_event(self, event: dict[str, Any]) -> Iterator[Point]:
        stage, epoch = str(event.get("stage")), event.get("epoch")
        task = f"{stage}/{event.get('task')}"
        if isinstance(epoch, int):
            self._epochs[task] = epoch
        scalars = {name: value for name, value in event.items() if name not in NOT_SCALARS}
        time_s = event.get("time_s", 0.0)
        if task in self._epochs:
            for name, value in scalars.items():
                yield from _points(f"{task}/{name}", self._epochs[task], value, time_s)
        else:
            yield from self._numbered(stage, scalars, time_s)

    def _of_record(self, archive: str, record: dict[str, Any]) -> Iterator[Point]:
        cost = record.get("cost")
        scalars = {"valid_accuracy": record.get("valid_accuracy")}
        yield from self._numbered(
            archive, scalars | (cost if isinstance(cost, dict) else {}), time.time()
        )

    def _numbered(self, stage: str, scalars: Mapping[str, Any], time_s: float) -> Iterator[Point]:
        for name, value in scalars.items():
            tag = f"{stage}/{name}"
            self._counts[tag] += 1  # of a network that failed as well, so that numbers agree
            yield from _points(tag, self._counts[tag], value, time_s)


def _points(tag: str, step: int, value: Any, time_s: float) -> Iterator[Point]:
    """Yield the point if its value is a finite number; a tag has letters that all trackers take."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield Point(re.sub(r"[^\w./-]", "_", tag, flags=re.ASCII), step, float(value), time_s)


class _NewLines:
    """The lines of a growing JSON-lines file; a last one without its newline is not ready."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the objects on the whole lines since the last call, passing over broken ones."""
        if not self._path.exists():
            return
        check_file(self._path)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read(MAX_LOG_BYTES)
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                data = parse_json(line)
            except ValueError:
                continue
            if isinstance(data, dict):
                yield data
