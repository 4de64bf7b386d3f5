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
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from evaluation.cost.device_latency import Timing
from evaluation.cost.paretoblocks_latency import LatencyError, time_file
from evaluation.errors import InputError, not_installed
from evaluation.parsing import parsed

BATCH = 1
MIN_TOTAL_S = 0.02  # a module of 10 us is timed 2000 times, so that its median is no accident
MS_PER_S = 1000.0


def device_name(device: str) -> str:
    """Return what computes there, in words for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def machine_name(device: str) -> str:
    """Return what computes there, with the number of cores where it is a CPU."""
    cores = "" if device == "cuda" else f", {joblib.cpu_count()} cores"
    return f"{device_name(device)}{cores}"


def measure_onnx_ms(path: Path, threads: int = 1) -> Timing:
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
        return parsed(Timing, time_file(path, threads=threads), "a latency")
    except LatencyError as error:
        raise InputError(str(error)) from error


def measure_ms(
    module: nn.Module,
    *input_shapes: tuple[int, ...],
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 5,
    min_total_s: float = MIN_TOTAL_S,
) -> Timing:
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
    return Timing(median, high - low)


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Return the clock, in seconds, that is read on a device with so many threads."""
    ticks_are_fine = sys.platform != "win32"  # the threads' clock of Windows ticks every 16 ms
    lone = device.type == "cpu" and threads == 1
    return time.thread_time if lone and ticks_are_fine else time.perf_counter


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
