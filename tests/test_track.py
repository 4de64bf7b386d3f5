"""What the event files hold afterwards equals the files of the run, once each, come what may."""

import builtins
import json
from pathlib import Path

import pytest

from evaluation.errors import InputError
from evaluation.files import track
from evaluation.files.archive import Archive
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.run_folder import RunFolder
from evaluation.files.track import Point, Reader, TensorBoard
from evaluation.records import Cost, ModelRecord


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


LOSS = "blocks/darts-w_0.5-s0/loss"


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


def test_points_are_seen_while_the_run_goes_on_and_the_last_ones_at_its_end(tmp_path):
    board = TensorBoard(tmp_path, say=pytest.fail)
    log_search(tmp_path, (1,))
    board.forward()
    assert event_files(tmp_path) == {LOSS: [(1, 1.0)]}
    board.forward()  # nothing is new
    log_search(tmp_path, (2,))
    assert event_files(tmp_path) == {LOSS: [(1, 1.0)]}
    board.close()
    assert event_files(tmp_path) == {LOSS: [(1, 1.0), (2, 0.5)]}


def test_event_files_hold_every_scalar_once_also_after_a_kill(tmp_path, capsys):
    log_search(tmp_path, (1,))
    TensorBoard(tmp_path, say=pytest.fail).forward()  # and then a kill
    (tmp_path / "metrics.jsonl").unlink()
    log_search(tmp_path, (1,))  # an epoch that was done twice
    log_all(tmp_path)
    for _ in range(2):
        board = TensorBoard(tmp_path, say=pytest.fail)
        board.close()
        assert event_files(tmp_path) == SCALARS
    logged = [event["time_s"] for event in read_metrics(tmp_path / "metrics.jsonl")]
    assert event_files(tmp_path, times=True)[LOSS] == [logged[0], logged[2]]
    assert capsys.readouterr().out == ""


def test_a_failure_is_said_once_and_the_next_call_writes_all(tmp_path):
    said = []
    log_search(tmp_path, (1,))
    (tmp_path / track.FOLDER).write_text("no folder")
    board = TensorBoard(tmp_path, said.append)
    for _ in range(3):
        board.forward()
    board.close()
    (warning,) = said
    assert warning.startswith("warning: --tensorboard has failed, the run goes on: ")
    assert "Error: " in warning and "\n" not in warning
    (tmp_path / track.FOLDER).unlink()
    TensorBoard(tmp_path, pytest.fail).close()
    assert event_files(tmp_path) == {LOSS: [(1, 1.0)]}


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    true_import = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return true_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"--tensorboard: .*paretoblocks\[track\]"):
        TensorBoard(tmp_path, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_the_run_writes_what_tracking_reads(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.metrics == tmp_path / track.METRICS
    assert [folder.archive(name).path for name in track.ARCHIVES] == [
        Path(tmp_path / "archive.jsonl"),
        Path(tmp_path / "random.jsonl"),
    ]
