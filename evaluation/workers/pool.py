"""Independent tasks in worker processes, here or on a cluster: results as they come."""

import os
import queue
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluation.errors import InputError
from evaluation.workers import clusters
from evaluation.workers.memory import keep_freed_memory
from evaluation.workers.task import Limits, Task, WorkerDied, die_with

__all__ = ["ONE_WORKER", "WorkerDied", "Workers", "WorkersConfig", "run_tasks"]

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

Backend = Literal["loky", "dask", "ray"]
DEATHS_ALONE = 4  # of workers that had but this task; then it is given up: others may kill them too
MOST_WORKERS = 100_000  # of a cluster
MOST_PER_CORE = 16  # processes of this machine: loky starts all of them at once
MOST_MIB = 2**40
MOST_MINUTES = 1e6
IDLE_S = 300  # after which a worker without work ends
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Workers:
    """Processes that compute at the same time, and where they are.

    Attributes:
        count: Number of them.
        backend: `loky`: processes of this machine; `dask`, `ray`: a cluster.
        address: Of a Dask scheduler or a Ray head; None: all on this machine.
        device: `cpu` or `cuda`; with `cuda` each worker has one GPU.
        memory_mib: Most MiB of private memory of a worker, on Linux; None: no limit.
        evaluation_minutes: Most minutes of one evaluation of a network; None: no limit.
        checkpoint_minutes: Between two checkpoints inside an epoch.
    """

    count: int = 1
    backend: Backend = "loky"
    address: str | None = None
    device: str = "cpu"
    memory_mib: int | None = None
    evaluation_minutes: float | None = None
    checkpoint_minutes: float = 1.0

    def __str__(self) -> str:
        """Say how many and where, for people."""
        place = "" if self.backend == "loky" else f" ({self.backend} {self.address or 'here'})"
        return f"{self.count}{place}"

    @property
    def cores(self) -> int:
        """Cores that one task may have if it runs alone: a worker's task stays on its machine."""
        return self.count if self.address is None else 1

    @property
    def sharing(self) -> int:
        """Workers that share one memory, taking other machines to be as this one."""
        if self.device == "cuda":
            # A Ray task has a GPU to itself; others share where there are more workers than GPUs.
            alone = self.backend == "ray" or self.address is not None
            return 1 if alone else -(-self.count // max(1, torch.cuda.device_count()))
        return self.count if self.address is None else min(self.count, joblib.cpu_count())


ONE_WORKER = Workers()  # this process, without limits


class WorkersConfig(BaseModel):
    """Where a run computes; changes nothing of what it computes, up to rounding.

    Except that its limits decide which networks fail: both depend on the machine.

    Attributes:
        backend: See `Workers`.
        address: See `Workers`.
        count: Of the workers; None: as many as there are cores or GPUs.
        memory_mib: See `Workers`.
        evaluation_minutes: See `Workers`; by default far beyond a short training, since it is there
            to end what hangs.
        checkpoint_minutes: See `Workers`; what a kill may cost, beside an epoch's end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Backend = "loky"
    address: str | None = None
    count: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    memory_mib: int | None = Field(default=None, ge=1, le=MOST_MIB)
    evaluation_minutes: float | None = Field(default=60.0, gt=0, le=MOST_MINUTES)
    checkpoint_minutes: float = Field(default=1.0, ge=0, le=MOST_MINUTES)

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> Self:
        if self.address is not None and self.backend == "loky":
            raise ValueError("expected no address with backend loky, which stays on this machine")
        return self

    def resolve(self, device: str, count: int | None = None) -> Workers:
        """Connect to the cluster, if it is one, and count the workers.

        Args:
            device: `cpu` or `cuda`.
            count: In place of the config's, if not None.

        Raises:
            InputError: If the backend is not installed, the cluster does not answer, or there are
                more workers than this machine could start.
        """
        count = count or self.count
        if self.address is None and count is None:
            count = joblib.cpu_count() if device == "cpu" else max(1, torch.cuda.device_count())
        most = MOST_PER_CORE * max(joblib.cpu_count(), torch.cuda.device_count())
        if self.backend == "loky" and count is not None and count > most:
            raise InputError(f"workers.count: expected at most {most} on this machine, got {count}")
        if self.backend != "loky":
            cluster = clusters.connect(self.backend, self.address, count)
            offered = cluster.size(device)
            count = count or offered
        assert count is not None
        limits = self.memory_mib, self.evaluation_minutes, self.checkpoint_minutes
        return Workers(count, self.backend, self.address, device, *limits)


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
            _executor(workers.count, reuse=False)
        return _in_processes(calls, workers.count)
    cluster = clusters.connect(workers.backend, workers.address, workers.count)
    return clusters.results(cluster, calls, workers.count, workers.device)


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
                for key, result in _results(batch, count):
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


def _results(tasks: Mapping[K, Task[R]], count: int) -> Generator[tuple[K, R], None, None]:
    """Yield the results that processes of this machine return; end the processes if stopped.

    Raises:
        TerminatedWorkerError: At the end, if one died.
    """
    executor = _executor(count)
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


def _executor(count: int, reuse: Literal["auto", False] = "auto") -> Any:
    """Return the processes, those of an earlier call if there are as many; unless told not to."""
    threads = str(max(1, joblib.cpu_count() // count))
    return get_reusable_executor(
        count,
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
