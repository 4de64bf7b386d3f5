"""A stack of cells between a stem and a classifier: its layout, its module, its exact cost."""

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocksearch.ops import ResidualReduction
from blocksearch.space import Cell
from blocksearch.supernet.cells import DiscreteCell
from evaluation.cost.counts import measure_cost
from evaluation.cost.program import Chain, Program
from evaluation.cost.recorder import record
from evaluation.records import Cost

STEM_MULTIPLIER = 3  # as in DARTS: the stem has 3 C channels; C where cells are not concatenated

Side = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where a cell stands in a stack.

    Attributes:
        in_channels: Channels of the outputs of the two cells before it, the older first.
        channels: Width C of the cell.
        out_channels: Channels that it hands on.
        reduction: Whether it halves the resolution.
        halve_first: Whether the older input has twice the resolution of the newer one.
        sides: Resolution (H, W) of the older and the newer input.
    """

    in_channels: tuple[int, int]
    channels: int
    out_channels: int
    reduction: bool
    halve_first: bool
    sides: tuple[Side, Side]

    @property
    def out_side(self) -> Side:
        """Resolution that the cell hands on."""
        height, width = self.sides[1]
        return ((height + 1) // 2, (width + 1) // 2) if self.reduction else (height, width)


def layout(
    cells: Iterable[tuple[int, int, bool]], stem_channels: int, image_side: Side
) -> Iterator[Place]:
    """Yield where each cell stands.

    Args:
        cells: Width C, number of outputs, and whether it reduces, of each cell in turn.
        stem_channels: Channels of the stem.
        image_side: (H, W).
    """
    in_channels, sides = (stem_channels, stem_channels), (image_side, image_side)
    halve_first = False
    for channels, outputs, reduction in cells:
        place = Place(in_channels, channels, outputs * channels, reduction, halve_first, sides)
        yield place
        in_channels, sides = (in_channels[1], place.out_channels), (sides[1], place.out_side)
        halve_first = reduction


@dataclass(frozen=True)
class PlacedCell:
    """One cell of a stack: found cell, width, and whether it reduces; None is a residual block."""

    cell: Cell | None
    channels: int
    reduction: bool


@dataclass(frozen=True)
class Stack:
    """A network without weights: what its cells are. Calling it builds the network.

    Attributes:
        cells: From the stem to the classifier.
        image_shape: (C, H, W).
        classes: Number of classes.
    """

    cells: tuple[PlacedCell, ...]
    image_shape: tuple[int, int, int]
    classes: int

    def __call__(self) -> "CellNetwork":
        """Return the network, its weights drawn from torch's global generator."""
        return CellNetwork(self)

    @property
    def id(self) -> str:
        """Hash of all that decides the network."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:10]

    @property
    def is_summed(self) -> bool:
        """Whether the cells hand on a sum, as those of NAS-Bench-201, which no norm follows."""
        return any(one.cell is not None and one.cell.output == "last" for one in self.cells)

    @property
    def stem_channels(self) -> int:
        """Channels of the stem."""
        return (1 if self.is_summed else STEM_MULTIPLIER) * self.cells[0].channels

    def places(self) -> Iterator[Place]:
        """Yield where each cell stands."""
        cells = [
            (one.channels, 1 if one.cell is None else len(one.cell.outputs), one.reduction)
            for one in self.cells
        ]
        return layout(cells, self.stem_channels, self.image_shape[1:])

    def cost(self) -> Cost:
        """Return the exact cost of the network from the cached costs of its parts."""
        stem = self.stem_channels
        weights = self.image_shape[0] * stem * 9
        pixels = self.image_shape[1] * self.image_shape[2]
        total, last = Cost(params=weights + 2 * stem, flops=weights * pixels), 0
        for one, place in zip(self.cells, self.places(), strict=True):
            total, last = total + _cell_cost(one.cell, place), place.out_channels
        norm = 2 * last if self.is_summed else 0
        return total + Cost(params=(last + 1) * self.classes + norm, flops=last * self.classes)

    def program(self) -> Program:
        """Return the ops of the network in their order, from the cached programs of its parts."""
        chain, first = Chain(math.prod(self.image_shape)), self.cells[0]
        s0 = s1 = chain.append(_stem_program(first, self.image_shape), (0,))
        for one, place in zip(self.cells, self.places(), strict=True):
            s0, s1 = s1, chain.append(_cell_program(one.cell, place), (s0, s1))
        shape = place.out_channels, *place.out_side
        end = _end_program(self.cells[-1], shape, self.classes)
        return chain.finish(chain.append(end, (s1,)))


class CellNetwork(nn.Module):
    """Stem, cells, global average pooling, linear classifier."""

    def __init__(self, stack: Stack):
        """Build the network that `stack` describes."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(stack.image_shape[0], stack.stem_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(stack.stem_channels),
        )
        places = list(stack.places())
        pairs = zip(stack.cells, places, strict=True)
        self.cells = nn.ModuleList(_build_cell(one.cell, place) for one, place in pairs)
        last = places[-1].out_channels
        self.head = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU()) if stack.is_summed else None
        self.classifier = nn.Linear(last, stack.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        if self.head is not None:
            s1 = self.head(s1)
        logits: Tensor = self.classifier(s1.mean(dim=(2, 3)))
        return logits


def _build_cell(cell: Cell | None, place: Place) -> nn.Module:
    if cell is None:
        return ResidualReduction(place.in_channels[1], place.channels, searching=False)
    return DiscreteCell(
        cell,
        place.in_channels,
        place.channels,
        reduction=place.reduction,
        halve_first=place.halve_first,
    )


@functools.lru_cache(maxsize=100_000)
def _cell_cost(cell: Cell | None, place: Place) -> Cost:
    with torch.device("meta"):
        module = _build_cell(cell, place)
    shapes = [(c, *side) for c, side in zip(place.in_channels, place.sides, strict=True)]
    return measure_cost(module, *shapes)


@functools.lru_cache(maxsize=100_000)
def _cell_program(cell: Cell | None, place: Place) -> Program:
    with torch.device("meta"):
        module = _build_cell(cell, place).eval()
    shapes = [(c, *side) for c, side in zip(place.in_channels, place.sides, strict=True)]
    return record(module, *shapes)


@functools.lru_cache(maxsize=10_000)
def _stem_program(first: PlacedCell, image_shape: tuple[int, int, int]) -> Program:
    with torch.device("meta"):
        network = Stack((first,), image_shape, 2)().eval()
    return record(network.stem, image_shape)


@functools.lru_cache(maxsize=10_000)
def _end_program(last: PlacedCell, shape: tuple[int, int, int], classes: int) -> Program:
    with torch.device("meta"):
        network = Stack((last,), shape, classes)().eval()
    network.stem, network.cells = nn.Sequential(), nn.ModuleList()
    return record(network, shape)
