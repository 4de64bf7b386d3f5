"""Tasks in worker processes: all results, deaths of workers, and no orphans."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

from evaluation.workers import pool
from evaluation.workers.pool import DEATHS_ALONE, WorkerDied, run_tasks
from evaluation.workers.task import Limits
from evaluation.workers.workers import Workers
from processes import alive, needs_proc

ROOT = Path(__file__).parents[1]
ORPHANS_END_WITHIN_S = 15
HEARTBEAT_S = 0.1
HANG_MINUTES = 0.08  # counted from when a worker has imported what a task needs
LIMIT_MIB = 2048
here_and_elsewhere = pytest.mark.parametrize(  # starting two processes takes ten seconds
    "workers", [1, pytest.param(2, marks=pytest.mark.slow)]
)


def square(x):
    return x * x, os.getpid(), torch.get_num_threads()


def rest(seconds):
    time.sleep(seconds)


def square_or_die(x, how):
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def square_or_hang(x, how):
    """Hang in Python, or in C code that never lets another thread of Python run."""
    if how == "sleep":
        time.sleep(3600)
    if how == "C":
        ctypes.PyDLL(None).pause()
    return x * x, os.getpid()


def hold(mib):
    return len(bytearray(mib << 20)) >> 20, os.getpid()


def hold_tensor(mib):
    try:
        return torch.ones(mib << 18).sum().item() / (1 << 18), os.getpid()
    except RuntimeError as error:
        return str(error), os.getpid()


def logged(x, log):
    with log.open("a") as file:
        file.write(f"{x}\n")
    if x == "dies":
        os._exit(3)
    time.sleep(0.2)
    return x


def signal_of_ctrl_c(x):
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def alarm(x):
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def full_disk(x):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")


def fail(x):
    raise KeyError(f"bug {x}")


@here_and_elsewhere
def test_every_task_gives_its_result_once(workers):
    results = list(run_tasks(square, {f"k{i}": (i,) for i in range(6)}, Workers(workers)))
    assert sorted((key, value[0]) for key, value in results) == [(f"k{i}", i * i) for i in range(6)]
    elsewhere = {pid for _, (_, pid, _) in results} - {os.getpid()}
    assert bool(elsewhere) == (workers > 1)
    assert {threads for _, (_, _, threads) in results} == {1}


def test_tasks_in_this_process_get_their_threads_and_leave_the_setting_as_it_was():
    before = torch.get_num_threads()
    stream = run_tasks(square, {0: (1,), 1: (2,)}, Workers(1), threads=2)
    assert next(stream)[1][2] == 2
    stream.close()
    assert torch.get_num_threads() == before


@here_and_elsewhere
def test_no_tasks_give_no_results(workers):
    assert list(run_tasks(square, {}, Workers(workers))) == []


@here_and_elsewhere
def test_a_bug_in_a_task_reaches_the_caller(workers):
    with pytest.raises(KeyError, match="bug 1"):
        list(run_tasks(fail, {0: (1,)}, Workers(workers)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have been cancelled:UserWarning")
def test_a_consumer_may_stop_early_and_run_tasks_again():
    stream = run_tasks(square, {i: (i,) for i in range(8)}, Workers(2))
    next(stream)
    stream.close()
    again = dict(run_tasks(square, {i: (i,) for i in range(3)}, Workers(2)))
    assert {key: value[0] for key, value in again.items()} == {0: 0, 1: 1, 2: 4}


@pytest.mark.slow
def test_a_consumer_may_stop_while_many_tasks_wait(monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)  # else joblib's thread prints it
    for taken in range(1, 5):  # most of them met the error before it was mended
        stream = run_tasks(rest, {i: (0.002,) for i in range(40)}, Workers(2))
        for _ in range(taken):
            next(stream)
        stream.close()
    assert errors == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.filterwarnings("ignore:A worker stopped while some jobs:UserWarning")
def test_a_task_that_kills_its_worker_costs_only_its_own_result(monkeypatch):
    monkeypatch.setattr(pool, "DEATHS_ALONE", 1)  # the next test counts all of them
    tasks = {0: (3, ""), 1: (4, ""), "exit": (5, "exit"), 2: (6, ""), "kill": (7, "kill")}
    results = dict(run_tasks(square_or_die, tasks, Workers(2)))
    assert isinstance(results.pop("exit"), WorkerDied)
    assert isinstance(results.pop("kill"), WorkerDied)
    assert results == {0: 9, 1: 16, 2: 36}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A worker stopped while some jobs:UserWarning")
def test_what_never_began_is_done_side_by_side_after_a_death_and_once(tmp_path):
    log = tmp_path / "log"
    tasks = {"dies": ("dies", log)} | {i: (i, log) for i in range(6)}
    results = dict(run_tasks(logged, tasks, Workers(2)))
    assert isinstance(results.pop("dies"), WorkerDied)
    assert results == {i: i for i in range(6)}
    begun = log.read_text().split()
    assert begun.count("dies") == 1 + DEATHS_ALONE
    others = [name for name in begun if name != "dies"]
    # Only the one that ran beside it may have begun twice.
    assert set(others) == set("012345") and len(others) <= 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers"),
    [("C", 2), ("C", 1), ("sleep", 2)],
)
def test_a_task_that_hangs_is_ended_and_the_others_are_done(how, workers):
    tasks = {0: (3, ""), "hangs": (4, how), 1: (5, ""), 2: (6, "")}
    results = dict(run_tasks(square_or_hang, tasks, Workers(workers), minutes=HANG_MINUTES))
    died = results.pop("hangs")
    assert isinstance(died, WorkerDied)
    assert str(died) == f"it took more than {HANG_MINUTES} minutes, see workers.evaluation_minutes"
    assert {key: value for key, (value, _) in results.items()} == {0: 9, 1: 25, 2: 36}
    assert os.getpid() not in {pid for _, pid in results.values()}


@pytest.mark.slow
def test_a_task_within_its_time_leaves_no_alarm_in_its_worker():
    tasks = {i: (i,) for i in range(2)}
    assert dict(run_tasks(alarm, tasks, Workers(1), minutes=60)) == {0: True, 1: True}
    assert dict(run_tasks(alarm, tasks, Workers(2))) == {0: False, 1: False}


def test_the_alarm_of_a_task_ends_with_it_also_where_it_fails():
    with pytest.raises(KeyError), Limits(minutes=60).set():
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
        raise KeyError
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="only Linux keeps to the limit")
def test_a_limit_on_memory_fails_the_task_and_leaves_its_worker_alive():
    workers = Workers(1, memory_mib=LIMIT_MIB)
    results = dict(run_tasks(hold_tensor, {i: (i,) for i in (1, 4 * LIMIT_MIB, 2)}, workers))
    assert "can't allocate memory" in results[4 * LIMIT_MIB][0]
    assert (results[1][0], results[2][0]) == (1, 2)
    assert len({pid for _, pid in results.values()}) == 1 and os.getpid() != results[1][1]
    with pytest.raises(MemoryError):
        list(run_tasks(hold, {0: (4 * LIMIT_MIB,)}, workers))
    free = dict(run_tasks(hold, {0: (LIMIT_MIB,)}, Workers(2)))
    assert free[0][0] == LIMIT_MIB  # the limit went with its tasks


@pytest.mark.slow
def test_a_full_disk_in_a_worker_reaches_the_caller_and_names_the_file():
    with pytest.raises(OSError, match="No space left on device: 'a/file'") as raised:
        list(run_tasks(full_disk, {0: (0,)}, Workers(2)))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.slow
def test_workers_leave_the_interrupt_of_a_terminal_to_their_parent():
    assert dict(run_tasks(signal_of_ctrl_c, {0: (0,), 1: (1,)}, Workers(2))) == {0: True, 1: True}


@pytest.mark.slow
@needs_proc
def test_workers_end_soon_after_their_parent_was_killed(tmp_path):
    """Also the third, which never had a task."""
    mark = f"PARENT={uuid.uuid4()}"
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib, time
            from evaluation.workers.pool import Workers, run_tasks

            def beat(name):
                path = pathlib.Path({str(tmp_path)!r}) / name
                for count in range(600):
                    path.write_text(str(count))
                    time.sleep({HEARTBEAT_S})

            if __name__ == "__main__":
                list(run_tasks(beat, {{"a": ("a.beat",), "b": ("b.beat",)}}, Workers(3)))
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=")])},
        stderr=subprocess.DEVNULL,
    )
    beats = [tmp_path / "a.beat", tmp_path / "b.beat"]
    try:
        assert wait(lambda: all(beat.exists() for beat in beats), 60), "the workers did not start"
        assert wait(lambda: len(workers(mark)) == 3, 60), "the third did not start"
    finally:
        parent.kill()
        parent.wait()
    assert wait(lambda: not alive(mark), ORPHANS_END_WITHIN_S), "orphans live on"


def workers(mark):
    """Return those of the processes that are workers, not what loky starts beside them."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive(mark)}
    return [pid for pid, line in lines.items() if b"popen_loky" in line]


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(HEARTBEAT_S)
    return False
