"""NetworkSpec + cells -> `nn.Module`, and its exact cost without building it whole."""

from collections.abc import Callable, Mapping

from blocksearch.ops import op_cost
from blocksearch.space import NORMAL, REDUCTION, Cell, Edge, SearchSpace
from blocksearch.supernet.stack import STEM_MULTIPLIER, CellNetwork, PlacedCell, Stack
from evaluation.records import Cost
from netsearch.space.genome import GenomeSpace, NetworkSpec, descended


class Network(CellNetwork):
    """The network that a spec describes, with fresh weights."""

    def __init__(
        self,
        spec: NetworkSpec,
        cells: Mapping[str, Cell],
        image_shape: tuple[int, int, int],
        classes: int,
    ):
        """Build it from the cells that it names."""
        super().__init__(builder(spec, cells, image_shape, classes))


def builder(
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> Stack:
    """Return the stack of cells of a network: small, picklable, and it builds the network."""
    placed: list[PlacedCell] = []
    for reduction, stage in zip((None, *spec.reductions), spec.stages, strict=True):
        if reduction is not None:
            placed.append(PlacedCell(cells[reduction], stage.channels, reduction=True))
        normal = PlacedCell(cells[stage.block], stage.channels, reduction=False)
        placed += [normal] * stage.repeats
    return Stack(tuple(placed), image_shape, classes)


def predict_cost(
    spec: NetworkSpec,
    cells: Mapping[str, Cell],
    image_shape: tuple[int, int, int],
    classes: int,
) -> Cost:
    """Return the exact cost of a network from the cached costs of its parts."""
    return builder(spec, cells, image_shape, classes).cost()


def extreme_genomes(
    space: GenomeSpace, cost: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a genome of the least cost of the space, and one of the largest.

    Costs grow with every depth and width, so the extremes stand at the ends of those genes. A block
    settles its own gene; where cells hand on different numbers of nodes it also changes the count
    of its successors a little, so the genes are gone through until none changes any more.

    Args:
        space: The networks.
        cost: Of a genome, one of its counts.
    """

    def settle(start: tuple[int, ...], sign: int) -> tuple[int, ...]:
        best, before = start, None
        while best != before:
            before = best
            for gene in range(2 * space.stages, len(start)):
                others = [
                    (*best[:gene], value, *best[gene + 1 :])
                    for value in range(int(space.upper[gene]) + 1)
                ]
                best = min([best, *others], key=lambda genome: sign * cost(genome))
        return best

    sizes, kinds = 2 * space.stages, len(space.upper) - 2 * space.stages
    largest = (*(int(top) for top in space.upper[:sizes]), *[0] * kinds)
    return settle((0,) * len(largest), 1), settle(largest, -1)


def descended_genomes(
    space: GenomeSpace, cost: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a genome of the least cost of the space, and one of the largest, as far as found.

    For a cost of which nothing is known: a peak need not grow with the depth, and one of two equal
    peaks hides what the other would gain. The smallest and the largest networks of each block alone
    are the starts; from each, gene by gene, the best value is taken until none is better.

    Args:
        space: The networks.
        cost: Of a genome.
    """
    sizes, upper = 2 * space.stages, [int(top) for top in space.upper]

    def settle(sign: int) -> tuple[int, ...]:
        ends = [0] * sizes if sign > 0 else upper[:sizes]
        starts = {
            (*ends, *(min(block, top) for top in upper[sizes:]))
            for block in range(1 + max(upper[sizes:]))
        }

        def signed(genome: tuple[int, ...]) -> float:
            return sign * cost(genome)

        return min((descended(start, upper, signed) for start in sorted(starts)), key=signed)

    return settle(1), settle(-1)


def least_cells(space: SearchSpace, count: str) -> dict[str, Cell]:
    """Return a normal and a reduction cell than which none of the space has fewer `count`.

    Args:
        space: The search space of the cells.
        count: `params` or `flops`.
    """

    def cheapest(stride: int) -> tuple[float, str]:
        # Strided or not, an op's output has the same size here: all edges lead to the nodes.
        side = (8 * stride, 8 * stride)
        costs = {
            op: op_cost(op, STEM_MULTIPLIER * 8, stride, side, own=space.own) for op in space.ops
        }
        return min((cost.count(count), op) for op, cost in costs.items() if op != "none")

    # A node without edges hands nothing on, so that one edge alone is the least.
    return {
        kind: space.cell([(Edge(0, cheapest(stride)[1]),), *[()] * (space.nodes - 1)])
        for kind, stride in ((NORMAL, 1), (REDUCTION, 2))
    }
