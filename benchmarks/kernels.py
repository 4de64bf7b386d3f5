"""Which way to the supernet's hot loop: PyTorch, torch.compile, numba, or compiled C.

`python benchmarks/kernels.py` times forward and backward of one op (ReLU, depthwise, pointwise,
BatchNorm; batch 16, one thread) in PyTorch's default layout, in channels_last, under torch.compile
and on our kernels; and, where numba is installed, the forward loop alone: ours, and one in numba,
written as plain loops whose sizes are constants for its compiler. Medians of 15 rounds in turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from blocksearch.kernels import compiled  # noqa: E402
from blocksearch.kernels.found import found_cell  # noqa: E402
from blocksearch.kernels.steps import plan_of  # noqa: E402
from blocksearch.ops import build_op  # noqa: E402

SIZES = ((16, 32), (32, 16), (64, 8))  # channels and side of the three stages
OPS = {"dws_conv_3x3": (3, 1), "dws_conv_5x5": (5, 1), "dil_conv_5x5": (5, 2)}
BATCH, ROUNDS = 16, 15


def passes(name: str, channels: int, side: int) -> dict[str, Callable[[], object]]:
    """Return forward and backward of one op, by the way it is computed."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, channels, side, side, generator=g)
    last = x.contiguous(memory_format=torch.channels_last)
    op = build_op(name, channels, 1, searching=True)
    plan = plan_of(op, channels, channels)

    def run(compute: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> None:
        images = images.clone().requires_grad_()
        y = compute(images)
        torch.autograd.grad(y, [images, *op.parameters()], images.detach())

    torch.compiler.reset()
    compiled = torch.compile(op)
    return {
        "PyTorch": lambda: run(op, x),
        "channels_last": lambda: run(op, last),
        "torch.compile": lambda: run(compiled, last),
        "kernels": lambda: run(lambda images: found_cell(plan, [images]), last),
    }


def medians(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(3):
            way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def numba_ms(kernel: int, dilation: int, channels: int, side: int) -> float:
    """Return the milliseconds of BATCH images in numba: depthwise and pointwise, forward only."""
    import numba

    pad = dilation * (kernel - 1)
    x = np.random.default_rng(0).random((side + pad, side + pad, channels), dtype=np.float32)
    dw, pw = np.ones((kernel * kernel, channels), "f"), np.ones((channels, channels), "f")
    row, z = np.zeros((side, channels), "f"), np.zeros((side, side, channels), "f")

    @numba.njit(fastmath=True)
    def forward(x, dw, pw, row, z):  # type: ignore[no-untyped-def]
        for y in range(side):
            for i in range(side):
                for c in range(channels):
                    total = np.float32(0)
                    for u in range(kernel):
                        for v in range(kernel):
                            pixel = x[y + u * dilation, i + v * dilation, c]
                            total += pixel * dw[u * kernel + v, c]
                    row[i, c] = total
            for i in range(side):
                for c in range(channels):
                    total = np.float32(0)
                    for k in range(channels):
                        total += row[i, k] * pw[k, c]
                    z[y, i, c] = total

    return BATCH * medians({"numba": lambda: forward(x, dw, pw, row, z)})["numba"]


def kernels_ms(name: str, channels: int, side: int) -> float:
    """Return the milliseconds of the same on our kernels, with ReLU and BatchNorm."""
    plan = plan_of(build_op(name, channels, 1, searching=True), channels, channels)
    x = torch.randn(BATCH, channels, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return medians({"": lambda: found_cell(plan, [x])})[""]


def main() -> None:
    """Print a table in milliseconds."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, kernels: {compiled.fits(torch.empty(1, 16, 1, 1))}")
    for channels, side in SIZES:
        for name, (kernel, dilation) in OPS.items():
            found = medians(passes(name, channels, side))
            found["kernels' loop"] = kernels_ms(name, channels, side)
            if find_spec("numba"):
                found["numba's loop"] = numba_ms(kernel, dilation, channels, side)
            figures = ", ".join(f"{way} {ms:.2f}" for way, ms in found.items())
            print(f"C={channels} {side}x{side} {name}: {figures} ms", flush=True)


if __name__ == "__main__":
    main()
