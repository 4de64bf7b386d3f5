"""Independent tasks in worker processes, here or on a cluster: results as they come."""

import os
import queue
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.reduction import dumps
from joblib.externals.loky.process_executor import TerminatedWorkerError

from evaluation.errors import InputError, reason_of
from evaluation.workers import clusters
from evaluation.workers.memory import keep_freed_memory
from evaluation.workers.task import Limits, Task, WorkerDied, die_with
from evaluation.workers.workers import Workers

__all__ = ["WorkerDied", "check_picklable", "run_tasks"]

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

DEATHS_ALONE = 4  # of workers that had but this task; then it is given up: others may kill them too
IDLE_S = 300  # after which a worker without work ends
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_tasks(
    function: Callable[..., R],
    tasks: Mapping[K, tuple[object, ...]],
    workers: Workers,
    threads: int = 1,
    *,
    minutes: float | None = None,
    anew: bool = False,
) -> Iterator[tuple[K, R | WorkerDied]]:
    """Yield (key, function(*arguments)) once for every task, in the order in which they end.

    A worker that dies takes down only what ran beside it, and that is done again; a task that ends
    its workers again and again, or takes too long, yields a `WorkerDied`.

    Args:
        function: Importable by name; raises only for bugs, and where files cannot be written.
        tasks: Key to arguments; small, since they are sent to the workers.
        workers: With one of backend loky, and no limits, the tasks run in this process.
        threads: Compute threads of each worker.
        minutes: After which the worker of a task is killed, whatever it is at; None: never.
        anew: Whether worker processes of this machine are started for these tasks, so that they
            hold nothing of earlier ones.

    Raises:
        InputError: If a cluster cannot be used.
    """
    here = workers.backend == "loky"
    if here and workers.count == 1 and workers.memory_mib is None and minutes is None:
        return _serial(function, tasks, threads)
    calls = {
        key: Task(
            function,
            arguments,
            threads,
            Path.cwd(),
            takes_gpu=workers.device == "cuda" and workers.backend != "ray",  # Ray does it itself
            limits=Limits(workers.memory_mib, minutes),
        )
        for key, arguments in tasks.items()
    }
    if here:
        if anew:
            _executor(workers.count, workers.count, reuse=False)
        return _in_processes(calls, workers.count)
    cluster = clusters.connect(workers.backend, workers.address, workers.count)
    return clusters.results(cluster, calls, workers.count, workers.device)


def check_picklable(part: object, called: str) -> None:
    """Refuse, before any work, what could not travel to a worker.

    Raises:
        InputError: If it cannot be pickled; says what and why.
    """
    try:
        dumps(part)
    except Exception as error:  # a `__reduce__` may raise anything
        raise InputError(
            f"{called}: it cannot be pickled, so that no worker could have it: {reason_of(error)}"
        ) from error


def _serial(
    function: Callable[..., R], tasks: Mapping[K, tuple[object, ...]], threads: int
) -> Iterator[tuple[K, R]]:
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for key, arguments in tasks.items():
            yield key, function(*arguments)
    finally:
        torch.set_num_threads(before)


def _in_processes(
    tasks: Mapping[K, Task[R]], count: int
) -> Generator[tuple[K, R | WorkerDied], None, None]:
    """Yield results; a death ends all workers, and what they were at is then done one by one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what this process holds for later, the workers need now
    with tempfile.TemporaryDirectory(prefix="paretoblocks-") as folder:
        left = dict(tasks)
        marks = {key: Path(folder) / str(number) for number, key in enumerate(tasks)}
        suspects: list[K] = []
        deaths: Counter[K] = Counter()
        while left:
            batch = {key: left[key].marked(marks[key]) for key in suspects[:1] or left}
            try:
                for key, result in _results(batch, 1 if suspects else count, count):
                    del left[key]
                    yield key, result
            except TerminatedWorkerError as error:
                unfinished = {key: task for key, task in batch.items() if key in left}
                deaths.update(list(batch) if len(batch) == 1 else ())
                for key, task in unfinished.items():
                    died = _given_up(task, deaths[key], error)
                    if died is not None:
                        del left[key]
                        yield key, died
                suspects += _begun(unfinished)
            suspects = [key for key in dict.fromkeys(suspects) if key in left]


def _begun(tasks: Mapping[K, Task[R]]) -> list[K]:
    """Return the keys of tasks that had begun; all where none had, so that each is tried alone."""
    return [key for key, task in tasks.items() if task.begun_s is not None] or list(tasks)


def _given_up(task: Task[R], deaths: int, error: TerminatedWorkerError) -> WorkerDied | None:
    """Return why a task is not tried again after a death of workers; None where it is."""
    minutes, begun_s = task.limits.minutes, task.begun_s
    if minutes is not None and begun_s is not None and begun_s >= 60 * minutes:
        return WorkerDied(f"it took more than {minutes:g} minutes, see workers.evaluation_minutes")
    return WorkerDied(str(error).splitlines()[0]) if deaths >= DEATHS_ALONE else None


def _results(
    tasks: Mapping[K, Task[R]], processes: int, count: int
) -> Generator[tuple[K, R], None, None]:
    """Yield the results that processes of this machine return; end the processes if stopped.

    Args:
        tasks: What they do.
        processes: How many; as good as `count` where there is but one task, and sooner started.
        count: How many there are at other times, among which the cores are divided.

    Raises:
        TerminatedWorkerError: At the end, if one died.
    """
    executor = _executor(processes, count)
    died: TerminatedWorkerError | None = None
    finished = False
    try:
        futures = {executor.submit(task.run): key for key, task in tasks.items()}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, TerminatedWorkerError):
                died = error
            else:
                yield futures[future], future.result()
        finished = True
    finally:
        if not finished:
            _end(executor)
    if died is not None:
        raise died


def _end(executor: Any) -> None:
    """End the processes, whatever they are at and whatever waits for them."""
    # Loky forgets what waits, and then fails to find it by the numbers left in its queue.
    with suppress(queue.Empty):
        while True:
            executor._work_ids.get_nowait()
    executor.shutdown(kill_workers=True)


def _executor(processes: int, count: int, reuse: Literal["auto", False] = "auto") -> Any:
    """Return the processes, those of an earlier call if there are as many; unless told not to."""
    threads = str(max(1, joblib.cpu_count() // count))
    return get_reusable_executor(
        processes,
        timeout=IDLE_S,
        initializer=_begin,
        initargs=(os.getpid(),),
        env=dict.fromkeys(THREADS, threads),
        reuse=reuse,
    )


def _begin(parent: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
