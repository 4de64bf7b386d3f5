"""Tracking: what the trackers hold afterwards equals the run's files, once each, come what may."""

import builtins
import json
import threading
import time
from pathlib import Path

import pytest

from evaluation.errors import InputError
from evaluation.files import track
from evaluation.files.archive import Archive
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.track import Point, Reader, tracking
from evaluation.records import Cost, ModelRecord

PARAMS = {"seed": 0, "data": {"name": "digits", "augment": {"flip": False}}, "costs": ["params"]}


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """A function that returns {tag: [(step, value)]} and the params of a folder's MLflow run."""
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in (*track.MLFLOW_SETTINGS, "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "1")  # setdefault of the code must not outlive the test
    from mlflow.tracking import MlflowClient

    def read(folder, store=None):
        client = MlflowClient(tracking_uri=(store or folder / "mlflow").resolve().as_uri())
        run = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
        history = {
            tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
            for tag in run.data.metrics
        }
        return history, run

    return read


def event_files(folder, times=False):
    """Return {tag: [(step, value)]} of all event files, or {tag: [seconds]}."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for path in (folder / "tensorboard").glob("*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found = [e.wall_time if times else (e.step, e.value) for e in events.Scalars(tag)]
            scalars.setdefault(tag, []).extend(found)
    return scalars


def log_search(folder, epochs, task="darts-w=0.5-s0"):
    for epoch in epochs:
        MetricsLog(folder / "metrics.jsonl", "blocks", task).write(
            epoch=epoch, loss=1.0 / epoch, note="text", flag=True
        )


def log_network(folder, id, valid_accuracy):
    MetricsLog(folder / "metrics.jsonl", "networks", id).write(
        valid_accuracy=valid_accuracy, seconds=0.5
    )
    failure = None if valid_accuracy else "diverged"
    record = ModelRecord(id, (1,), (), Cost(len(id), 7), 0, valid_accuracy, failure=failure)
    Archive(folder / "archive.jsonl").add(record)


def log_retraining(folder):
    log = MetricsLog(folder / "metrics.jsonl", "retrain", "abc/0")
    for epoch in (1, 2, 3):
        log.write(epoch=epoch, loss=float(epoch))
    log.write(test_accuracy=0.75, seconds=2.0)
    MetricsLog(folder / "metrics.jsonl", "retrain", "whole").write(wall_s=9.5)


# what the three functions above leave, after two epochs of search and networks a, bb (failed), ccc
SCALARS = {
    "blocks/darts-w_0.5-s0/loss": [(1, 1.0), (2, 0.5)],
    "networks/valid_accuracy": [(1, 0.5), (3, 0.25)],
    "networks/seconds": [(1, 0.5), (2, 0.5), (3, 0.5)],
    "retrain/abc/0/loss": [(1, 1.0), (2, 2.0), (3, 3.0)],
    "retrain/abc/0/test_accuracy": [(3, 0.75)],
    "retrain/abc/0/seconds": [(3, 2.0)],
    "retrain/wall_s": [(1, 9.5)],
    "archive/valid_accuracy": [(1, 0.5), (3, 0.25)],
    "archive/params": [(1, 1.0), (2, 2.0), (3, 3.0)],
    "archive/flops": [(1, 7.0), (2, 7.0), (3, 7.0)],
}


def log_all(folder):
    log_search(folder, (1, 2))
    for id, accuracy in (("a", 0.5), ("bb", None), ("ccc", 0.25)):
        log_network(folder, id, accuracy)
    log_retraining(folder)


def quietly(kinds, folder, **changes):
    """Track, and fail on a warning."""
    return tracking(
        kinds, folder, name="run", params=PARAMS, say=pytest.fail, **{"every_s": 0.01} | changes
    )


class Memory:
    """A sink that keeps what it is told, and raises where it is asked to."""

    def __init__(self, fails_at="", there=()):
        self.points, self.fails_at, self.there = [], fails_at, dict(there)
        self.closed, self.thread, self.wrote = None, None, threading.Event()

    def _maybe(self, place):
        if place == self.fails_at:
            raise OSError(f"no space left in {place}\nand more")

    def start(self):
        self.thread = threading.current_thread()
        self._maybe("start")

    def last_step(self, tag):
        return self.there.get(tag, -1)

    def write(self, points):
        self._maybe("write")
        self.points += points
        self.wrote.set()

    def close(self, failed):
        self._maybe("close")
        self.closed = failed

    @property
    def scalars(self):
        found = {}
        for point in self.points:
            found.setdefault(point.tag, []).append((point.step, point.value))
        return found


@pytest.fixture
def memory(monkeypatch):
    """A function that makes sinks of these names known and returns them."""

    def install(**sinks):
        for kind, sink in sinks.items():
            monkeypatch.setitem(track.SINKS, kind, lambda *arguments, sink=sink: sink)
        return sinks

    return install


def test_the_files_of_a_run_become_points_with_their_step_and_time(tmp_path):
    log_all(tmp_path)
    points = Reader(tmp_path).read()
    scalars = {}
    for point in points:
        scalars.setdefault(point.tag, []).append((point.step, point.value))
    assert scalars == SCALARS
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert points[0] == Point("blocks/darts-w_0.5-s0/loss", 1, 1.0, first["time_s"])


def test_values_that_are_no_finite_numbers_are_no_points(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": True, "d": None, "e": "1", "f": [1]}
    MetricsLog(tmp_path / "metrics.jsonl", "blocks", "t").write(epoch=1, g=2, **values)
    (point,) = Reader(tmp_path).read()
    assert (point.tag, point.step, point.value) == ("blocks/t/g", 1, 2.0)


def test_a_half_written_last_line_is_left_for_later_and_a_broken_one_passed_over(tmp_path):
    reader, path = Reader(tmp_path), tmp_path / "metrics.jsonl"
    assert reader.read() == []
    line = json.dumps({"stage": "s", "task": "t", "time_s": 1.0, "epoch": 1, "loss": 0.5})
    path.write_text(f'{line}\n{{"stage": \n[1]\n{line.replace("1,", "2,")[:-9]}')
    assert [(p.step, p.value) for p in reader.read()] == [(1, 0.5)]
    assert reader.read() == []
    with path.open("a") as file:
        file.write(f"{line.replace('1,', '2,')[-9:]}\n{line.replace('1,', '3,')}")
    assert [(p.step, p.value) for p in reader.read()] == [(2, 0.5)]
    with path.open("a") as file:
        file.write("\n")
    assert [(p.step, p.value) for p in reader.read()] == [(3, 0.5)]


def test_an_epoch_that_a_killed_run_logged_twice_is_one_point(tmp_path, memory):
    sink = memory(memory=Memory())["memory"]
    log_search(tmp_path, (1, 2, 3, 2, 3, 4))
    with quietly(["memory"], tmp_path):
        pass
    assert [step for step, _ in sink.scalars["blocks/darts-w_0.5-s0/loss"]] == [1, 2, 3, 4]


def test_points_come_while_the_block_runs_and_the_last_ones_at_its_end(tmp_path, memory):
    sink = memory(memory=Memory())["memory"]
    with quietly(["memory"], tmp_path):
        log_search(tmp_path, (1, 2))
        assert sink.wrote.wait(timeout=60)
        assert sink.closed is None and sink.thread.is_alive()
    assert sink.scalars == {"blocks/darts-w_0.5-s0/loss": SCALARS["blocks/darts-w_0.5-s0/loss"]}
    assert sink.closed is False and not sink.thread.is_alive()

    later = memory(memory=Memory())["memory"]
    with quietly(["memory"], tmp_path, every_s=3600):
        log_search(tmp_path, (3,))
    assert [step for step, _ in later.scalars["blocks/darts-w_0.5-s0/loss"]] == [1, 2, 3]


def test_a_sink_is_given_only_what_it_does_not_hold(tmp_path, memory):
    there = {"blocks/darts-w_0.5-s0/loss": 2, "networks/seconds": 3}
    sink = memory(memory=Memory(there=there))["memory"]
    log_all(tmp_path)
    log_search(tmp_path, (3,))
    with quietly(["memory"], tmp_path):
        pass
    assert sink.scalars["blocks/darts-w_0.5-s0/loss"] == [(3, 1 / 3)]
    assert "networks/seconds" not in sink.scalars
    assert sink.scalars["retrain/abc/0/loss"] == SCALARS["retrain/abc/0/loss"]


@pytest.mark.parametrize("place", ["start", "write", "close"])
def test_a_sink_that_raises_ends_nothing_and_warns_once(tmp_path, memory, place):
    sinks = memory(broken=Memory(fails_at=place), whole=Memory())
    said = []
    log_all(tmp_path)
    with tracking(
        ["broken", "whole"], tmp_path, name="run", params={}, say=said.append, every_s=0.01
    ):
        assert sinks["whole"].wrote.wait(timeout=60)
        log_search(tmp_path, (3, 4))
    assert sinks["whole"].closed is False  # the other goes on to the end
    assert sinks["whole"].scalars["blocks/darts-w_0.5-s0/loss"][-1] == (4, 0.25)
    (warning,) = said
    assert warning.startswith("warning: --track broken") and "\n" not in warning
    assert f"OSError: no space left in {place}" in warning
    assert not sinks["broken"].thread.is_alive()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block_also_on_an_exception(tmp_path, memory, error):
    sink = memory(memory=Memory())["memory"]
    with pytest.raises(error), quietly(["memory"], tmp_path, every_s=3600):
        log_search(tmp_path, (1,))
        raise error("in the run")
    assert not sink.thread.is_alive()
    assert sink.closed is True and len(sink.points) == 1


def test_nothing_to_track_starts_no_thread_and_touches_nothing(tmp_path):
    before = threading.active_count()
    with quietly([], tmp_path):
        assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_naming_those_there_are(tmp_path):
    with (
        pytest.raises(InputError, match="expected tensorboard or mlflow, got 'wandb'"),
        quietly(["tensorboard", "wandb"], tmp_path),
    ):
        pytest.fail("the block has run")


@pytest.mark.parametrize(
    ("kind", "package"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, mlflow, kind, package):
    true_import = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith(package):
            raise ImportError(name)
        return true_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with (
        pytest.raises(InputError, match=rf"--track {kind}: .*paretoblocks\[track\]"),
        quietly([kind], tmp_path),
    ):
        pytest.fail("the block has run")


def test_event_files_hold_every_scalar_once_also_after_a_kill(tmp_path, capsys):
    with quietly(["tensorboard"], tmp_path):
        log_search(tmp_path, (1,))
    half = (tmp_path / "metrics.jsonl").read_bytes()
    assert event_files(tmp_path) == {"blocks/darts-w_0.5-s0/loss": [(1, 1.0)]}

    (tmp_path / "metrics.jsonl").unlink()
    log_all(tmp_path)  # what the killed run and its continuation logged
    assert (tmp_path / "metrics.jsonl").read_bytes() != half
    with quietly(["tensorboard"], tmp_path):
        pass
    assert event_files(tmp_path) == SCALARS
    logged = [event["time_s"] for event in read_metrics(tmp_path / "metrics.jsonl")]
    assert event_files(tmp_path, times=True)["blocks/darts-w_0.5-s0/loss"] == logged[:2]
    with quietly(["tensorboard"], tmp_path):
        pass
    assert event_files(tmp_path) == SCALARS
    assert capsys.readouterr().out == ""


def test_an_mlflow_run_holds_every_scalar_once_also_after_a_kill(
    tmp_path, mlflow, capsys, monkeypatch
):
    monkeypatch.setattr(track, "MLFLOW_METRICS", 3)  # the points come in several parts
    monkeypatch.setattr(track, "MLFLOW_PARAMS", 3)
    with quietly(["mlflow"], tmp_path):
        log_search(tmp_path, (1,))
    history, run = mlflow(tmp_path)
    assert history == {"blocks/darts-w_0.5-s0/loss": [(1, 1.0)]}
    assert run.data.params == {
        "seed": "0",
        "data.name": "digits",
        "data.augment.flip": "False",
        "costs": "['params']",
    }
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")

    (tmp_path / "metrics.jsonl").unlink()
    log_all(tmp_path)
    for _ in range(2):  # the second time nothing is new
        with quietly(["mlflow"], tmp_path):
            pass
        history, again = mlflow(tmp_path)
        assert history == SCALARS
        assert again.info.run_id == run.info.run_id
    assert capsys.readouterr().out == ""


def test_an_mlflow_run_that_goes_on_is_running_and_its_points_have_their_times(tmp_path, mlflow):
    from mlflow.tracking import MlflowClient

    with quietly(["mlflow"], tmp_path):
        log_search(tmp_path, (1,))
    with quietly(["mlflow"], tmp_path):
        log_search(tmp_path, (2,))
        deadline = time.monotonic() + 60
        while len(mlflow(tmp_path)[0]["blocks/darts-w_0.5-s0/loss"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert mlflow(tmp_path)[1].info.status == "RUNNING"
    _, run = mlflow(tmp_path)
    assert run.info.status == "FINISHED"
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    history = client.get_metric_history(run.info.run_id, "blocks/darts-w_0.5-s0/loss")
    logged = [event["time_s"] for event in read_metrics(tmp_path / "metrics.jsonl")]
    assert [metric.timestamp for metric in history] == [round(1000 * time_s) for time_s in logged]


def test_an_mlflow_run_that_was_moved_goes_on_where_it_is(tmp_path, mlflow):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with quietly(["mlflow"], here):
        log_search(here, (1,))
    _, run = mlflow(here)
    here.rename(there)
    with quietly(["mlflow"], there):
        log_search(there, (2,))
    history, again = mlflow(there)
    assert history == {"blocks/darts-w_0.5-s0/loss": [(1, 1.0), (2, 0.5)]}
    assert again.info.run_id == run.info.run_id


def test_a_run_that_mlflow_no_longer_knows_begins_anew(tmp_path, mlflow, monkeypatch):
    with quietly(["mlflow"], tmp_path):
        log_all(tmp_path)
    _, run = mlflow(tmp_path)
    other = tmp_path / "other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other.as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with quietly(["mlflow"], tmp_path):
        pass
    history, again = mlflow(tmp_path, other)
    assert history == SCALARS and again.info.run_id != run.info.run_id
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    with quietly(["mlflow"], tmp_path):
        pass
    assert mlflow(tmp_path, other)[0] == SCALARS


def test_a_run_that_ends_with_an_exception_has_failed_for_mlflow(tmp_path, mlflow):
    with pytest.raises(RuntimeError), quietly(["mlflow"], tmp_path):
        log_search(tmp_path, (1,))
        raise RuntimeError("in the run")
    history, run = mlflow(tmp_path)
    assert run.info.status == "FAILED" and len(history) == 1


def test_a_server_that_is_not_there_ends_nothing(tmp_path, mlflow, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said, ran = [], False
    with tracking(
        ["mlflow", "tensorboard"], tmp_path, name="run", params={}, say=said.append, every_s=0.01
    ):
        log_all(tmp_path)
        ran = True
    assert ran and len(said) == 1 and "--track mlflow" in said[0]
    assert not (tmp_path / "mlflow.json").exists()
    assert event_files(tmp_path) == SCALARS
    assert capsys.readouterr().out == ""


def test_the_run_writes_what_tracking_reads(tmp_path):
    from evaluation.files.run_folder import RunFolder

    folder = RunFolder(tmp_path)
    assert folder.metrics == tmp_path / tracking.METRICS
    assert [folder.archive(name).path for name in tracking.ARCHIVES] == [
        Path(tmp_path / "archive.jsonl"),
        Path(tmp_path / "random.jsonl"),
    ]
