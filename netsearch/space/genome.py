"""NetworkSpec and Stage; the integer genome and its map to a spec and back; bounds."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from blocksearch.space import Cell
from evaluation.parsing import Size, parsed

Genome = tuple[int, ...]
Floats = NDArray[np.float64]

SIZES, KINDS = "sizes", "kinds"  # genes whose choices ascend; genes whose choices have no order
SMALLEST_SIDE_PX = 8  # resolution halves until it is at most this
MIN_STAGES = 2


def stages_for(image_side: tuple[int, int]) -> int:
    """Return the number of resolution stages: 32 px -> 3 (32, 16, 8), 8 px -> 2 (8, 4).

    The resolution halves until the shorter side is at most 8 pixels; there are at least two stages.
    """
    side, stages = min(image_side), 1
    while side > SMALLEST_SIDE_PX or stages < MIN_STAGES:
        side, stages = (side + 1) // 2, stages + 1
    return stages


@dataclass(frozen=True)
class Stage:
    """A run of equal blocks at one resolution; `channels` is the width C of each."""

    block: str
    repeats: Size
    channels: Size


@dataclass(frozen=True)
class NetworkSpec:
    """The network that one genome describes: before every stage but the first a reduction block.

    Blocks are named; their cells stand in the block library.
    """

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    reductions: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the number of reductions.

        Raises:
            ValueError: If it is not one less than that of the stages.
        """
        if len(self.reductions) != len(self.stages) - 1:
            raise ValueError(f"expected a reduction between each two stages, got {self}")

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks used, each once, normal blocks first."""
        return tuple(dict.fromkeys([stage.block for stage in self.stages] + [*self.reductions]))

    def id(self, cells: Mapping[str, Cell]) -> str:
        """Hash of the network's structure; it does not depend on the names of the blocks."""
        structure = [
            [[cells[s.block].id, s.repeats, s.channels] for s in self.stages],
            [cells[name].id for name in self.reductions],
        ]
        return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:10]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form, or a size below 1.
        """
        return parsed(cls, data, "a network")


@dataclass(frozen=True)
class Genes:
    """The genes of a space: each an index into a list of choices, from 0.

    Attributes:
        upper: Largest value of each gene, (G,).
        groups: (`SIZES` or `KINDS`, number of genes) in turn; the genes of a group share their
            list of choices.
    """

    upper: NDArray[np.int64]
    groups: tuple[tuple[str, int], ...]

    @cached_property
    def sizes(self) -> NDArray[np.bool_]:
        """Mark the genes whose choices ascend, (G,)."""
        return np.array([kind == SIZES for kind, count in self.groups for _ in range(count)])

    def random_of_size(self, size: float, generator: np.random.Generator) -> Genome:
        """Draw a genome whose sizes lie about `size` of the way up their choices.

        Each size is binomial, so 0 gives the least, 1 the largest; the others are uniform. Uniform
        genes seldom meet: a network that is small, or large, in all of them hardly comes up.
        """
        drawn = np.where(
            self.sizes,
            generator.binomial(self.upper, size),
            generator.integers(0, self.upper + 1),
        )
        return tuple(drawn.tolist())

    def features(self, genomes: NDArray[np.int64]) -> Floats:
        """Return what a regression sees of genomes (N, G), about 0 to 2 each, (N, D).

        A size as its share of the way up, one of the kinds as a unit vector; and for every group
        how many of its genes have each value, since genes of a group often act alike.
        """
        columns, first = [], 0
        for kind, count in self.groups:
            group = genomes[:, first : first + count]
            top = int(self.upper[first : first + count].max())
            values = np.eye(top + 1)[group]  # (N, genes, choices)
            single = group / max(top, 1) if kind == SIZES else values.reshape(len(group), -1)
            columns += [single, 2.0 * values.mean(axis=1)]
            first += count
        return np.hstack(columns)


def descended(start: Genome, upper: Sequence[int], cost: Callable[[Genome], float]) -> Genome:
    """Return where a descent from a genome ends: gene by gene the best value, until none is better.

    Args:
        start: Where it begins.
        upper: Largest value of each gene.
        cost: Of a genome; smaller is better.
    """
    best, before = start, None
    while best != before:
        before = best
        for gene, top in enumerate(upper):
            others = [(*best[:gene], value, *best[gene + 1 :]) for value in range(top + 1)]
            best = min([best, *others], key=cost)
    return best


@dataclass(frozen=True)
class GenomeSpace:
    """All networks that stage two may choose from.

    A genome holds, for S stages, S depth genes, S width genes, S normal-block genes and S - 1
    reduction-block genes; each gene is an index into its list of choices.

    Attributes:
        stages: Number of resolution stages S.
        depths: Choices for the number of blocks in a stage, ascending.
        widths: Choices for the width C of a stage, ascending.
        normal: Names of the normal blocks.
        reduction: Names of the reduction blocks.
    """

    stages: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    normal: tuple[str, ...]
    reduction: tuple[str, ...]

    @property
    def choices(self) -> tuple[Sequence[int | str], ...]:
        """The list that each gene indexes, G of them."""
        s = self.stages
        return (
            *[self.depths] * s,
            *[self.widths] * s,
            *[self.normal] * s,
            *[self.reduction] * (s - 1),
        )

    @property
    def size(self) -> int:
        """Number of networks."""
        return int(np.prod([len(choice) for choice in self.choices], dtype=object))

    @property
    def upper(self) -> NDArray[np.int64]:
        """Largest value of each gene, (G,); the smallest is 0."""
        return np.array([len(choice) - 1 for choice in self.choices])

    def decode(self, genome: Sequence[int]) -> NetworkSpec:
        """Return the network of a genome.

        Raises:
            ValueError: If the genome has another length or a gene is out of bounds.
        """
        upper = self.upper
        if len(genome) != len(upper):
            raise ValueError(f"a genome has {len(upper)} genes, got {len(genome)}")
        if any(not 0 <= gene <= top for gene, top in zip(genome, upper, strict=True)):
            raise ValueError(f"genes must lie in 0..{upper.tolist()}, got {list(genome)}")
        s = self.stages
        stages = tuple(
            Stage(
                block=self.normal[genome[2 * s + i]],
                repeats=self.depths[genome[i]],
                channels=self.widths[genome[s + i]],
            )
            for i in range(s)
        )
        return NetworkSpec(stages, tuple(self.reduction[gene] for gene in genome[3 * s :]))

    def encode(self, spec: NetworkSpec) -> tuple[int, ...]:
        """Return the genome of a network of this space.

        Raises:
            ValueError: If the network is not in the space.
        """
        return (
            *[self.depths.index(stage.repeats) for stage in spec.stages],
            *[self.widths.index(stage.channels) for stage in spec.stages],
            *[self.normal.index(stage.block) for stage in spec.stages],
            *[self.reduction.index(name) for name in spec.reductions],
        )

    @cached_property
    def genes(self) -> Genes:
        """Depths and widths are sizes, blocks are kinds."""
        s = self.stages
        return Genes(self.upper, ((SIZES, s), (SIZES, s), (KINDS, s), (KINDS, s - 1)))

    def random(self, generator: np.random.Generator) -> Genome:
        """Draw a genome uniformly."""
        return tuple(int(gene) for gene in generator.integers(0, self.upper + 1))
