"""Tasks in worker processes: all results, deaths of workers, and no orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from evaluation.parallel import WorkerDied, Workers, run_tasks

ROOT = Path(__file__).parents[1]
ORPHANS_END_WITHIN_S = 15
HEARTBEAT_S = 0.1


def square(x):
    return x * x, os.getpid(), torch.get_num_threads()


def square_or_die(x, how):
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def fail(x):
    raise KeyError(f"bug {x}")


@pytest.mark.parametrize("workers", [1, 2])
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


@pytest.mark.parametrize("workers", [1, 2])
def test_no_tasks_give_no_results(workers):
    assert list(run_tasks(square, {}, Workers(workers))) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_in_a_task_reaches_the_caller(workers):
    with pytest.raises(KeyError, match="bug 1"):
        list(run_tasks(fail, {0: (1,)}, Workers(workers)))


@pytest.mark.filterwarnings("ignore:.*have been cancelled:UserWarning")
def test_a_consumer_may_stop_early_and_run_tasks_again():
    stream = run_tasks(square, {i: (i,) for i in range(8)}, Workers(2))
    next(stream)
    stream.close()
    again = dict(run_tasks(square, {i: (i,) for i in range(3)}, Workers(2)))
    assert {key: value[0] for key, value in again.items()} == {0: 0, 1: 1, 2: 4}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.filterwarnings("ignore:A worker stopped while some jobs:UserWarning")
def test_a_task_that_kills_its_worker_costs_only_its_own_result():
    tasks = {0: (3, ""), 1: (4, ""), "exit": (5, "exit"), 2: (6, ""), "kill": (7, "kill")}
    results = dict(run_tasks(square_or_die, tasks, Workers(2)))
    assert isinstance(results.pop("exit"), WorkerDied)
    assert isinstance(results.pop("kill"), WorkerDied)
    assert results == {0: 9, 1: 16, 2: 36}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_end_soon_after_their_parent_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib, time
            from evaluation.parallel import Workers, run_tasks

            def beat(name):
                path = pathlib.Path({str(tmp_path)!r}) / name
                for count in range(600):
                    path.write_text(str(count))
                    time.sleep({HEARTBEAT_S})

            if __name__ == "__main__":
                list(run_tasks(beat, {{"a": ("a.beat",), "b": ("b.beat",)}}, Workers(2)))
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    beats = [tmp_path / "a.beat", tmp_path / "b.beat"]
    try:
        assert wait(lambda: all(beat.exists() for beat in beats), 60), "the workers did not start"
    finally:
        parent.kill()
        parent.wait()
    assert wait(lambda: silent(beats), ORPHANS_END_WITHIN_S), "orphans go on computing"


def silent(beats):
    before = [beat.read_text() for beat in beats]
    time.sleep(10 * HEARTBEAT_S)
    return [beat.read_text() for beat in beats] == before


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(HEARTBEAT_S)
    return False
