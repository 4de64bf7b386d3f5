"""Independent tasks in worker processes: results as they come, one compute thread per worker."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from typing import TypeVar

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from evaluation.memory import keep_freed_memory

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

PARENT_POLL_S = 1.0


class WorkerDied(RuntimeError):
    """A worker process ended without an answer, for instance killed for want of memory."""


def run_tasks(
    function: Callable[..., R],
    tasks: Mapping[K, tuple[object, ...]],
    workers: int,
    threads: int = 1,
) -> Iterator[tuple[K, R | WorkerDied]]:
    """Yield (key, function(*arguments)) for every task, in the order in which they end.

    A worker that dies takes down only what ran beside it: that is done again, each task alone, and
    a task that kills its worker a second time yields a `WorkerDied`.

    Args:
        function: Importable by name; raises only for bugs.
        tasks: Key to arguments; small, since they are sent to the workers.
        workers: Number of processes; with 1 the tasks run in this process.
        threads: Compute threads of each worker.
    """
    if workers == 1:
        keep_freed_memory()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for key, arguments in tasks.items():
                yield key, function(*arguments)
        finally:
            torch.set_num_threads(before)
        return
    left = dict(tasks)
    results = _parallel(function, left, workers, threads)
    try:
        for key, result in results:
            del left[key]
            yield key, result
    except TerminatedWorkerError:
        for key in list(left):
            yield key, _alone(function, key, left[key], threads)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tasks were cancelled, when we are interrupted
            results.close()


def _alone(
    function: Callable[..., R], key: K, arguments: tuple[object, ...], threads: int
) -> R | WorkerDied:
    try:
        # Two workers for one task: with one, joblib would run it in this process.
        return next(iter(_parallel(function, {key: arguments}, 2, threads)))[1]
    except TerminatedWorkerError as error:
        return WorkerDied(str(error).splitlines()[0])


def _parallel(
    function: Callable[..., R], tasks: Mapping[K, tuple[object, ...]], workers: int, threads: int
) -> Generator[tuple[K, R], None, None]:
    parallel = joblib.Parallel(
        n_jobs=workers, backend="loky", return_as="generator_unordered", batch_size=1
    )
    results: Generator[tuple[K, R], None, None] = parallel(
        joblib.delayed(_call)(os.getpid(), threads, key, function, arguments)
        for key, arguments in list(tasks.items())  # a copy: dispatch goes on while results come
    )
    return results


def _call(
    parent: int,
    threads: int,
    key: K,
    function: Callable[..., R],
    arguments: tuple[object, ...],
) -> tuple[K, R]:
    _die_with(parent)
    keep_freed_memory()
    torch.set_num_threads(threads)
    return key, function(*arguments)


_watched: set[int] = set()


def _die_with(parent: int) -> None:
    """End this worker as soon as its parent is gone, so that no orphan goes on computing."""
    if os.getppid() != parent:
        os._exit(1)
    if parent in _watched:
        return
    _watched.add(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
