"""What a network search knows before it evaluates: genes, exact costs, what is allowed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from blocksearch.supernet.stack import Stack
from evaluation.cost.costs import checked_cost, cost_of, known_kinds
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.kind import CostKind
from evaluation.cost.sizes import BITS, FLOPS, PARAMS
from evaluation.errors import InputError
from evaluation.pareto.front import Budgets
from evaluation.records import Cost
from netsearch.space.genome import Floats, Genes, Genome, GenomeSpace
from netsearch.space.latency_table import LatencyTable
from netsearch.space.network import descended_genomes, extreme_genomes
from netsearch.space.networks import Networks

TRIES_PER_SAMPLE = 200
GROWING = (PARAMS.name, FLOPS.name, BITS.name)  # with every depth and width, for certain


class Problem(Protocol):
    """A space of networks whose costs are known at once and whose errors must be evaluated."""

    @property
    def genes(self) -> Genes:
        """The genes of its genomes."""

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """Least value of each cost that is minimised, and the largest that counts, (M - 1,)."""

    def costs(self, genomes: Sequence[Genome]) -> Floats:
        """Return the costs to minimise beside the error, exact, (N, M - 1)."""

    def excess(self, genomes: Sequence[Genome]) -> Floats:
        """Return by how much genomes are over a hard budget, 0 for those allowed, (N,)."""

    def id(self, genome: Genome) -> str:
        """Return what equal networks have in common."""

    def cheapest(self) -> list[Genome]:
        """Return for each cost a genome than which none has less of it."""

    def features(self, genomes: Sequence[Genome]) -> Floats:
        """Return what a regression of the error sees, (N, D)."""


@dataclass(frozen=True)
class OwnCost:
    """A user's own cost in a search.

    Attributes:
        kind: The cost.
        minimised: Whether it is minimised beside the error.
        limit: The hard budget; None is none.
    """

    kind: CostKind
    minimised: bool = True
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check the limit.

        Raises:
            InputError: If it is not positive, or nothing is asked for.
        """
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise InputError(f"expected a positive budget on {self.kind.name}, got {self.limit}")
        if not self.minimised and self.limit is None:
            raise InputError(f"{self.kind.name}: expected to be minimised or to have a budget")


@dataclass(frozen=True)
class NetworkProblem:
    """Networks to search among.

    Attributes:
        networks: They.
        budgets: Hard budgets.
        cost_names: The costs to minimise, names of `COSTS` or of `own`.
        latency: Milliseconds of the cells, where latency is a cost or has a budget.
        own: A user's own costs.
    """

    networks: Networks
    budgets: Budgets
    cost_names: tuple[str, ...] = ("params",)
    latency: LatencyTable | None = None
    own: tuple[CostKind, ...] = ()
    _ids: dict[Genome, str] = field(default_factory=dict)
    _costs: dict[Genome, Cost] = field(default_factory=dict)
    _extreme: dict[str, tuple[Genome, Genome]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that each cost that is minimised or has a budget can be known.

        Raises:
            InputError: If there is no such cost, or it must be measured and was not.
        """
        for kind in self.asked:
            if kind.measure is None:
                raise InputError(
                    f"{kind.name} is not exact but measured, and no measurement of it is given: "
                    "it can neither be minimised nor have a budget"
                )

    @cached_property
    def kinds(self) -> dict[str, CostKind]:
        """Every cost that there is, by name; latency as the table has it."""
        kinds = known_kinds(self.own)
        if self.latency is not None:
            kinds[LATENCY.name] = replace(LATENCY, measure=self.latency.of)
        return kinds

    @cached_property
    def asked(self) -> tuple[CostKind, ...]:
        """The costs that are minimised or have a budget; latency wherever there is a table."""
        names = [*self.cost_names, *self.budgets.of_costs()]
        names += [LATENCY.name] if self.latency is not None else []
        kinds = self.kinds
        return tuple(kinds[checked_cost(name, kinds)] for name in dict.fromkeys(names))

    @property
    def space(self) -> GenomeSpace:
        """Where the genomes live."""
        return self.networks.space

    @property
    def genes(self) -> Genes:
        """Those of the space."""
        return self.space.genes

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """Least and largest of each cost in the space, or the hard budget instead."""
        least, largest = self._ends(self.cost_names)
        limits = self.budgets.of_costs()
        tops = [limits.get(name, top) for name, top in zip(self.cost_names, largest, strict=True)]
        return least, np.array(tops, dtype=float)

    def stack(self, genome: Genome) -> Stack:
        """Return the network of a genome, without weights."""
        return self.networks.stack(genome)

    def cost(self, genome: Genome) -> Cost:
        """Return the counts of a genome's network, and the other costs that are asked for.

        Raises:
            InputError: If a cost has no value, or is 0 and minimised: its axis is logarithmic.
        """
        if genome not in self._costs:
            cost = cost_of(self.stack(genome), self.asked)
            zero = [name for name in self.cost_names if cost.count(name) <= 0]
            if zero:
                raise InputError(
                    f"{', '.join(zero)} of network {self.id(genome)}: a cost that is minimised "
                    "must be above 0, got 0"
                )
            self._costs[genome] = cost
        return self._costs[genome]

    def costs(self, genomes: Sequence[Genome]) -> Floats:
        """Return the costs to minimise beside the error, exact, (N, M - 1)."""
        rows = [[self.cost(genome).count(name) for name in self.cost_names] for genome in genomes]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.cost_names))

    def excess(self, genomes: Sequence[Genome]) -> Floats:
        """Return the largest relative excess over a hard budget, 0 for genomes allowed, (N,)."""
        return np.array([self.budgets.cost_excess(self.cost(genome)) for genome in genomes])

    def id(self, genome: Genome) -> str:
        """Return the id of a genome's network."""
        if genome not in self._ids:
            self._ids[genome] = self.networks.id(genome)
        return self._ids[genome]

    def cheapest(self) -> list[Genome]:
        """Return for each cost a genome than which none has less of it."""
        return [self._extremes(name)[0] for name in self.cost_names]

    def features(self, genomes: Sequence[Genome]) -> Floats:
        """Return those of the genes, and the logarithms of all counts between their bounds."""
        names = tuple(dict.fromkeys((PARAMS.name, FLOPS.name, *self.cost_names)))
        counts = [[self.cost(genome).count(name) for name in names] for genome in genomes]
        low, high = np.log(self._ends(names))
        scaled = (np.log(counts) - low) / np.maximum(high - low, 1e-12)
        return np.hstack([self.genes.features(np.array(genomes)), scaled])

    def _ends(self, names: tuple[str, ...]) -> tuple[Floats, Floats]:
        """Return the least and the largest of each count, (names,)."""
        least, largest = np.array([self.extremes(name) for name in names], dtype=float).T
        return least, largest

    def extremes(self, name: str) -> tuple[float, float]:
        """Return the least and the largest value that a cost has in the space."""
        least, largest = self._extremes(name)
        return self.cost(least).count(name), self.cost(largest).count(name)

    def _extremes(self, name: str) -> tuple[Genome, Genome]:
        if name not in self._extreme:

            def count(genome: Genome) -> float:
                return self.cost(genome).count(name)

            if name == LATENCY.name and self.latency is not None:
                found = self.latency.extreme_genomes(self.networks)
            elif name in GROWING:
                found = extreme_genomes(self.space, count)
            else:
                found = descended_genomes(self.space, count)
            self._extreme[name] = found
        return self._extreme[name]


def sample_sizes(
    problem: Problem, count: int, generator: np.random.Generator
) -> tuple[list[Genome], list[Genome]]:
    """Draw genomes spread from small networks to large ones.

    The cheapest of the space by each cost come first: one end of the front, known beforehand.

    Returns:
        Genomes of at most `count` distinct networks within the hard budgets, and of some over them.
    """
    chosen: dict[str, Genome] = {}
    over: dict[str, Genome] = {}

    def sort_in(genome: Genome) -> None:
        allowed = problem.excess([genome])[0] <= 0
        (chosen if allowed else over).setdefault(problem.id(genome), genome)

    for genome in problem.cheapest()[:count]:
        sort_in(genome)
    over.clear()
    drawn = max(count - len(chosen), 1)
    for attempt in range(count * TRIES_PER_SAMPLE):
        if len(chosen) == count:
            break
        sort_in(problem.genes.random_of_size(attempt % drawn / max(drawn - 1, 1), generator))
    return [*chosen.values()], [*over.values()]
