"""Independent tasks in worker processes, here or on a cluster: results as they come."""

import os
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluation import clusters
from evaluation.memory import keep_freed_memory
from evaluation.tasks import Task, WorkerDied

__all__ = ["ONE_WORKER", "WorkerDied", "Workers", "WorkersConfig", "run_tasks"]

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

Backend = Literal["loky", "dask", "ray"]


@dataclass(frozen=True)
class Workers:
    """Processes that compute at the same time, and where they are.

    Attributes:
        count: Number of them.
        backend: `loky`: processes of this machine; `dask`, `ray`: a cluster.
        address: Of a Dask scheduler or a Ray head; None: all on this machine.
        device: `cpu` or `cuda`; with `cuda` each worker has one GPU.
    """

    count: int = 1
    backend: Backend = "loky"
    address: str | None = None
    device: str = "cpu"

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


ONE_WORKER = Workers()  # this process


class WorkersConfig(BaseModel):
    """Where a run computes; changes nothing of what it computes, up to rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Backend = "loky"
    address: str | None = None
    count: int | None = Field(default=None, ge=1)

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
            InputError: If the backend is not installed, or the cluster does not answer.
        """
        count = count or self.count
        if self.address is None and count is None:
            count = joblib.cpu_count() if device == "cpu" else max(1, torch.cuda.device_count())
        if self.backend != "loky":
            cluster = clusters.connect(self.backend, self.address, count)
            offered = cluster.size(device)
            count = count or offered
        assert count is not None
        return Workers(count, self.backend, self.address, device)


def run_tasks(
    function: Callable[..., R],
    tasks: Mapping[K, tuple[object, ...]],
    workers: Workers,
    threads: int = 1,
) -> Iterator[tuple[K, R | WorkerDied]]:
    """Yield (key, function(*arguments)) once for every task, in the order in which they end.

    A worker that dies takes down only what ran beside it, and that is done again; a task that ends
    its workers again and again yields a `WorkerDied`.

    Args:
        function: Importable by name; raises only for bugs.
        tasks: Key to arguments; small, since they are sent to the workers.
        workers: With one of backend loky the tasks run in this process.
        threads: Compute threads of each worker.

    Raises:
        InputError: If a cluster cannot be used.
    """
    if workers.backend == "loky" and workers.count == 1:
        return _serial(function, tasks, threads)
    here = workers.backend == "loky"
    calls = {
        key: Task(
            function,
            arguments,
            threads,
            Path.cwd(),
            takes_gpu=workers.device == "cuda" and workers.backend != "ray",  # Ray does it itself
            parent=os.getpid() if here else None,
        )
        for key, arguments in tasks.items()
    }
    if here:
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
    """Yield results from joblib; after a death, which ends all workers, do the rest one by one."""
    left: dict[K, Task[R]] = dict(tasks)
    results = _parallel(left, count)
    try:
        for key, result in results:
            del left[key]
            yield key, result
    except TerminatedWorkerError:
        for key in list(left):
            again = _alone(key, left[key])
            yield key, again
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tasks were cancelled, when we are interrupted
            results.close()


def _alone(key: K, task: Task[R]) -> R | WorkerDied:
    try:
        # Two workers for one task: with one, joblib would run it in this process.
        return next(iter(_parallel({key: task}, 2)))[1]
    except TerminatedWorkerError as error:
        return WorkerDied(str(error).splitlines()[0])


def _parallel(tasks: Mapping[K, Task[R]], count: int) -> Generator[tuple[K, R], None, None]:
    with joblib.parallel_config(backend="loky"):
        parallel = joblib.Parallel(n_jobs=count, return_as="generator_unordered", batch_size=1)
    results: Generator[tuple[K, R], None, None] = parallel(
        joblib.delayed(_call)(key, task)
        for key, task in list(tasks.items())  # a copy: dispatch goes on while results come
    )
    return results


def _call(key: K, task: Task[R]) -> tuple[K, R]:
    return key, task.run()
