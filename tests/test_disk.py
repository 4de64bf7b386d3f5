"""Disks that are full, read-only or gone: named with the reason, and the run goes on afterwards."""

import errno
import io
import os
import re
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.atomic import write_atomic
from evaluation.files.events import MetricsLog, read_metrics
from evaluation.files.run_folder import OWNER
from evaluation.records import Cost, ModelRecord
from run_pipeline import app
from tiny_run import command, result, run

CAPTURED = {"capture_output": True, "text": True, "timeout": 300}
NO_ROOM = os.strerror(errno.ENOSPC)
RECORD = ModelRecord("a", (1,), ("n",), Cost(1, 2), seed=0, valid_accuracy=0.5)
LATER = ModelRecord("b", (2,), ("n",), Cost(1, 2), seed=0, valid_accuracy=0.25)
MAX_ATTEMPTS = 100
FREE_KIB = 64  # of a real disk; a run needs more
pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return result(folder)


class HalfWritten(io.FileIO):
    """A file on a disk that is full in the middle of the first write."""

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, NO_ROOM)


@pytest.fixture
def writes(monkeypatch):
    """(before) -> context in which `before(path)` is asked whether a write finds the disk full."""
    opened = Path.open

    @contextmanager
    def patched(is_full):
        def open_or_fill(path, mode="r", *arguments, **options):
            if mode in ("wb", "ab") and is_full(path):
                return HalfWritten(path, mode)
            return opened(path, mode, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_or_fill)
            yield

    return patched


def kind(path):
    """The same for all files of one purpose: temporary names and ids left out."""
    return re.sub(r"^\.|\.\d+\.tmp$", "", path.name)


def attempts_until_done(folder, writes, key):
    """Run until the end; a write whose key was never seen finds the disk full. Return the keys."""
    failed = []

    def is_full(path):
        # Who holds the folder is told as far as there is room.
        here = None if OWNER in path.name else key(path, failed)
        if here is not None:
            failed.append(here)
        return here is not None

    for _ in range(MAX_ATTEMPTS):
        before = len(failed)
        with writes(is_full):
            try:
                run(folder)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert len(failed) == before + 1, "an error of a full disk was passed over"
                assert Path(error.filename).is_relative_to(folder) and NO_ROOM in str(error)
                assert not list(folder.rglob("*.tmp"))
            else:
                return failed
    raise AssertionError("the run does not come to its end")


@pytest.mark.slow
def test_a_disk_that_is_full_once_at_every_single_write_changes_nothing(tmp_path, writes, unbroken):
    done = Counter()

    def key(path, failed):
        file = str(path.with_name(kind(path)))
        if (file, done[file]) in failed:
            done[file] += 1
            return None
        return file, done[file]

    failed = attempts_until_done(tmp_path, writes, key)
    assert sum(file.endswith("archive.jsonl") for file, _ in failed) == 5  # each of its records
    kinds = {Path(file).name for file, _ in failed}
    assert {"config.yaml", "blocks.json", "archive.jsonl", "pareto.json"} <= kinds
    assert {"metrics.jsonl", "weights.safetensors", "seed-0.json", "report.html"} <= kinds
    assert any(name.endswith(".ckpt") for name in kinds)
    assert result(tmp_path) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("until", ["blocks", "networks", "retrain"])
def test_a_folder_that_disappears_is_named_and_not_made_again(tmp_path, writes, unbroken, until):
    """It goes in the middle of a stage, and the run goes on when it is back."""
    folder, away = tmp_path / "run", tmp_path / "away"
    last = {"blocks": ".ckpt", "networks": "archive.jsonl", "retrain": "seed-0.ckpt"}[until]

    def goes(path):
        if kind(path).endswith(last) and not away.exists():
            folder.rename(away)
        return False

    with writes(goes), pytest.raises(OSError, match=r"No such file or directory: '.*run/"):
        run(folder, until)
    assert away.exists() and not folder.exists()
    away.rename(folder)
    run(folder)
    assert result(folder) == unbroken


def test_an_archive_goes_on_after_half_a_line(tmp_path, writes):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    archive.add(RECORD)
    whole = path.read_bytes()
    with writes(lambda path: True), pytest.raises(OSError, match=f"{NO_ROOM}: '{path}'"):
        archive.add(LATER)
    assert len(path.read_bytes()) > len(whole)  # half a line is there
    assert list(Archive(path)) == [RECORD] == list(archive)
    archive.add(LATER)
    assert list(Archive(path)) == [RECORD, LATER]


def test_a_line_that_could_not_be_forced_to_disk_is_written_again_once(tmp_path, monkeypatch):
    archive = Archive(tmp_path / "archive.jsonl")

    def fail(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error: '.*archive.jsonl'"):
            archive.add(RECORD)
    assert list(archive) == []
    archive.add(RECORD)
    assert (tmp_path / "archive.jsonl").read_bytes().count(b"\n") == 1
    assert list(Archive(tmp_path / "archive.jsonl")) == [RECORD]


@pytest.mark.parametrize("how", ["deleted", "cut short"])
def test_an_archive_that_lost_lines_under_the_run_is_refused_and_not_filled_up(tmp_path, how):
    path = tmp_path / "archive.jsonl"
    archive = Archive(path)
    archive.add(RECORD)
    path.unlink() if how == "deleted" else path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(InputError, match="archive.jsonl: was cut short or replaced"):
        archive.add(LATER)
    assert b"\0" not in path.read_bytes()


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_whole_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, writes, fails
):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, NO_ROOM)

    with writes(lambda path: fails == "write"), monkeypatch.context() as patch:
        if fails != "write":
            patch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "replace")}[fails], fail)
        with pytest.raises(OSError, match=f"{NO_ROOM}: '{path}'"):
            write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_half_a_line_of_the_log_costs_itself_and_the_one_after_it(tmp_path, writes):
    log = MetricsLog(tmp_path / "metrics.jsonl", "blocks", "x")
    log.write(epoch=1)
    with writes(lambda path: True), pytest.raises(OSError, match=f"{NO_ROOM}: .*metrics"):
        log.write(epoch=2)
    log.write(epoch=3)
    log.write(epoch=4)
    assert [event["epoch"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]


def test_a_command_names_the_full_disk_and_how_to_go_on(tmp_path, writes):
    with writes(lambda path: kind(path) == "archive.jsonl"):
        done = CliRunner().invoke(app, command(tmp_path, 1)[2:])
    assert done.exit_code == 2
    last = done.stderr.splitlines()[-1]
    assert f"{NO_ROOM}: '{tmp_path / 'archive.jsonl'}'" in last
    assert last.endswith("the same command continues the run") and "Traceback" not in done.stderr


@pytest.fixture
def mounted(tmp_path):
    """(size, options) -> an empty file system of its own in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.slow
def test_a_real_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(mounted, unbroken):
    disk = mounted("size=32m")
    filler = disk / "filler"
    filler.write_bytes(bytes(((32 << 10) - FREE_KIB) << 10))
    full = subprocess.run(command(disk / "run"), **CAPTURED)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert re.search(rf"error: .*{NO_ROOM}: '{disk}/run", full.stderr.splitlines()[-1])
    filler.unlink()
    done = CliRunner().invoke(app, command(disk / "run", 1)[2:])
    assert done.exit_code == 0, done.output
    assert result(disk / "run") == unbroken


def test_a_folder_that_may_only_be_read_is_named(mounted, tmp_path):
    disk = mounted("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk, disk / "run"):
        with pytest.raises(OSError, match=f"Read-only file system: '{folder}"):
            run(folder)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=f"Permission denied: '{tmp_path}"):
        run(tmp_path / "run")
    tmp_path.chmod(0o700)
    shutil.rmtree(tmp_path)
