"""The protocol of a network search, what it remembers, and the loop that runs one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluation.pareto.front import non_dominated
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import Problem

SearchName = Literal["random", "nsga2", "surrogate", "smem", "halving"]
MAX_LEARNT = 1000  # networks that a model is fitted to: its time grows with their cube
LEARNT_LATER = 400  # of which it is fitted to those that matter most, once there are more
MAX_DRAWN = 1_000_000  # networks of a rung
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
    evaluations: int = Field(ge=4, le=1_000_000)
    population: int = Field(ge=4, le=10_000)
    crossover: float = Field(default=0.9, ge=0, le=1)
    mutation: float | None = Field(default=None, gt=0, le=1)
    model: Literal["gaussian_process", "ensemble"] = "gaussian_process"
    candidates: int = Field(default=200, ge=10, le=10_000)
    rungs: int = Field(default=3, ge=2, le=6)
    eta: int = Field(default=3, ge=2, le=10)

    @model_validator(mode="after")
    def _first_rung(self) -> Self:
        drawn = self.population * self.eta ** (self.rungs - 1)
        if self.search == "halving" and drawn > MAX_DRAWN:
            raise ValueError(
                f"population, rungs, eta: halving would draw {drawn:,} networks for its first "
                f"rung, expected at most {MAX_DRAWN:,}"
            )
        return self


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
            say(f"no new network is found after {networks}: {_why(evaluations - spent)}")
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
        self._front: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # indices, in order of arrival

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
        first = len(self.genomes) - len(genomes)
        told = np.arange(first, len(self.genomes))
        self._front = self._non_dominated(np.append(self._front, told[~self.failed[first:]]))

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
        return [self.genomes[index] for index in self.front_indices()]

    def front_indices(self) -> NDArray[np.int64]:
        """Return where the genomes of `front` are, in order of arrival."""
        return np.arange(len(self)) if self.failed.all() else self._front

    def learned_from(self) -> NDArray[np.int64]:
        """Return the indices of the genomes that a model learns from: all, up to `MAX_LEARNT`.

        Of more, so that a generation takes no longer than those before it, `LEARNT_LATER`: the
        front, and the latest of the others, which are what lies around it. Of a front that would
        fill more than half of them as many are taken, spread evenly over the first cost.
        """
        if len(self) <= MAX_LEARNT:
            return np.arange(len(self))
        front = self.front_indices()
        if len(front) > LEARNT_LATER // 2:
            ordered = front[np.argsort(self.costs[front, 0], kind="stable")]
            front = ordered[np.linspace(0, len(ordered) - 1, LEARNT_LATER // 2).astype(np.int64)]
        recent = np.arange(len(self) - LEARNT_LATER, len(self))
        others = np.setdiff1d(recent, front)
        return np.sort(np.append(front, others[len(others) - LEARNT_LATER + len(front) :]))

    def _non_dominated(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        points = np.column_stack([self.errors[indices], self.costs[indices]])
        return indices[non_dominated(points)]
