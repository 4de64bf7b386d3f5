"""Successive halving under several objectives: many networks a little, few of them in full.

Successive halving: Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943. That rungs
promote by non-dominated rank, and by crowding within a rank, follows Salinas et al., 2021,
https://arxiv.org/abs/2106.12639; that a further round varies the front of those before it, instead
of drawing anew, is ours.
"""

import math

import numpy as np
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from netsearch.engine import Batch, History, SearchConfig
from netsearch.problem import Floats, Genome, Problem, sample_sizes
from netsearch.variation import children

LEAST_TOP = 2  # networks that the last rung of a round should have at least


def fidelities(rungs: int, eta: int) -> list[float]:
    """Return the fidelity of each rung, the last is 1."""
    return [float(eta) ** -(rungs - 1 - rung) for rung in range(rungs)]


class Halving:
    """Rounds of rungs; of the networks on a rung, one in `eta` is trained `eta` times as long.

    A round spends as much on every rung: `population` full evaluations, or what is left of them.
    """

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Draw nothing yet."""
        self.problem = problem
        self.config = config
        self.fidelities = fidelities(config.rungs, config.eta)
        self.generator = np.random.default_rng(seed)
        self.history = History(problem)  # of full evaluations
        self.looked_at: set[str] = set()
        self.rung = 0
        self.promoted: list[Genome] = []

    def ask(self, left: float) -> Batch:
        """Return a new round's networks for its first rung, or those promoted."""
        fidelity = self.fidelities[self.rung]
        if self.rung:
            return Batch(tuple(self.promoted[: int(left / fidelity + 1e-9)]), fidelity)
        each = min(float(self.config.population), left / len(self.fidelities))
        count = int(each / fidelity + 1e-9)
        if each < LEAST_TOP:  # too little for a round: what is left goes to full evaluations
            self.rung = len(self.fidelities) - 1
            fidelity, count = 1.0, int(left + 1e-9)
        genomes = self._draw(count)
        self.looked_at.update(map(self.problem.id, genomes))
        return Batch(tuple(genomes), fidelity)

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Promote the best, or end the round."""
        if batch.fidelity == 1:
            self.history.add(batch.genomes, errors)
            self.rung = 0
            return
        alive = [g for g, error in zip(batch.genomes, errors, strict=True) if not math.isnan(error)]
        points = np.column_stack([errors[~np.isnan(errors)], np.log(self.problem.costs(alive))])
        count = max(1, len(batch.genomes) // self.config.eta)
        self.promoted = [alive[index] for index in best(points, count, self.generator)]
        self.rung = self.rung + 1 if self.promoted else 0

    def _draw(self, count: int) -> list[Genome]:
        """Return networks never looked at: spread over sizes, later also children of the front."""
        many = max(count, self.config.population)  # of a few, all may be known
        spread, _ = sample_sizes(self.problem, 2 * many, self.generator)
        drawn = list(spread)
        if len(self.history):
            upper = self.problem.genes.upper
            born = children(
                self.history.front(),
                many,
                upper=upper,
                crossover=self.config.crossover,
                mutation=self.config.mutation or 1.0 / len(upper),
                generator=self.generator,
            )
            drawn = [genome for pair in zip(born, spread, strict=False) for genome in pair]
        fresh = [g for g in self.history.new(drawn) if self.problem.id(g) not in self.looked_at]
        return fresh[:count]


def best(points: Floats, count: int, generator: np.random.Generator) -> list[int]:
    """Return the indices of `count` points (N, M), by rank and then by crowding."""
    if not len(points):
        return []
    problem = PymooProblem(n_var=1, n_obj=points.shape[1])
    population = Population.new("F", points, "index", np.arange(len(points)))
    survivors = RankAndCrowding().do(
        problem, population, n_survive=min(count, len(points)), random_state=generator
    )
    return [int(index) for index in survivors.get("index")]
