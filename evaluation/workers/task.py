"""One task in a worker process: its threads, its folder, its GPU, and the end of its parent."""

import itertools
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from filelock import FileLock, Timeout

from evaluation.errors import InputError
from evaluation.workers.memory import keep_freed_memory, limited_memory

R = TypeVar("R")

PARENT_POLL_S = 1.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


class WorkerDied(RuntimeError):
    """A worker process ended without an answer, for instance killed for want of memory."""


@dataclass(frozen=True)
class Limits:
    """What a task may take.

    Attributes:
        memory_mib: Private memory of its process, which gets a `MemoryError` or the like beyond it.
        minutes: Time; its process is killed then. None: as much as it wants, of either.
    """

    memory_mib: int | None = None
    minutes: float | None = None

    @contextmanager
    def set(self) -> Iterator[None]:
        """Keep this process within the limits while the block runs."""
        if self.minutes is not None:
            # With no handler the kernel ends the process, even where C code holds Python's lock.
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        try:
            with limited_memory(self.memory_mib):
                yield
        finally:
            if self.minutes is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass(frozen=True)
class Task(Generic[R]):
    """A call, and the state that its process must be in.

    Attributes:
        function: Importable by name, on the worker too.
        arguments: Small, since they are sent to the worker.
        threads: Compute threads.
        folder: Working directory, so that relative paths mean the same on every machine.
        takes_gpu: Whether the process must choose a GPU; else it has the one that it sees.
        limits: What it may take.
        mark: File that is made when it begins, on this machine; None: none.
    """

    function: Callable[..., R]
    arguments: tuple[object, ...]
    threads: int
    folder: Path
    takes_gpu: bool = False
    limits: Limits = Limits()
    mark: Path | None = None

    def marked(self, mark: Path) -> Self:
        """Return the same task, not begun, that says by a file when it begins."""
        mark.unlink(missing_ok=True)
        return replace(self, mark=mark)

    @property
    def begun_s(self) -> float | None:
        """Seconds since it began last, None if it did not or has no mark."""
        if self.mark is None or not self.mark.exists():
            return None
        return time.time() - self.mark.stat().st_mtime

    def run(self) -> R:
        """Prepare this process and return what the function returns.

        Raises:
            InputError: If the folder is not on this machine.
        """
        with _one_at_a_time:
            if self.mark is not None:
                self.mark.touch()
            return self._run()

    def _run(self) -> R:
        with self.limits.set():
            if not self.folder.is_dir():
                raise InputError(
                    f"{socket.gethostname()}: no folder {self.folder}; the machines of a cluster "
                    "share the files of the one that starts the run"
                )
            os.chdir(self.folder)
            if self.takes_gpu:
                take_gpu()
            keep_freed_memory()
            torch.set_num_threads(self.threads)
            return self.function(*self.arguments)


# Networks draw their weights from the process's only global generator, so threads must not mix.
_one_at_a_time = threading.Lock()
_slots: list[FileLock] = []  # held until this process ends


def take_gpu() -> None:
    """Let this process see one GPU, for good: that of the first free slot of its machine.

    A slot is a locked file, which the system frees when the process ends, however it ends.
    """
    if _slots or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    told = os.environ.get(VISIBLE)
    # Counted through the driver's library, which leaves CUDA itself asleep.
    gpus = told.split(",") if told else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if gpus == []:
        return
    folder = Path(tempfile.gettempdir()) / f"paretoblocks-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for slot in itertools.count():
        lock = FileLock(folder / f"gpu-{slot}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            continue
        _slots.append(lock)
        os.environ[VISIBLE] = gpu_of(slot, gpus)
        return


def gpu_of(slot: int, gpus: Sequence[str]) -> str:
    """Return the GPU of a slot, in turn; sorted, as launchers may rotate the list per worker."""
    return sorted(gpus)[slot % len(gpus)]


def die_with(parent: int) -> None:
    """End this worker as soon as its parent is gone, so that no orphan goes on computing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
