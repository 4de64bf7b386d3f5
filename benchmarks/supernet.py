"""The supernet's step against the textbook's, and how the step's time grows.

`python benchmarks/supernet.py [--device cpu|cuda] [--json]` times the first-order step of DARTS
(one step on the alphas, one on the weights) of two supernets with the same weights and inputs: the
textbook one of `tests/textbook.py` (eager, PyTorch's default layout, every gradient computed, as
published code does) and ours. They take turns in one process; a round's ratio is textbook over
ours, and the medians count. The floor is the step's FLOPs (convolutions and linear layers, two per
multiply-add, three forward passes for a forward and a backward one) over the rate of a large
convolution that is measured in the same run; it cannot be reached, since it leaves out all traffic
to memory. Peak memory is what a step adds, each measured in a process of its own.

`--growth FILE` instead times our step alone for growing cells, channels, ops and batch, prints the
slopes (1 is linear) and draws them.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from blocksearch.engine import SearchSetup, WeightConfig  # noqa: E402
from blocksearch.kernels import compiled  # noqa: E402
from blocksearch.ops import DARTS_OPS  # noqa: E402
from blocksearch.relaxation import Gates  # noqa: E402
from blocksearch.space import SearchSpace  # noqa: E402
from blocksearch.strategies.darts import Darts  # noqa: E402
from blocksearch.supernet.supernet import Supernet  # noqa: E402
from evaluation.training.cuda_graphs import CapturedStep, graphs_for  # noqa: E402
from evaluation.training.loop import Precision, uses_bfloat16  # noqa: E402
from evaluation.workers.memory import keep_freed_memory, peak_bytes  # noqa: E402
from textbook import TextbookSupernet  # noqa: E402

WEIGHTS = WeightConfig(
    learning_rate=0.025,
    learning_rate_end=0.001,
    momentum=0.9,
    weight_decay=3e-4,
    grad_clip=5.0,
)
SIDE_PX, CLASSES = 32, 10
Step = Callable[[], object]


def supernet(channels: int, cells: int, ops: tuple[str, ...] = DARTS_OPS) -> Supernet:
    """Return the DARTS supernet for 3x32x32 images, its weights drawn from seed 0."""
    torch.manual_seed(0)
    shape = (3, SIDE_PX, SIDE_PX)
    return Supernet(SearchSpace(ops), shape, CLASSES, channels=channels, cells=cells, stages=3)


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for the weights, then for the alphas."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        (
            torch.randn(batch, 3, SIDE_PX, SIDE_PX, generator=generator).to(device),
            torch.randint(CLASSES, (batch,), generator=generator).to(device),
        )
        for _ in range(2)
    ]
    return *draws[0], *draws[1]


def textbook_step(channels: int, cells: int, batch: int, device: str) -> Step:
    """Return the step as published code takes it."""
    net = TextbookSupernet(supernet(channels, cells)).to(device)
    space = net.space
    alphas = 1e-3 * torch.randn(2, len(space.edges), len(space.ops))
    alphas = alphas.to(device).requires_grad_()
    adam = torch.optim.Adam([alphas], lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    images, labels, valid_images, valid_labels = inputs(batch, device)

    def step() -> float:
        adam.zero_grad()
        gates = Gates(torch.softmax(alphas, dim=-1))
        nn.functional.cross_entropy(net(valid_images, gates), valid_labels).backward()
        adam.step()
        sgd.zero_grad()
        gates = Gates(torch.softmax(alphas, dim=-1))
        loss = nn.functional.cross_entropy(net(images, gates), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), WEIGHTS.grad_clip)
        sgd.step()
        return loss.item()

    return step


def production_step(
    channels: int,
    cells: int,
    batch: int,
    device: str,
    precision: Precision = "float32",
    ops: tuple[str, ...] = DARTS_OPS,
) -> CapturedStep:
    """Return the step of the `darts` strategy, as the engine runs it, on fixed images."""
    net = supernet(channels, cells, ops).to(device).to(memory_format=torch.channels_last)
    net.in_bfloat16 = uses_bfloat16(precision, torch.device(device))
    setup = SearchSetup(lambda form: net, WEIGHTS)
    strategy = Darts(setup, Darts.Config(), torch.Generator().manual_seed(0))
    strategy.schedule(0.0)
    given = [
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in inputs(batch, device)
    ]
    return CapturedStep(
        lambda: strategy.step((given[0], given[1]), (given[2], given[3])), graphs_for(device)
    )


def seconds(step: Step, device: str, repeats: int = 1) -> float:
    """Return the wall-clock seconds of one step."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return (time.perf_counter() - began) / repeats


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def flops_per_step(channels: int, cells: int, batch: int) -> int:
    """Return the FLOPs of a first-order step: two passes, forward and backward, with gradients."""
    with torch.device("meta"):
        net, images = supernet(channels, cells), torch.empty(batch, 3, SIDE_PX, SIDE_PX)
        gates = Gates(torch.empty(2, len(net.space.edges), len(net.space.ops)))
    with FlopCounterMode(display=False) as counter:
        net(images, gates)
    return 6 * counter.get_total_flops()


def rate(device: str) -> float:
    """Return the FLOPs a second of a 3x3 convolution of 64 channels, the best of twenty."""
    x = torch.randn(64, 64, 32, 32, device=device).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(64, 64, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad():
        repeats = 1 if device == "cpu" else 50
        best = min(seconds(lambda: conv(x), device, repeats) for _ in range(20))
    return 2 * 64 * 32 * 32 * 64 * 64 * 9 / best


def peak_mib(which: str, size: dict[str, Any]) -> float:
    """Return what a step adds to the memory, measured in a fresh process."""
    arguments = {"which": which, "threads": torch.get_num_threads(), **size}
    command = [sys.executable, __file__, "--peak-of", json.dumps(arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(which: str, threads: int, precision: Precision, **size: Any) -> None:
    """Print the peak of two steps in MiB; the answer to `peak_mib`."""
    torch.set_num_threads(threads)
    step: Step
    if which == "textbook":
        step = textbook_step(**size)
    else:
        step = production_step(**size, precision=precision)
    print(peak_bytes(lambda: (step(), step()), size["device"]) / 2**20)


def compare(
    channels: int, cells: int, batch: int, device: str, precision: Precision, rounds: int
) -> dict[str, Any]:
    """Time both steps in turns and return the figures."""
    size = {"channels": channels, "cells": cells, "batch": batch, "device": device}
    began = time.perf_counter()
    ours = production_step(**size, precision=precision)
    for _ in range(5):  # warm-up, and on a GPU the capture
        ours()
    wait(device)
    warm_up_s = time.perf_counter() - began
    capture_s = ours.capture_s
    textbook = textbook_step(**size)
    for _ in range(2):
        textbook()
    repeats = 1 if device == "cpu" else 10
    pairs = [
        (seconds(textbook, device, repeats), seconds(ours, device, repeats)) for _ in range(rounds)
    ]
    ratios = [a / b for a, b in pairs]
    textbook_s, production_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    del textbook, ours
    flops, flops_per_s = flops_per_step(channels, cells, batch), rate(device)
    size["precision"] = precision
    peaks = {which: peak_mib(which, size) for which in ("textbook", "production")}
    return {
        "textbook_s": textbook_s,
        "production_s": production_s,
        "ratio": textbook_s / production_s,
        "ratio_mean": statistics.fmean(ratios),
        "ratio_std": statistics.stdev(ratios) if rounds > 1 else 0.0,
        "rounds": rounds,
        "flops_per_step": flops,
        "flops_per_s_of_a_large_convolution": flops_per_s,
        "floor_s": flops / flops_per_s,
        "distance_to_floor": production_s * flops_per_s / flops,
        "peak_memory_mib": peaks["production"],
        "textbook_peak_memory_mib": peaks["textbook"],
        "images_per_s": 2 * batch / production_s,
        "epoch_of_25000_images_s": 25_000 / batch * production_s,
        "warm_up_s": warm_up_s,
        "capture_s": capture_s,
        "precision": precision,  # ours; the textbook and the rate are in float32
        "kernels": device == "cpu" and compiled.fits(torch.empty(1, channels, 1, 1)),
        "channels": channels,
        "cells": cells,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }


def profile_of(step: Step, device: str) -> str:
    """Return the table of where three steps spend their time."""
    for _ in range(5):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
        wait(device)
    return profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40)


def growth(picture: Path, device: str, repeats: int = 5) -> dict[str, float]:
    """Time our step along four axes, draw it, and return the slope of each in log-log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = {"channels": 16, "cells": 6, "batch": 16}
    single = ("dws_conv_3x3", "dil_conv_3x3", "dws_conv_5x5", "dil_conv_5x5")
    axes: dict[str, list[int]] = {
        "cells": [3, 6, 12, 24],
        "channels": [8, 16, 32, 64],
        "ops": [1, 2, 4],
        "batch": [4, 8, 16, 32, 64],
    }
    slopes = {}
    figure, plots = pyplot.subplots(1, len(axes), figsize=(14, 3.4), sharey=True)
    for plot, (name, values) in zip(plots, axes.items(), strict=True):
        times = []
        for value in values:
            size, ops = base | {name: value}, DARTS_OPS
            if name == "ops":  # of about equal cost
                ops = single[: size.pop("ops")]
            step = production_step(device=device, ops=ops, **size)
            for _ in range(2 if device == "cpu" else 5):
                step()
            times.append(statistics.median(seconds(step, device) for _ in range(repeats)))
        x, y = ([math.log(v) for v in series] for series in (values, times))
        slopes[name] = statistics.linear_regression(x, y).slope
        plot.loglog(values, times, "o-")
        plot.set_xlabel(name)
        plot.set_title(f"slope {slopes[name]:.2f}")
        plot.set_xticks(values, [str(v) for v in values])
        plot.set_xticks([], minor=True)
        plot.grid(True, alpha=0.3)
        print(name, [f"{v}: {t:.3f} s" for v, t in zip(values, times, strict=True)], flush=True)
    plots[0].set_ylabel("seconds of a step")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    return slopes


def main(
    device: str = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document, nothing else.")
    ] = False,
    channels: int = 16,
    cells: int = 8,
    batch: int = 16,
    rounds: int = 7,
    precision: Precision = "float32",
    profile: Annotated[Path | None, typer.Option(help="Where our step spends its time.")] = None,
    growth_picture: Annotated[Path | None, typer.Option("--growth")] = None,
    peak_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare the steps of the two supernets, or show how ours grows."""
    keep_freed_memory()
    if peak_of:
        print_peak(**json.loads(peak_of))
    elif growth_picture:
        slopes = growth(growth_picture, device)
        print(json.dumps({name: round(slope, 3) for name, slope in slopes.items()}))
    elif profile:
        step = production_step(channels, cells, batch, device, precision)
        profile.write_text(profile_of(step, device))
    else:
        figures = compare(channels, cells, batch, device, precision, rounds)
        if as_json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                print(f"{name:36} {value}")


if __name__ == "__main__":
    typer.run(main)
