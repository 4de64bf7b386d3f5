"""The protocol of a network search, what it remembers, and the loop that runs one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from evaluation.pareto import non_dominated
from netsearch.genome import Floats, Genome
from netsearch.problem import Problem

SearchName = Literal["random", "nsga2", "surrogate", "smem", "halving"]
WHOLE = 1e-9  # a sum of fidelities counts as whole within this


class SearchConfig(BaseModel):
    """What every network search may be told; each takes what it needs.

    Attributes:
        search: Which one.
        evaluations: Full evaluations; those at a lower fidelity count as their part of one.
        population: Networks of the first generation, and of each one of `nsga2`; `surrogate` and
            `smem` evaluate half of it in each later one.
        crossover: Probability of uniform crossover.
        mutation: Probability of a new value, per gene; None is 1 / genes.
        model: What predicts the errors in `surrogate`.
        candidates: Children that a model judges for each generation.
        rungs: Fidelities of `halving`.
        eta: Of the networks on a rung of `halving`, one in so many is promoted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: SearchName = "surrogate"
    evaluations: int = Field(ge=4)
    population: int = Field(ge=4)
    crossover: float = Field(default=0.9, ge=0, le=1)
    mutation: float | None = Field(default=None, gt=0, le=1)
    model: Literal["gaussian_process", "ensemble"] = "gaussian_process"
    candidates: int = Field(default=200, ge=10, le=10_000)
    rungs: int = Field(default=3, ge=2, le=6)
    eta: int = Field(default=3, ge=2, le=10)


@dataclass(frozen=True)
class Batch:
    """Networks to evaluate side by side: distinct, new, and within the hard budgets.

    Attributes:
        genomes: None at all when nothing new comes up.
        fidelity: Part of a full evaluation that each is worth, in (0, 1].
    """

    genomes: tuple[Genome, ...]
    fidelity: float = 1.0


class NetworkSearch(Protocol):
    """A search of a `Problem`, built as `Search(problem, config, seed)`.

    All chance comes from the seed, so a search that is told the same errors asks the same again: a
    killed one is resumed by replaying it.
    """

    def ask(self, left: float) -> Batch:
        """Return what to evaluate next, worth at most `left` full evaluations."""

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Take the errors in [0, 1] of the batch that was asked for, NaN for failed ones, (N,)."""


def run_search(
    search: NetworkSearch,
    evaluate: Callable[[Batch], Floats],
    evaluations: float,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Ask and tell until `evaluations` are spent, or nothing new comes up, which is said."""
    spent, networks = 0.0, 0
    while evaluations - spent > WHOLE:
        batch = search.ask(evaluations - spent)
        if not batch.genomes:
            say(f"no new network comes up after {networks}: {_why(evaluations - spent)}")
            return
        spent += len(batch.genomes) * batch.fidelity
        networks += len(batch.genomes)
        search.tell(batch, evaluate(batch))


def _why(left: float) -> str:
    if left < 1:
        return f"{left:.2f} of an evaluation is left over"
    return "the space within the budgets is small"


class History:
    """Genomes told so far, with their costs and errors.

    Attributes:
        genomes: In order of arrival.
        costs: (N, M - 1).
        errors: (N,); a failed network has the worst error told, so that a model keeps away.
        failed: Mask (N,).
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.genomes: list[Genome] = []
        self.costs: Floats = np.zeros((0, len(problem.bounds[0])))
        self.errors: Floats = np.zeros(0)
        self.failed: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self.genomes)

    def add(self, genomes: Sequence[Genome], errors: Floats) -> None:
        """Take what was told."""
        self.genomes += genomes
        self.costs = np.vstack([self.costs, self.problem.costs(genomes)])
        self.failed = np.append(self.failed, np.isnan(errors))
        known = np.append(self.errors, errors)
        worst = known[~self.failed].max(initial=0.0) if not self.failed.all() else 1.0
        self.errors = np.where(self.failed, worst, known)
        self._ids.update(map(self.problem.id, genomes))

    def new(self, genomes: Sequence[Genome]) -> list[Genome]:
        """Return those that are allowed and were never told, equal networks once."""
        unique = {self.problem.id(genome): genome for genome in reversed(genomes)}
        fresh = [genome for id, genome in reversed(unique.items()) if id not in self._ids]
        if not fresh:
            return []
        allowed = self.problem.excess(fresh) <= 0
        return [genome for genome, fits in zip(fresh, allowed, strict=True) if fits]

    def front(self) -> list[Genome]:
        """Return the non-dominated genomes; all of them while every one has failed."""
        if self.failed.all():
            return self.genomes
        points = np.column_stack([self.errors, self.costs])[~self.failed]
        alive = np.flatnonzero(~self.failed)
        return [self.genomes[index] for index in alive[non_dominated(points)]]
