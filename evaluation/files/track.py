"""Scalars of a run for TensorBoard or MLflow, forwarded from its files while it goes on.

The run writes `metrics.jsonl` and its archives whether or not somebody tracks it; a thread of the
parent process follows these files, so that no worker knows of a tracker. The tags:

- `<stage>/<task>/<scalar>` by epoch, where the task has epochs: a block search, a retraining;
- `<stage>/<scalar>` by number, for the results of tasks without: networks as they are evaluated,
  those of random search among them;
- `archive/<scalar>` and `random/<scalar>` by the number of the network in that archive: its
  validation accuracy and its costs.
"""

import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evaluation.errors import InputError, not_installed
from evaluation.files.atomic import read_json, write_json
from evaluation.files.bounded import MOST_LOG_BYTES, check_file, parse_json

EVERY_S = 5.0  # between two looks at the files
METRICS = "metrics.jsonl"
ARCHIVES = ("archive", "random")
NOT_SCALARS = ("stage", "task", "time_s", "epoch")
EXPERIMENT = "paretoblocks"  # of MLflow, unless MLFLOW_EXPERIMENT_NAME is set
MLFLOW_METRICS, MLFLOW_PARAMS = 1000, 100  # the most that its server takes at a time
MLFLOW_VALUE = 500  # characters of a param; every version keeps so many
MLFLOW_SETTINGS = {  # each unless the user has set it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to --json
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default tries for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True)
class Point:
    """One value of a scalar; `time_s` is in seconds since 1970."""

    tag: str
    step: int
    value: float
    time_s: float


class Sink(Protocol):
    """Where points go. All methods are called in one thread; any may raise anything."""

    def start(self) -> None:
        """Open it; before this nothing is touched."""

    def last_step(self, tag: str) -> int:
        """Return the greatest step that an earlier run left there, -1 if none."""

    def write(self, points: Sequence[Point]) -> None:
        """Add points, and have them seen."""

    def close(self, failed: bool) -> None:
        """Close it; `failed` says whether the run ended with an exception."""


@contextmanager
def tracking(
    kinds: Sequence[str],
    folder: Path,
    *,
    name: str,
    params: Mapping[str, Any],
    say: Callable[[str], None],
    every_s: float = EVERY_S,
) -> Iterator[None]:
    """Forward the scalars of a run while the block runs, and the last ones at its end.

    A tracker that fails is given up with one warning; it never ends the block. What it has missed
    it is given when the run is called again.

    Args:
        kinds: Names in `SINKS`; none does nothing.
        folder: Of the run, which it has claimed: trackers put files of their own there.
        name: What the run is called.
        params: The config as plain data, tables in tables.
        say: Called with a warning, from a thread.
        every_s: Seconds between two looks at the files of the run.

    Raises:
        InputError: If a name is unknown, or the packages of the extra `track` are not there.
    """
    for kind in kinds:
        if kind not in SINKS:
            raise InputError(f"--track: expected {' or '.join(SINKS)}, got {kind!r}")
    sinks = {kind: SINKS[kind](folder, name, params) for kind in kinds}
    stop, failed = threading.Event(), threading.Event()
    threads = [
        threading.Thread(
            target=_forward, args=(kind, sink, folder, say, every_s, stop, failed), daemon=True
        )
        for kind, sink in sinks.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException:
        failed.set()
        raise
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _forward(
    kind: str,
    sink: Sink,
    folder: Path,
    say: Callable[[str], None],
    every_s: float,
    stop: threading.Event,
    failed: threading.Event,
) -> None:
    """Forward points until told to stop, then what is left."""
    reader, last = Reader(folder), dict[str, int]()
    try:
        sink.start()
        over = False
        while not over:
            over = stop.wait(every_s)
            points = []
            for point in reader.read():
                if point.tag not in last:
                    last[point.tag] = sink.last_step(point.tag)
                if point.step > last[point.tag]:  # a killed run may have logged an epoch twice
                    last[point.tag] = point.step
                    points.append(point)
            if points:
                sink.write(points)
        sink.close(failed.is_set())
    except Exception as error:  # whatever a server or a disk may do: the search goes on
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        say(f"warning: --track {kind} has failed and is given up, the run goes on: {reason}")


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
            text = file.read(MOST_LOG_BYTES)
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                data = parse_json(line)
            except ValueError:
                continue
            if isinstance(data, dict):
                yield data


class TensorBoard:
    """Event files in `<run folder>/tensorboard`, written anew by every call of a run."""

    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]):
        """Check that the package is there; the event files hold neither name nor params."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed("track", "--track tensorboard") from error
        self._folder = folder / "tensorboard"
        self._open = SummaryWriter

    def start(self) -> None:
        """Delete the event files of earlier calls: the points of these come again."""
        for earlier in self._folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer = self._open(str(self._folder))

    def last_step(self, tag: str) -> int:
        """Return -1: the files begin empty."""
        return -1

    def write(self, points: Sequence[Point]) -> None:
        """Append to the event file."""
        for point in points:
            self._writer.add_scalar(point.tag, point.value, point.step, walltime=point.time_s)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """One run of MLflow for a run folder; `mlflow.json` there holds its id for later calls.

    The server is that of MLFLOW_TRACKING_URI, else files in `<run folder>/mlflow`. MLflow 3 wants
    MLFLOW_ALLOW_FILE_STORE for these, here and where its user interface is started; its databases
    need more than `mlflow-skinny`.
    """

    def __init__(self, folder: Path, name: str, params: Mapping[str, Any]):
        """Check that the package is there."""
        for setting, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(setting, value)
        try:
            from mlflow import entities, exceptions, tracking
        except ImportError as error:
            raise not_installed("track", "--track mlflow") from error
        self._entities, self._client_class = entities, tracking.MlflowClient
        self._error = exceptions.MlflowException
        self._folder, self._name, self._params = folder, name, params
        self._resumed = False

    def start(self) -> None:
        """Go on with the run of this folder, or begin one."""
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if not server:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = server or (self._folder / "mlflow").resolve().as_uri()
        self._client = self._client_class(tracking_uri=uri)
        known = self._folder / "mlflow.json"
        earlier = read_json(known) if known.exists() else {}
        if self._exists(earlier.get("run_id")):
            self._run_id, self._resumed = earlier["run_id"], True
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = self._begin()
        write_json(known, {"run_id": self._run_id})

    def _exists(self, run_id: Any) -> bool:
        try:
            return bool(self._client.get_run(str(run_id)))
        except self._error as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _begin(self) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        there = self._client.get_experiment_by_name(experiment)
        id = there.experiment_id if there else self._client.create_experiment(experiment)
        run_id = str(self._client.create_run(id, run_name=self._name).info.run_id)
        params = [
            self._entities.Param(key, value[:MLFLOW_VALUE]) for key, value in _flat(self._params)
        ]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MLFLOW_PARAMS])
        return run_id

    def last_step(self, tag: str) -> int:
        """Ask the server."""
        if not self._resumed:
            return -1
        history = self._client.get_metric_history(self._run_id, tag)
        return max((metric.step for metric in history), default=-1)

    def write(self, points: Sequence[Point]) -> None:
        """Send the points, many at a time."""
        metrics = [
            self._entities.Metric(p.tag, p.value, round(p.time_s * 1000), p.step) for p in points
        ]
        for first in range(0, len(metrics), MLFLOW_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + MLFLOW_METRICS])

    def close(self, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of tables in tables under names with dots, as text."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", str(value)


SINKS: dict[str, Callable[[Path, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}
