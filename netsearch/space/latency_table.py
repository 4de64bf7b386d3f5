"""The latency of a network as a sum over its parts, each measured once: an additive model.

A network takes the milliseconds of its stem, of its cells and of its classifier, one after the
other; `evaluation/cost/latency.py` says how they are timed. Such a table is a usual way to put a
device's latency into a search, for one in FBNet (Wu et al., 2019,
https://arxiv.org/abs/1812.03443), where its entries are ops. Ours are cells.

`export_parts` writes the parts as ONNX files, to be timed on another device by
`evaluation/cost/paretoblocks_latency.py`; `LatencyTable.from_device` reads what was measured there.

Two approximations. A cell reads the two cells before it; it is measured with inputs of its own
width, since otherwise the table had an entry for every pair of neighbours. And parts measured one
by one do not share caches nor, on a GPU, hide the launch of one behind the work of another.

Cells of 1-bit weights are timed as PyTorch runs them, in float32: no faster for being 1-bit.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from blocksearch.space import Cell
from blocksearch.supernet.stack import Place, PlacedCell, Stack, _build_cell
from evaluation.cost.device_latency import DeviceLatencies
from evaluation.cost.latency import BATCH, device_name, measure_ms
from evaluation.cost.paretoblocks_latency import NAME_KEY
from evaluation.deploy.onnx_files import save_onnx
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.parsing import Positive, parsed
from evaluation.training.loop import seeded_model
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.networks import Networks

ROUNDS = 3  # through all parts; the least counts, since other processes only ever add time
ROUND_WARMUP, ROUND_REPEATS, ROUND_MIN_S = 2, 7, 0.007

STEM = "stem"
EMPTY = "empty"  # an ONNX file of no work: what a run costs by itself
MIN_SHARE = 0.1  # that stays of a part's time without that: its noise must not make it negative

Genome = tuple[int, ...]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """What the table has an entry for: a module that can be built, and shapes of its inputs."""

    build: Callable[[], nn.Module]
    input_shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds, for one image, of every part that the networks of a space are made of.

    Attributes:
        parts_ms: Name of a part, as `parts` gives it, to its milliseconds.
        image_shape: (C, H, W).
        classes: Number of classes.
        facts: On what it was measured: device, threads, batch, and torch or another runtime.
    """

    parts_ms: Mapping[str, Positive]
    image_shape: Shape
    classes: int
    facts: Mapping[str, str | int]

    @classmethod
    def measure(
        cls,
        networks: Networks,
        device: str,
        *,
        threads: int = 1,
    ) -> Self:
        """Measure every part that a network of the space can have.

        There are three rounds through all parts, and an entry is the least of its three medians:
        other processes only ever add time, and seldom to the same part in every round.

        Args:
            networks: Those whose parts are measured.
            device: `cpu` or `cuda`.
            threads: Of PyTorch's operations on a CPU.
        """
        needed = all_parts(networks)
        parts_ms = dict.fromkeys(needed, math.inf)
        for _, (name, part) in itertools.product(range(ROUNDS), needed.items()):
            module = seeded_model(part.build, 0, device)
            timed = measure_ms(
                module,
                *part.input_shapes,
                threads=threads,
                repeats=ROUND_REPEATS,
                warmup=ROUND_WARMUP,
                min_total_s=ROUND_MIN_S,
            )
            parts_ms[name] = min(parts_ms[name], timed.median_ms)
        facts: dict[str, str | int] = {
            "device": device_name(device),
            "threads": threads,
            "batch": BATCH,
            "torch": str(torch.__version__),
        }
        return cls(parts_ms, networks.image_shape, networks.classes, facts)

    @classmethod
    def from_device(
        cls,
        latencies: DeviceLatencies,
        networks: Networks,
    ) -> Self:
        """Take every part that a network of the space can have from what a device measured.

        Each run of a file has a fixed cost, that of the file `empty`, which a network pays once and
        its parts once each. It is taken off all parts but the stem, of which a network has one.

        Raises:
            InputError: If a part was not measured there.
        """
        needed = all_parts(networks)
        what = "the parts of these networks (paretoblocks export DIR --parts writes them)"
        measured = latencies.of([EMPTY, *needed], what)
        fixed_ms = measured.pop(EMPTY)
        parts_ms = {
            name: ms if name.startswith(STEM) else max(ms - fixed_ms, MIN_SHARE * ms)
            for name, ms in measured.items()
        }
        facts = {**latencies.facts, "file": str(latencies.path)}
        return cls(parts_ms, networks.image_shape, networks.classes, facts)

    @property
    def source(self) -> Path | None:
        """The latency JSON that it is from; None if it was measured here."""
        return Path(str(self.facts["file"])) if "file" in self.facts else None

    def covers(self, networks: Networks) -> bool:
        """Tell whether it has every part that one of these networks can have."""
        theirs = networks.image_shape, networks.classes
        same_images = (self.image_shape, self.classes) == theirs
        return same_images and all_parts(networks).keys() <= set(self.parts_ms)

    def of(self, stack: Stack) -> float:
        """Return the milliseconds of a network: the sum over its parts.

        Raises:
            InputError: If a part of it is not in the table, or its images are others.
        """
        if (stack.image_shape, stack.classes) != (self.image_shape, self.classes):
            raise InputError(
                f"the latency table is for images {self.image_shape} of {self.classes} classes, "
                f"got a network for {stack.image_shape} and {stack.classes}"
            )
        names = [name for name, _ in parts(stack)]
        missing = next((name for name in names if name not in self.parts_ms), None)
        if missing is not None:
            raise InputError(
                f"the latency table has no {missing!r}: it was measured for other blocks or widths"
            )
        return math.fsum(self.parts_ms[name] for name in names)

    def extreme_genomes(self, networks: Networks) -> tuple[Genome, Genome]:
        """Return a genome of the least latency of these networks, and one of the largest.

        Exact: what a stage takes does not depend on the other stages, so each is settled by itself,
        over all its widths and blocks. A wider cell is not always a slower one.
        """
        space = networks.space

        def latency_ms(genome: Genome) -> float:
            return self.of(networks.stack(genome))

        def settle(depth: int, sign: int) -> Genome:
            s = space.stages
            best: Genome = (depth,) * s + (0,) * (len(space.upper) - s)
            for stage in range(s):
                genes = [s + stage, 2 * s + stage, *([3 * s + stage - 1] if stage else [])]
                choices = itertools.product(*(range(int(space.upper[g]) + 1) for g in genes))
                options = [dict(zip(genes, choice, strict=True)) for choice in choices]
                genomes = [
                    tuple(option.get(g, value) for g, value in enumerate(best))
                    for option in options
                ]
                best = min(genomes, key=lambda genome: sign * latency_ms(genome))
            return best

        return settle(0, 1), settle(len(space.depths) - 1, -1)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form.
        """
        table = parsed(cls, data, "a latency table")
        if not table.parts_ms:
            raise ValueError("not a latency table: it has no part")
        return table

    def save(self, folder: RunFolder) -> None:
        """Write `latency.json` into a run's folder, so that a resumed run has these numbers."""
        folder.write_json(folder.latency.name, self.to_json())

    @classmethod
    def load(cls, folder: RunFolder) -> Self:
        """Read that of a run.

        Raises:
            InputError: If the file is missing or damaged; the message names it.
        """
        return folder.load(folder.latency.name, cls.from_json)


def parts(stack: Stack) -> Iterator[tuple[str, Part]]:
    """Yield name and part of the stem, of each cell in turn, and of the classifier.

    Parts of one name are taken to be equally fast: the name of a cell says its structure, width C,
    resolution, and whether the cell before it halved that, but not the width of its inputs.
    """
    channels, *side = stack.image_shape
    stem = f"{STEM} {channels}->{stack.stem_channels} at {side[0]}x{side[1]}"
    yield stem, Part(partial(_stem, stack), (stack.image_shape,))
    for one, place in zip(stack.cells, stack.places(), strict=True):
        own = replace(place, in_channels=(place.out_channels, place.out_channels))
        shapes = tuple((place.out_channels, *side) for side in place.sides)
        yield _cell_name(one, place), Part(partial(_build_cell, one.cell, own), shapes)
    height, width = place.out_side
    end = f"classifier {place.out_channels}->{stack.classes} at {height}x{width}"
    yield end, Part(partial(_end, stack), ((place.out_channels, height, width),))


def all_parts(networks: Networks) -> dict[str, Part]:
    """Return every part, by name, that one of these networks can have."""
    return dict(part for stack in _uniform_stacks(networks) for part in parts(stack))


def export_parts(
    networks: Networks,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write every part, and one of no work, as ONNX files; those that are there already stay.

    Args:
        networks: Those whose parts are written.
        folder: Where the files go; made if it is not there.
        say: Called with a line about each file before it is written.

    Returns:
        Number of files.

    Raises:
        InputError: If the extra `onnx` is not installed, or an operator does not export.
    """
    needed = {
        EMPTY: Part(nn.Identity, ((1, 1, 1),)),
        **all_parts(networks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, part) in enumerate(needed.items(), start=1):
        path = folder / part_file(name)
        if path.exists():
            continue
        say(f"part {number} of {len(needed)}: {name}")
        shapes = enumerate(part.input_shapes)
        inputs = {f"input_{index}": torch.zeros(BATCH, *shape) for index, shape in shapes}
        module = seeded_model(part.build, 0, "cpu")
        save_onnx(module, inputs, path, {NAME_KEY: name}, output="output")
    return len(needed)


def part_file(name: str) -> str:
    """Return the file name of a part: safe everywhere, and no two parts have the same."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.onnx"


def _cell_name(one: PlacedCell, place: Place) -> str:
    structure = "residual" if one.cell is None else _cell_id(one.cell)
    kind = "reduction" if one.reduction else "normal"
    halving = " after a reduction" if place.halve_first else ""
    height, width = place.sides[1]
    return f"{kind} {structure} C={one.channels} at {height}x{width}{halving}"


@lru_cache(maxsize=10_000)
def _cell_id(cell: Cell) -> str:
    return cell.id


def _stem(stack: Stack) -> nn.Module:
    return replace(stack, cells=stack.cells[:1])().stem


def _end(stack: Stack) -> nn.Module:
    """Return the network without stem and cells: it maps the last cell's output to logits."""
    network = replace(stack, cells=stack.cells[-1:])()
    network.stem, network.cells = nn.Sequential(), nn.ModuleList()
    return network


def _uniform_stacks(networks: Networks) -> Iterator[Stack]:
    """Yield networks of one width and block each, which together have every part of the space."""
    space = networks.space
    repeats = min(2, space.depths[-1])  # the first cell after a reduction differs from the others
    for channels, number in itertools.product(
        space.widths, range(max(len(space.normal), len(space.reduction)))
    ):
        stage = Stage(space.normal[number % len(space.normal)], repeats, channels)
        reduction = space.reduction[number % len(space.reduction)]
        spec = NetworkSpec((stage,) * space.stages, (reduction,) * (space.stages - 1))
        yield networks.of(spec)
