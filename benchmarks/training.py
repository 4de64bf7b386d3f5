"""How fast networks train: the textbook loop against `evaluation.training.loop`, on this machine.

`python benchmarks/training.py [--device cpu|cuda] [--networks NAME ...] [--json]` trains on random
images of CIFAR-10's shape: DARTS_V2 (Liu, Simonyan, Yang 2019, https://arxiv.org/abs/1806.09055),
three fixed stacks of random light cells, and a ResNet-8. Each side lives in a process of its own,
since the production side changes how its process keeps memory; they take turns, step by step. A
step is all from the images in memory to the updated weights. The textbook trains DARTS_V2 as in its
paper, the others as their PyTorch modules, all in PyTorch's default layout. The floor is what
the step's multiply-adds would take at the rate of one large convolution, timed between the turns.
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from blocksearch.kernels import compiled  # noqa: E402
from blocksearch.ops import LIGHT_OPS  # noqa: E402
from blocksearch.space import Cell, SearchSpace  # noqa: E402
from evaluation.cost.counts import measure_cost  # noqa: E402
from evaluation.data.batches import batches  # noqa: E402
from evaluation.data.config import AugmentConfig  # noqa: E402
from evaluation.data.dataset import Split  # noqa: E402
from evaluation.training.cuda_graphs import CapturedStep, graphs_for  # noqa: E402
from evaluation.training.loop import (  # noqa: E402
    TrainConfig,
    WeightUpdate,
    seeded_model,
)
from evaluation.workers.memory import keep_freed_memory  # noqa: E402
from netsearch.space.genome import NetworkSpec, Stage  # noqa: E402
from netsearch.space.network import builder  # noqa: E402
from published import DARTS_V2, ResNet  # noqa: E402

IMAGE, CLASSES, IMAGES = (3, 32, 32), 10, 5000
EPOCH_IMAGES = 50_000
WARM_UP_STEPS = 5
AUGMENT = AugmentConfig(pad_px=4, flip=True, cutout_px=16)
RECIPE = TrainConfig(
    epochs=600,
    batch_size=96,
    learning_rate=0.025,
    momentum=0.9,
    weight_decay=3e-4,
    label_smoothing=0.0,
    grad_clip=5.0,
    warmup=0.0,
)


@dataclass(frozen=True)
class Light:
    """A fixed stack of random light cells: two or three nodes, one cell of its own a stage."""

    nodes: int
    seed: int
    width: int
    depths: tuple[int, int, int]


LIGHT = {
    "light-1M": Light(2, 5, 4, (1, 1, 1)),
    "light-5M": Light(3, 1, 8, (1, 1, 1)),
    "light-12M": Light(3, 1, 12, (1, 2, 1)),
}
RESNET8, DARTS = "ResNet-8", "DARTS_V2"
NETWORKS = (RESNET8, *LIGHT, DARTS)


@dataclass(frozen=True)
class Task:
    """What both sides train, and where; the first two say how large a DARTS_V2 is."""

    channels: int
    cells: int
    batch: int
    device: str
    threads: int
    network: str = DARTS


def production_network(task: Task) -> nn.Module:
    """Return the network as stage two builds it."""
    if task.network == RESNET8:
        return ResNet(1, 16, IMAGE, CLASSES)()
    if task.network in LIGHT:
        light = LIGHT[task.network]
        space, generator = SearchSpace(LIGHT_OPS, nodes=light.nodes), random.Random(light.seed)
        cells = {name: space.random_cell(generator) for name in ("a", "b", "c", "r1", "r2")}
        parts = zip("abc", light.depths, strict=True)
        stages = [Stage(name, depth, light.width * 2**k) for k, (name, depth) in enumerate(parts)]
        return builder(NetworkSpec(tuple(stages), ("r1", "r2")), cells, IMAGE, CLASSES)()
    depth = (task.cells - 2) // 3
    stages = [Stage("normal", depth, task.channels * 2**i) for i in range(3)]
    return builder(NetworkSpec(tuple(stages), ("reduction",) * 2), DARTS_V2, IMAGE, CLASSES)()


def production(task: Task) -> Iterator[None]:
    """Train as `evaluation.training.loop.train` does; yield after every step."""
    keep_freed_memory()
    split = random_split().to(task.device)
    model = seeded_model(lambda: production_network(task), 0, task.device).train()
    update = WeightUpdate(model, RECIPE)
    step = CapturedStep(update, graphs_for(task.device))
    generator, losses = torch.Generator().manual_seed(0), []
    while True:
        for images, labels in batches(split, task.batch, generator, AUGMENT):
            update.rate.fill_(RECIPE.learning_rate)
            losses.append(step(images, labels)["loss"])
            yield


class TextbookCell(nn.Module):
    """A cell as the paper defines it, in PyTorch's default layout."""

    def __init__(self, cell: Cell, in_channels, channels, reduction, halve_first):
        super().__init__()
        halving = factorized_reduce if halve_first else relu_conv_bn
        self.first = halving(in_channels[0], channels)
        self.second = relu_conv_bn(in_channels[1], channels)
        self.sources = [[edge.source for edge in node] for node in cell.nodes]
        self.ops = nn.ModuleList(
            nn.ModuleList(
                textbook_op(edge.op, channels, 2 if reduction and edge.source < 2 else 1)
                for edge in node
            )
            for node in cell.nodes
        )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Concatenate the nodes."""
        states = [self.first(s0), self.second(s1)]
        for ops, sources in zip(self.ops, self.sources, strict=True):
            states.append(sum(op(states[i]) for op, i in zip(ops, sources, strict=True)))
        return torch.cat(states[2:], dim=1)


class TextbookNetwork(nn.Module):
    """The network as the paper defines it: cells L/3 and 2L/3 halve the resolution."""

    def __init__(self, task: Task):
        super().__init__()
        width = task.channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, 3 * width, 3, padding=1, bias=False), nn.BatchNorm2d(3 * width)
        )
        self.cells, last, halved = nn.ModuleList(), (3 * width, 3 * width), False
        for i in range(task.cells):
            reduction = i in (task.cells // 3, 2 * task.cells // 3)
            width *= 2 if reduction else 1
            cell = DARTS_V2["reduction" if reduction else "normal"]
            self.cells.append(TextbookCell(cell, last, width, reduction, halved))
            last, halved = (last[1], 4 * width), reduction
        self.classifier = nn.Linear(last[1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(s1.mean(dim=(2, 3)))


class FactorizedReduce(nn.Module):
    """Halve the resolution by two 1x1 convolutions with stride 2, one shifted by a pixel."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.even, self.odd = (
            nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map an even side to its half."""
        return torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1)


def factorized_reduce(in_channels: int, channels: int) -> nn.Module:
    """Bring a state to half of its resolution and another width."""
    return nn.Sequential(
        nn.ReLU(), FactorizedReduce(in_channels, channels), nn.BatchNorm2d(channels)
    )


def relu_conv_bn(in_channels: int, channels: int) -> nn.Module:
    """Bring a state to another width."""
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
    )


def separable(channels: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    """Return one unit of a separable convolution."""
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    ]


def textbook_op(name: str, channels: int, stride: int) -> nn.Module:
    """Return an op of the genotype above."""
    skip = nn.Identity() if stride == 1 else factorized_reduce(channels, channels)
    return {
        "sep_conv_3x3": nn.Sequential(*separable(channels, stride), *separable(channels, 1)),
        "dil_conv_3x3": nn.Sequential(*separable(channels, stride, dilation=2)),
        "skip_connect": skip,
        "max_pool_3x3": nn.MaxPool2d(3, stride, padding=1),
    }[name]


def textbook_batches(split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches in the host's memory, made image by image."""
    side, pad, hole = IMAGE[1], AUGMENT.pad_px, AUGMENT.cutout_px
    for chosen in torch.randperm(len(split)).split(batch):
        images = []
        for image in split.images[chosen]:
            top, left = torch.randint(2 * pad + 1, (2,)).tolist()
            image = nn.functional.pad(image, [pad] * 4)[:, top : top + side, left : left + side]
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            image = (image / 255 - split.mean[:, None, None]) / split.std[:, None, None]
            row, column = (torch.randint(side, (2,)) - hole // 2).clamp(min=0).tolist()
            image[:, row : row + hole, column : column + hole] = 0.0
            images.append(image)
        yield torch.stack(images), split.labels[chosen]


def textbook(task: Task) -> Iterator[None]:
    """Train as scripts of papers do; yield after every step."""
    split = random_split()
    network = TextbookNetwork(task) if task.network == DARTS else production_network(task)
    model = network.to(task.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        RECIPE.learning_rate,
        momentum=RECIPE.momentum,
        weight_decay=RECIPE.weight_decay,
        nesterov=True,
        foreach=False,
    )
    criterion, losses = nn.CrossEntropyLoss(), []
    while True:
        for images, labels in textbook_batches(split, task.batch):
            images, labels = images.to(task.device), labels.to(task.device)
            optimizer.zero_grad()
            with compiled.plain_path():
                loss = criterion(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE.grad_clip, foreach=False)
            optimizer.step()
            losses.append(loss.item())
            yield


def random_split() -> Split:
    """Return as many images as need no augmented one twice in a short measurement."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *IMAGE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return Split(images, labels, torch.full((3,), 0.5), torch.full((3,), 0.25))


SIDES = {"textbook": textbook, "production": production}


def serve(connection: Connection, side: str, task: Task) -> None:
    """Do a step for every message and answer with its seconds; at the end with the peak in MiB."""
    torch.set_num_threads(task.threads)
    steps = SIDES[side](task)
    while connection.recv():
        began = time.perf_counter()
        next(steps)
        wait(task.device)
        connection.send(time.perf_counter() - began)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    on_gpu = task.device == "cuda"
    connection.send(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident)


def wait(device: str) -> None:
    """Wait until the device has done all that it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


class Side:
    """A process that trains one side."""

    def __init__(self, name: str, task: Task):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, task), daemon=True)
        self.process.start()
        other.close()  # so that a side that died is an EOFError here, and no endless wait

    def ask(self, go_on: bool = True) -> float:
        """Have a step done and return its seconds, or end the process and return its peak."""
        self.connection.send(go_on)
        answer: float = self.connection.recv()
        return answer


def convolution_rate(device: str) -> float:
    """Return the floating-point operations per second of a 3x3 convolution, 64 to 64 channels."""
    batch, side = (512, 32) if device == "cuda" else (32, 32)
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False, device=device)
    layer = layer.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 64, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.no_grad():
        for _ in range(8):
            began = time.perf_counter()
            layer(images)
            wait(device)
            seconds.append(time.perf_counter() - began)
    return 2 * 64 * 64 * 9 * side * side * batch / statistics.median(seconds[2:])


def measure(task: Task, rounds: int) -> dict[str, object]:
    """Let the two sides take turns, and return the figures."""
    torch.set_num_threads(task.threads)
    keep_freed_memory()
    cost = measure_cost(production_network(task), IMAGE)
    if task.network == DARTS and measure_cost(TextbookNetwork(task), IMAGE) != cost:
        raise RuntimeError("the two sides do not train the same network")
    sides = {name: Side(name, task) for name in SIDES}
    for side in sides.values():
        for _ in range(WARM_UP_STEPS):
            side.ask()
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    rates = []
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.ask())
        rates.append(convolution_rate(task.device))
    peaks = {name: side.ask(go_on=False) for name, side in sides.items()}
    ratios = [old / new for old, new in zip(*seconds.values(), strict=True)]
    rate = statistics.median(rates)
    flops = 3 * 2 * cost.flops * task.batch  # backward takes twice the forward
    production_s = statistics.median(seconds["production"])
    on_gpu = task.device == "cuda"
    size = f" C={task.channels} L={task.cells}" if task.network == DARTS else ""
    return {
        "network": f"{task.network}{size}, batch {task.batch}",
        "multiply_adds": cost.flops,
        "params": cost.params,
        "n": rounds,
        "textbook_s": statistics.median(seconds["textbook"]),
        "textbook_std_s": statistics.stdev(seconds["textbook"]),
        "production_s": production_s,
        "production_std_s": statistics.stdev(seconds["production"]),
        "ratio": statistics.median(ratios),
        "ratio_std": statistics.stdev(ratios),
        "epoch_s": production_s * (EPOCH_IMAGES // task.batch),
        "flops_per_step": flops,
        "gflops": flops / production_s / 1e9,
        "rate_gflops": rate / 1e9,
        "floor_s": flops / rate,
        "distance_to_floor": production_s * rate / flops,
        "peak_memory_mib": peaks["production"],
        "textbook_peak_memory_mib": peaks["textbook"],
        "threads": task.threads,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def main() -> None:
    """Print the figures, one a line, or as a JSON object a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print a JSON object a network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="compute threads on the CPU")
    parser.add_argument("--channels", type=int, help="of DARTS_V2: 16 on a CPU, 18 on a GPU")
    parser.add_argument("--cells", type=int, help="of DARTS_V2: 8 on a CPU, 20 on a GPU; 2 + 3 n")
    parser.add_argument("--batch", type=int, default=RECIPE.batch_size)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: expected 2 or more")
    channels, cells = (18, 20) if args.device == "cuda" else (16, 8)
    size = args.channels or channels, args.cells or cells
    resnet8 = None
    for network in args.networks:
        figures = measure(Task(*size, args.batch, args.device, args.threads, network), args.rounds)
        resnet8 = figures["gflops"] if network == RESNET8 else resnet8
        figures["gflops_resnet8"] = resnet8  # of the same run
        if args.json:
            print(json.dumps(figures), flush=True)
            continue
        for name, value in figures.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(flush=True)


if __name__ == "__main__":
    main()
