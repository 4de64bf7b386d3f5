"""Memory: how much is free, how much a run needs, the largest batch that fits, and how it is kept.

A GPU is asked through PyTorch's allocator, a CPU through Linux's files on memory.
"""

import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from evaluation.errors import InputError

MARGIN = 0.2  # part of the available memory that stays free: a CPU's peaks vary by so much
TINY_BATCH, SMALL_BATCHES = 2, (32, 8, 3)
POLL_S = 0.001
KIB = 1024
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h

NONE_LEFT = (  # what a RuntimeError says of a CPU: torch's allocator, C++, and oneDNN, which has no
    "can't allocate memory",  # other words for it
    "std::bad_alloc",
    "could not create a primitive",
)

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = {  # of a control group, in version 2 and 1: the file of its limit and that of its use
    "memory.max": "memory.current",
    "memory.limit_in_bytes": "memory.usage_in_bytes",
}


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there was no memory left, on a GPU or a CPU."""
    cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in NONE_LEFT)
    return cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextmanager
def limited_memory(mib: int | None) -> Iterator[None]:
    """Let this process have no more than so much private memory while the block runs.

    An allocation beyond it raises `MemoryError` in Python and `RuntimeError` in torch. Only Linux
    keeps to it.

    Args:
        mib: What the process holds already included, in MiB; None sets no limit.
    """
    if mib is None:
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = mib * KIB * KIB
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step, in this process from now on.

    By default glibc gives large blocks back to the kernel, and each step pays for fresh pages.

    Returns:
        Whether it will; only glibc does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all((mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_MMAP_MAX, 0)))


def release_memory() -> None:
    """Free what only cycles hold, and what torch's allocator for GPUs keeps for later."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def available_bytes(device: torch.device | str) -> int:
    """Return the free memory of a GPU, or of this machine within the limits of its control groups.

    Where the system does not tell what is free, all memory that it has.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = PROC / "meminfo"
    if meminfo.exists():
        return min([_kib(meminfo, "MemAvailable"), *_group_rooms()])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_room(what: str, needed: int, device: torch.device | str) -> None:
    """Refuse what would take more memory than there is, before any of it is taken.

    Args:
        what: The keys of the config that ask for it, and for what.
        needed: Bytes.
        device: Where.

    Raises:
        InputError: If fewer bytes are free.
    """
    free = available_bytes(device)
    if needed > free:
        raise InputError(f"{what} would take {needed:,} bytes of memory, {free:,} are free")


def peak_bytes(run: Callable[[], object], device: torch.device | str) -> int:
    """Return the most memory that `run` holds at any time, beyond what is held before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _release_freed_memory()
    try:
        (PROC / "self/clear_refs").write_text("5")  # lowers VmHWM, the peak, to VmRSS
    except OSError:
        return _sampled_peak_bytes(run)
    before = _kib(PROC / "self/status", "VmRSS")
    run()
    return max(0, _kib(PROC / "self/status", "VmHWM") - before)


def largest_batch(measure: Callable[[int], int], available: int, wanted: int) -> int:
    """Return the largest batch up to `wanted` that fits into memory; 0 if not even one image does.

    The peak is taken to be linear in the batch, some bytes and some more per image; two small
    batches tell both. A fifth of what is available stays free.

    Args:
        measure: Batch -> peak bytes of a step.
        available: Bytes.
        wanted: Images.
    """
    try:
        first = min(TINY_BATCH, wanted)
        at_first = measure(first)
        if wanted == first and at_first <= (1 - MARGIN) * available:
            return wanted
        # n times the batch needs at most n times the memory, so these fit too.
        affordable = first * (available // max(1, at_first))
        second = next((b for b in SMALL_BATCHES if b <= min(affordable, wanted)), 1)
        if first == second:
            return 0
        per_image = max(1.0, (measure(second) - at_first) / (second - first))
    except (MemoryError, torch.OutOfMemoryError):
        return 0
    room = (1 - MARGIN) * available - (at_first - first * per_image)
    return min(wanted, max(0, int(room / per_image)))


def _group_rooms() -> Iterator[int]:
    """Yield the bytes below each memory limit that holds for this process."""
    table = PROC / "self/cgroup"
    for line in table.read_text().splitlines() if table.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = CGROUPS / "memory" if controllers else CGROUPS
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    yield from _rooms_in(group)


def _rooms_in(group: Path) -> Iterator[int]:
    for limit, used in LIMITS.items():
        # Neither file is there in the root of version 2, nor where a container hides its path.
        if (group / limit).exists() and (group / used).exists():
            text = (group / limit).read_text().strip()
            if text != "max":
                yield max(0, int(text) - int((group / used).read_text()) + _cached(group))


def _cached(group: Path) -> int:
    """Return the bytes of files that count as used but make room when memory is asked for."""
    stat = group / "memory.stat"
    lines = stat.read_text().splitlines() if stat.exists() else ()
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _kib(path: Path, key: str) -> int:
    """Return the value of a line such as `VmHWM:  1234 kB`, in bytes."""
    lines = path.read_text().splitlines()
    return next(KIB * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _release_freed_memory() -> None:
    """Give what is free back to the system, so that using it again counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sampled_peak_bytes(run: Callable[[], object]) -> int:
    """Look at the resident memory again and again while `run` runs."""
    before = peak = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(POLL_S):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(peak, _resident_bytes()) - before


def _resident_bytes() -> int:
    """Return what this process holds; where the system has no /proc, the most that it ever held."""
    statm = PROC / "self/statm"
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else KIB
    )
