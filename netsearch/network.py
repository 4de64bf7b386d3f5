"""NetworkSpec + cells -> `nn.Module`, and its exact cost without building it whole."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocksearch.cells import DiscreteCell
from blocksearch.ops import op_cost
from blocksearch.space import NORMAL, REDUCTION, Cell, Edge, SearchSpace
from blocksearch.supernet import STEM_MULTIPLIER
from evaluation.cost import measure_cost
from evaluation.records import Cost
from netsearch.genome import GenomeSpace, NetworkSpec

Side = tuple[int, int]


@dataclass(frozen=True)
class CellPlace:
    """One cell in its place in a network: what its module is built from."""

    cell: Cell
    in_channels: tuple[int, int]
    channels: int
    reduction: bool
    halve_first: bool
    sides: tuple[Side, Side]  # resolution of the older and the newer input

    def build(self) -> DiscreteCell:
        """Return the module."""
        return DiscreteCell(
            self.cell,
            self.in_channels,
            self.channels,
            reduction=self.reduction,
            halve_first=self.halve_first,
        )

    @property
    def out_channels(self) -> int:
        """Channels that the cell hands on."""
        return len(self.cell.nodes) * self.channels

    @property
    def out_side(self) -> Side:
        """Resolution that the cell hands on."""
        height, width = self.sides[1]
        return ((height + 1) // 2, (width + 1) // 2) if self.reduction else (height, width)


def places(spec: NetworkSpec, cells: Mapping[str, Cell], image_side: Side) -> Iterator[CellPlace]:
    """Yield the cells of a network in order, each with its widths and resolution."""
    stem = STEM_MULTIPLIER * spec.stages[0].channels
    in_channels, sides, after_reduction = (stem, stem), (image_side, image_side), False
    for reduction, stage in zip((None, *spec.reductions), spec.stages, strict=True):
        normal = [(stage.block, False)] * stage.repeats
        for name, reduces in normal if reduction is None else [(reduction, True), *normal]:
            place = CellPlace(
                cells[name], in_channels, stage.channels, reduces, after_reduction, sides
            )
            yield place
            in_channels = (in_channels[1], place.out_channels)
            sides = (sides[1], place.out_side)
            after_reduction = reduces


class Network(nn.Module):
    """Stem, cells, global average pooling, linear classifier."""

    def __init__(
        self,
        spec: NetworkSpec,
        cells: Mapping[str, Cell],
        image_shape: tuple[int, int, int],
        classes: int,
    ):
        """Build the network that `spec` describes from the cells that it names."""
        super().__init__()
        self.stem = _stem(image_shape[0], spec)
        order = list(places(spec, cells, image_shape[1:]))
        self.cells = nn.ModuleList(place.build() for place in order)
        self.classifier = nn.Linear(order[-1].out_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W)."""
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        logits: Tensor = self.classifier(s1.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class NetworkBuilder:
    """Builds one network with fresh weights; small and picklable, so it goes to workers."""

    spec: NetworkSpec
    cells: tuple[tuple[str, Cell], ...]
    image_shape: tuple[int, int, int]
    classes: int

    def __call__(self) -> Network:
        """Return the network, its weights drawn from torch's global generator."""
        return Network(self.spec, dict(self.cells), self.image_shape, self.classes)


def builder(
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> NetworkBuilder:
    """Return a builder that carries only the cells that the network uses."""
    used = tuple((name, cells[name]) for name in spec.blocks)
    return NetworkBuilder(spec, used, image_shape, classes)


def predict_cost(
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> Cost:
    """Return the exact cost of a network from the cached costs of its parts."""
    stem = STEM_MULTIPLIER * spec.stages[0].channels
    total = _stem_cost(image_shape, stem)
    last = 0
    for place in places(spec, cells, image_shape[1:]):
        total = total + _place_cost(place)
        last = place.out_channels
    return total + Cost(params=(last + 1) * classes, flops=last * classes)


def extreme_genomes(
    space: GenomeSpace,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
    count: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a genome with the least `count` (`params` or `flops`) of the space, and the largest.

    Costs grow with every depth and width, so the extremes stand at the ends of those genes; a block
    changes no count outside itself, so its gene is settled by itself.
    """

    def settle(start: Sequence[int], better: Callable[[Iterable[int]], int]) -> tuple[int, ...]:
        best = []
        for gene, top in enumerate(space.upper):
            values = range(int(top) + 1) if gene >= ends else [start[gene]]
            costs = [cost([*start[:gene], value, *start[gene + 1 :]]) for value in values]
            best.append(values[costs.index(better(costs))])
        return tuple(best)

    def cost(genome: Sequence[int]) -> int:
        return predict_cost(space.decode(genome), cells, image_shape, classes).count(count)

    ends = 2 * space.stages
    high = [int(top) if gene < ends else 0 for gene, top in enumerate(space.upper)]
    return settle([0] * len(high), min), settle(high, max)


def extreme_costs(
    space: GenomeSpace,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> tuple[Cost, Cost]:
    """Return the least and the largest params and FLOPs that a network of the space has.

    The two counts of one answer may belong to two networks.
    """

    def ends(count: str) -> tuple[int, int]:
        least, largest = extreme_genomes(space, cells, image_shape, classes, count)
        costs = [
            predict_cost(space.decode(g), cells, image_shape, classes) for g in (least, largest)
        ]
        return costs[0].count(count), costs[1].count(count)

    params, flops = ends("params"), ends("flops")
    return Cost(params[0], flops[0]), Cost(params[1], flops[1])


def least_cells(space: SearchSpace, count: str) -> dict[str, Cell]:
    """Return a normal and a reduction cell than which none of the space has fewer `count`.

    Args:
        space: The search space of the cells.
        count: `params` or `flops`.
    """

    def cheapest(stride: int) -> tuple[int, str]:
        # Strided or not, an op's output has the same size here: all edges lead to the nodes.
        side = (8 * stride, 8 * stride)
        costs = {op: op_cost(op, STEM_MULTIPLIER * 8, stride, side) for op in space.ops}
        return min((cost.count(count), op) for op, cost in costs.items() if op != "none")

    cells = {}
    for kind, stride in ((NORMAL, 1), (REDUCTION, 2)):
        from_input, from_node = cheapest(stride), cheapest(1)
        first = Edge(0, from_input[1])
        inner = first if from_input <= from_node else Edge(space.inputs, from_node[1])
        cells[kind] = Cell(((first,), *[(inner,)] * (space.nodes - 1)), space.inputs)
    return cells


def _stem(in_channels: int, spec: NetworkSpec) -> nn.Sequential:
    stem = STEM_MULTIPLIER * spec.stages[0].channels
    return nn.Sequential(
        nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
    )


def _stem_cost(image_shape: tuple[int, int, int], stem: int) -> Cost:
    weights = image_shape[0] * stem * 9
    return Cost(params=weights + 2 * stem, flops=weights * image_shape[1] * image_shape[2])


@functools.lru_cache(maxsize=100_000)
def _place_cost(place: CellPlace) -> Cost:
    with torch.device("meta"):
        module = place.build()
    shapes = [(c, *side) for c, side in zip(place.in_channels, place.sides, strict=True)]
    return measure_cost(module, *shapes)
