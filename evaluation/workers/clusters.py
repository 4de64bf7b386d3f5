"""Tasks on a Dask or a Ray cluster, on this machine or on many.

Both are used directly: joblib's Dask backend never returns once a task has killed its worker for
good and takes no limit on workers; its Ray backend cannot yield results as they come.
"""

import atexit
import logging
import os
import socket
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from evaluation.errors import InputError, not_installed
from evaluation.workers.task import Task, WorkerDied

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

ANSWER_S = 3.0
RECONNECT_S = 30.0  # how long a Dask scheduler may be out of reach
# Dask looks 15 s after a death and closes for good what is not there, so also a worker that died
# again meanwhile and is being started.
PATIENCE = {"distributed.deploy.lost-worker-timeout": "1000 days"}
RAY_RETRIES = 3  # as many as Dask allows
RAY_STORE_BYTES = 80_000_000  # near the least that Ray takes; records are small


class Cluster(Protocol):
    """Where tasks are done by other processes; a call in progress is a `future`."""

    def size(self, device: str) -> int:
        """Return how many tasks it does at the same time."""

    def submit(self, task: Task[Any], device: str) -> Any:
        """Start a task and return its future."""

    def wait(self, futures: list[Any]) -> list[Any]:
        """Return those that have ended, at least one."""

    def outcome(self, future: Any) -> Any:
        """Return a result or a `WorkerDied`; raise what the task raised."""

    def cancel(self, futures: list[Any]) -> None:
        """Give up what has not ended."""

    def close(self) -> None:
        """Leave it, and end what was started for us."""


def results(
    cluster: Cluster, tasks: Mapping[K, Task[R]], count: int, device: str
) -> Iterator[tuple[K, R | WorkerDied]]:
    """Yield (key, result) in the order in which tasks end, `count` of them at the same time."""
    waiting = iter(list(tasks.items()))
    running: dict[Any, K] = {}
    try:
        while True:
            for key, task in islice(waiting, count - len(running)):
                running[cluster.submit(task, device)] = key
            if not running:
                return
            for future in cluster.wait(list(running)):
                key = running.pop(future)
                yield key, _explained(cluster.outcome(future), tasks[key].limits.minutes)
    finally:
        cluster.cancel(list(running))


def _explained(outcome: R | WorkerDied, minutes: float | None) -> R | WorkerDied:
    """Return an outcome; a death says that there was a limit, since a cluster hides which it was.

    Clusters try a task again that was too slow, so that it takes its limit several times.
    """
    if isinstance(outcome, WorkerDied) and minutes is not None:
        return WorkerDied(f"{outcome}; each had {minutes:g} minutes, workers.evaluation_minutes")
    return outcome


class DaskCluster:
    """Dask workers of one thread each, one process per task in progress.

    A task whose worker dies is done again on another one; after four deaths it is given up.
    """

    def __init__(self, address: str | None, count: int | None):
        try:
            import dask
            from dask.distributed import Client, LocalCluster
        except ImportError as error:
            raise not_installed("dask", "workers.backend") from error
        self.address = address
        if address is not None:
            _check_answers(address)
        dask.config.set(PATIENCE)
        self.local = address is None and LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.ERROR,
        )
        try:
            place = self.local or address
            self.client = Client(place, timeout=RECONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"workers.address: {address}: {error}") from error

    def size(self, device: str) -> int:
        """Return the number of workers.

        Raises:
            InputError: If there are none, or some have several threads.
        """
        threads = self.client.nthreads()
        if not threads:
            raise InputError(f"workers.address: {self.address}: the cluster has no workers yet")
        if set(threads.values()) != {1}:
            raise InputError(
                f"workers.address: {self.address}: expected workers of one thread each, got "
                f"{max(threads.values())}; start them with --nthreads 1 --nworkers N"
            )
        return len(threads)

    def submit(self, task: Task[Any], device: str) -> Any:
        """Start a task."""
        return self.client.submit(Task.run, task, pure=False)

    def wait(self, futures: list[Any]) -> list[Any]:
        """Return what has ended.

        Raises:
            InputError: If the scheduler is gone.
        """
        from dask.distributed import wait

        try:
            with self.client.as_current():
                return list(wait(futures, return_when="FIRST_COMPLETED").done)
        except CancelledError as error:
            raise InputError(
                f"{self.address or 'Dask'}: lost the scheduler; the same command continues the run"
            ) from error

    def outcome(self, future: Any) -> Any:
        """Return what the task returned; raise what it raised."""
        from dask.distributed import KilledWorker

        error = future.exception()
        if isinstance(error, KilledWorker):
            return WorkerDied("the task ended several workers, one after the other")
        if error is not None:
            raise error
        return future.result()

    def cancel(self, futures: list[Any]) -> None:
        """Give up what waits; what runs on a worker runs to its end."""
        if futures and self.client.status == "running":
            self.client.cancel(futures)

    def close(self) -> None:
        """Disconnect, and end a cluster on this machine."""
        self.client.close()
        if self.local:
            self.local.close()


class RayCluster:
    """Ray tasks with a core each, or a GPU each; a task whose worker or node dies is retried."""

    def __init__(self, address: str | None, count: int | None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns each time
        os.environ.setdefault("RAY_task_oom_retries", str(RAY_RETRIES))  # else without end
        try:
            import ray
        except ImportError as error:
            raise not_installed("ray", "workers.backend") from error
        self.address = address
        own: dict[str, Any] = {}
        if address is None:
            own = {
                "num_cpus": count,
                "object_store_memory": RAY_STORE_BYTES,
                "include_dashboard": False,
            }
        else:
            _check_answers(address)
        if ray.is_initialized():
            raise InputError("workers.backend: this process is connected to another Ray cluster")
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:
            raise InputError(
                f"workers.address: {address}: {error}; start the run on a node of the cluster"
            ) from error
        self.run = ray.remote(Task.run)

    def size(self, device: str) -> int:
        """Return the number of GPUs or of cores.

        Raises:
            InputError: If there are none.
        """
        import ray

        resource = "GPU" if device == "cuda" else "CPU"
        count = int(ray.cluster_resources().get(resource, 0))
        if count == 0:
            raise InputError(f"workers.address: {self.address}: the cluster offers no {resource}")
        return count

    def submit(self, task: Task[Any], device: str) -> Any:
        """Start a task; Ray shows it one GPU where it asks for one."""
        wanted = {"num_cpus": 0, "num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
        return self.run.options(max_retries=RAY_RETRIES, **wanted).remote(task)

    def wait(self, futures: list[Any]) -> list[Any]:
        """Return what has ended."""
        import ray

        done: list[Any] = ray.wait(futures, num_returns=1)[0]
        return done

    def outcome(self, future: Any) -> Any:
        """Return what the task returned; raise what it raised."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

        try:
            return ray.get(future)
        except RayTaskError as error:
            raise (error.cause or error) from None
        except (NodeDiedError, OutOfMemoryError, WorkerCrashedError) as error:
            return WorkerDied(str(error).splitlines()[0])

    def cancel(self, futures: list[Any]) -> None:
        """Give up what has not ended, and end the workers that are at it."""
        import ray

        for future in futures:
            with suppress(ray.exceptions.RayError):
                ray.cancel(future, force=True)

    def close(self) -> None:
        """Disconnect, and end a cluster on this machine."""
        import ray

        ray.shutdown()


CLUSTERS: dict[str, type[DaskCluster] | type[RayCluster]] = {"dask": DaskCluster, "ray": RayCluster}
_open: dict[tuple[str, str | None], tuple[Cluster, int]] = {}


def connect(backend: str, address: str | None, count: int | None) -> Cluster:
    """Return the cluster, which stays open for the next call and is left when Python ends.

    Args:
        backend: A name in `CLUSTERS`.
        address: Of a Dask scheduler or a Ray head; None starts a cluster on this machine.
        count: Workers of one that is started; one that is open and has as many is used again.

    Raises:
        InputError: If the package is not installed, or nothing answers at the address.
    """
    key, wanted = (backend, address), count or 0
    if key in _open and _open[key][1] >= wanted:
        return _open[key][0]
    disconnect(key)
    cluster = CLUSTERS[backend](address, count)
    _open[key] = cluster, wanted if address is None else 2**31
    return cluster


@atexit.register
def disconnect_all() -> None:
    """Leave every cluster."""
    for key in list(_open):
        disconnect(key)


def disconnect(key: tuple[str, str | None]) -> None:
    """Leave a cluster, if it is open."""
    if key in _open:
        _open.pop(key)[0].close()


def _check_answers(address: str) -> None:
    """Refuse an address at which no one speaks: both schedulers send the first byte.

    Ray by itself tries for 80 s and then ends the process; Dask waits without end for a stranger.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if not parts.hostname or not parts.port:
            raise ValueError("expected host:port")
        with socket.create_connection((parts.hostname, parts.port), ANSWER_S) as connection:
            connection.settimeout(ANSWER_S)
            if not connection.recv(1):
                raise ConnectionError("no answer")
    except (OSError, ValueError) as error:
        raise InputError(f"workers.address: {address}: no cluster there: {error}") from error
