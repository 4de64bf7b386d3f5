"""Variation of genomes: reset mutation, uniform crossover, one-gene neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as PymooProblem

from netsearch.searches.protocol import SearchConfig
from netsearch.space.genome import Genome
from netsearch.space.problem import Problem

Genomes = NDArray[np.int64]

LAST_DRAWS = 1000


class RandomReset(Mutation):  # type: ignore[misc]
    """Gives each gene, with probability `prob_var`, a new uniform value other than its own.

    Block genes are categories, so a creeping mutation such as rounded polynomial mutation, which
    leaves most small integers where they are, would hardly explore them.
    """

    def _do(
        self, problem: PymooProblem, X: Genomes, *args: Any, random_state: Any = None, **kwargs: Any
    ) -> Genomes:
        top = np.broadcast_to(problem.xu, X.shape).astype(np.int64)
        return reset(X, top, self.prob_var.get(), random_state)


def reset(
    genomes: Genomes, upper: Genomes, probability: float, generator: np.random.Generator
) -> Genomes:
    """Return genomes (N, G) whose genes have, with `probability`, another value of 0 to `upper`."""
    top = np.broadcast_to(upper, genomes.shape)
    step = generator.integers(1, np.maximum(top, 1) + 1)
    hit = generator.random(genomes.shape) < probability
    changed: Genomes = np.where(hit & (top > 0), (genomes + step) % (top + 1), genomes)
    return changed


@dataclass(frozen=True)
class Variation:
    """Where new genomes come from.

    Attributes:
        upper: Largest value of each gene, (G,).
        crossover: Probability that a child has genes of two parents, each gene of either.
        mutation: Probability of another value, per gene.
        generator: Of all chance.
    """

    upper: Genomes
    crossover: float
    mutation: float
    generator: np.random.Generator

    @classmethod
    def of(cls, problem: Problem, config: SearchConfig, generator: np.random.Generator) -> Self:
        """Return what a config asks for; without a mutation rate, one gene changes on average."""
        upper = problem.genes.upper
        return cls(upper, config.crossover, config.mutation or 1.0 / len(upper), generator)

    def children(self, parents: Sequence[Genome], count: int) -> list[Genome]:
        """Return `count` genomes: of two parents, or of one, drawn uniformly, then mutated."""
        pool, generator = np.array(parents), self.generator
        first, second = pool[generator.integers(0, len(pool), (2, count))]
        crossed = generator.random((count, 1)) < self.crossover
        of_second = crossed & (generator.random(first.shape) < 0.5)
        mixed = np.where(of_second, second, first)
        return _genomes(reset(mixed, self.upper, self.mutation, generator))

    def anywhere(self, count: int = LAST_DRAWS) -> list[Genome]:
        """Return `count` uniform genomes, for when those nearby are known."""
        return _genomes(self.generator.integers(0, self.upper + 1, (count, len(self.upper))))


def _genomes(rows: Genomes) -> list[Genome]:
    return [tuple(row) for row in rows.tolist()]


def neighbours(genome: Genome, upper: Genomes) -> list[Genome]:
    """Return all genomes that differ from this one in exactly one gene."""
    return [
        (*genome[:gene], value, *genome[gene + 1 :])
        for gene, top in enumerate(upper.tolist())
        for value in range(top + 1)
        if value != genome[gene]
    ]
