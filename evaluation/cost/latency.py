"""Measured milliseconds of any `nn.Module`.

What is timed, stated here once: the forward pass of one image (batch 1) in evaluation mode, under
`torch.inference_mode`, float32 and channels_last, with the input already on the device. Every pass
is timed by itself, and the figure is the median over the passes.

On a GPU the wall clock is read, and the device is waited for before and after each pass, so that
launching the kernels is part of it. On a CPU with one thread the clock is that of the thread: it
stands still while another process has the core, and on an idle machine it agrees with the wall
clock. With more threads it is the wall clock.

An ONNX file is timed by `paretoblocks_latency.py` beside this file, here or on another device; what
that wrote there is read by `DeviceLatencies`.
"""

import copy
import math
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.cost.kind import Axis, CostKind
from evaluation.cost.paretoblocks_latency import FORMAT, LatencyError, time_file
from evaluation.errors import InputError, not_installed
from evaluation.files.atomic import read_json

BATCH = 1
MIN_TOTAL_S = 0.02  # a module of 10 us is timed 2000 times, so that its median is no accident
MS_PER_S = 1000.0
NAMES_SHOWN = 3

LATENCY = CostKind(  # a search measures it with its `LatencyTable`
    "latency_ms", "ms", Axis("latency", "latency, ms", "~r"), exact=False, whole=False
)


def device_name(device: str) -> str:
    """Return what computes there, in words for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median and interquartile range over the timed passes."""

    median_ms: float
    spread_ms: float

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read an entry of a latency JSON.

        Raises:
            ValueError: If it has another form, or numbers that no measurement gives.
        """
        try:
            latency = cls(float(data["median_ms"]), float(data["spread_ms"]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a latency: {str(data)[:200]}") from error
        if not (0 < latency.median_ms < math.inf and 0 <= latency.spread_ms < math.inf):
            raise ValueError(f"expected milliseconds above 0, got {str(data)[:200]}")
        return latency


@dataclass(frozen=True)
class DeviceLatencies:
    """What `paretoblocks-latency` measured on a device: its JSON, read and checked.

    Attributes:
        path: The file.
        facts: On what and how it was measured: device, runtime, threads, batch.
        files: Name of a file, as its metadata has it, to its latency.
    """

    path: Path
    facts: Mapping[str, str | int]
    files: Mapping[str, Latency]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a latency JSON.

        Raises:
            InputError: If it is missing, damaged or of another format; the message names it.
        """
        data = read_json(path, listed=False)  # from another device
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise InputError(f"{path}: expected a JSON of format {FORMAT!r}, got {found!r}")
        try:
            words = {name: str(data[name]) for name in ("device", "runtime")}
            counts = {name: int(data[name]) for name in ("threads", "batch")}
            files = {str(name): Latency.from_json(one) for name, one in data["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: damaged latency JSON: {error!r}") from error
        if not files:
            raise InputError(f"{path}: damaged latency JSON: it has no file")
        return cls(path, {**words, **counts}, files)

    @property
    def device(self) -> str:
        """Device, runtime, threads and batch, in words."""
        threads = self.facts["threads"]
        plural = "" if threads == 1 else "s"
        return (
            f"{self.facts['device']}, {self.facts['runtime']}, {threads} thread{plural}, "
            f"batch {self.facts['batch']}"
        )

    def of(self, names: Collection[str], what: str) -> dict[str, float]:
        """Return the median milliseconds of each name.

        Args:
            names: Whose latency is wanted.
            what: What they are, for the message: `the members of this front`.

        Raises:
            InputError: If one was not measured: the JSON is one for other files.
        """
        missing = [name for name in names if name not in self.files]
        if missing:
            raise InputError(
                f"{self.path}: a latency JSON for other files: of {what} it lacks {len(missing)} "
                f"of {len(names)}, {_some(missing)}; it has {_some(self.files)}"
            )
        return {name: self.files[name].median_ms for name in names}


def measure_onnx_ms(path: Path, threads: int = 1) -> Latency:
    """Time an ONNX file in ONNX Runtime on this CPU, at batch 1.

    Raises:
        InputError: If the file cannot be timed, or the extra `onnx` is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise not_installed("onnx", "latency in ONNX Runtime") from error
    del onnxruntime
    try:
        return Latency.from_json(time_file(path, threads))
    except LatencyError as error:
        raise InputError(str(error)) from error


def measure_ms(
    module: nn.Module,
    *input_shapes: tuple[int, ...],
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 5,
    min_total_s: float = MIN_TOTAL_S,
) -> Latency:
    """Time the forward pass of a module for batch 1, as the head of this file says.

    Passes go on until there are `repeats` of them and they have taken `min_total_s` together.

    Args:
        module: Any module, timed as a copy on its own device: it is not changed.
        input_shapes: Shape without the batch axis of each positional input, e.g. (3, 32, 32).
        threads: Of PyTorch's operations on a CPU; the number there was is restored.
        repeats: Least number of timed passes, at least 1.
        warmup: Passes before them, which are not timed.
        min_total_s: Least time of all timed passes together.

    Raises:
        ValueError: If `repeats` or `threads` is less than 1.
    """
    if min(repeats, threads) < 1:
        raise ValueError(f"repeats and threads must be at least 1, got {repeats} and {threads}")
    timed = copy.deepcopy(module).eval().to(memory_format=torch.channels_last)
    device = next(timed.parameters(), torch.empty(0)).device
    inputs = [_input(shape, device) for shape in input_shapes]
    clock = clock_of(device, threads)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for _ in range(warmup):
                timed(*inputs)
            seconds: list[float] = []
            total_s = 0.0
            while len(seconds) < repeats or total_s < min_total_s:
                seconds.append(_time_s(timed, inputs, device, clock))
                total_s += seconds[-1]
    finally:
        torch.set_num_threads(threads_before)
    low, median, high = (MS_PER_S * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
    return Latency(median, high - low)


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Return the clock, in seconds, that is read on a device with so many threads."""
    ticks_are_fine = sys.platform != "win32"  # the threads' clock of Windows ticks every 16 ms
    lone = device.type == "cpu" and threads == 1
    return time.thread_time if lone and ticks_are_fine else time.perf_counter


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _input(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # Not zeros: some CPUs compute faster, or with denormals slower, than on real images.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(BATCH, *shape, generator=generator).to(device)
    return drawn.contiguous(memory_format=torch.channels_last) if drawn.dim() == 4 else drawn


def _time_s(
    module: nn.Module, inputs: list[Tensor], device: torch.device, clock: Callable[[], float]
) -> float:
    _wait(device)
    began = clock()
    module(*inputs)
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
