"""NSGA-II through pymoo's ask and tell; U-NSGA-III where there are three objectives or more.

NSGA-II: Deb et al., 2002, https://doi.org/10.1109/4235.996017. U-NSGA-III: Seada and Deb, 2016,
https://doi.org/10.1109/TEVC.2015.2459718. Nothing of pymoo's state is ever saved: a killed search
is told the same again from its seed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.unsga3 import UNSGA3
from pymoo.core.evaluator import Evaluator as PymooEvaluator
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.sampling import Sampling
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.ux import UX
from pymoo.problems.static import StaticProblem
from pymoo.util.ref_dirs import get_reference_directions

from netsearch.searches.protocol import Batch, SearchConfig
from netsearch.searches.variation import Genomes, RandomReset
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import Problem, sample_sizes

FAILED_ERROR = 1.0  # told to pymoo for a failed candidate; it never enters the archive
MAX_BARREN_GENERATIONS = 50
CROWDED = 3  # with so many objectives nearly all is non-dominated, and crowding says little


class Nsga2:
    """Binary tournaments, uniform crossover, reset mutation, survival by rank and crowding.

    Networks over a hard budget are told as violated constraints and never asked for; a network that
    comes up again is told what it was told before.
    """

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Prepare pymoo's algorithm."""
        self.problem = problem
        self.errors: dict[str, float] = {}
        upper = problem.genes.upper
        objectives = 1 + len(problem.bounds[0])
        self.stub = PymooProblem(
            n_var=len(upper), n_obj=objectives, n_ieq_constr=1, xl=0, xu=upper, vtype=int
        )
        population = max(config.population, objectives)  # a network for each direction
        settings = {
            "pop_size": population,
            "sampling": SizeSampling(problem),
            "crossover": UX(prob=config.crossover),
            "mutation": RandomReset(prob_var=config.mutation or 1.0 / len(upper)),
            "eliminate_duplicates": True,
        }
        if objectives < CROWDED:
            self.algorithm = NSGA2(**settings)
        else:
            self.algorithm = UNSGA3(_directions(objectives, population), **settings)
        self.algorithm.setup(self.stub, termination=NoTermination(), seed=seed, verbose=False)
        self.offspring = _Offspring(None, [], [], np.zeros(0))
        self.new: dict[str, Genome] = {}

    def ask(self, left: float) -> Batch:
        """Return the next offspring that are new and allowed."""
        for _ in range(MAX_BARREN_GENERATIONS):
            individuals = self.algorithm.ask()
            if individuals is None or len(individuals) == 0:
                break
            genomes = [tuple(row) for row in individuals.get("X").tolist()]
            ids, excess = [*map(self.problem.id, genomes)], self.problem.excess(genomes)
            self.offspring = _Offspring(individuals, genomes, ids, excess)
            candidates = zip(ids, genomes, (excess <= 0).tolist(), strict=True)
            self.new = {id: g for id, g, allowed in candidates if allowed and id not in self.errors}
            if self.new:
                return Batch(tuple(self.new.values())[: int(left)])
            self._tell()
        return Batch(())

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Let the offspring compete, unless evaluations ended amid them."""
        self.errors.update(zip(self.new, errors.tolist(), strict=False))
        if len(batch.genomes) == len(self.new):
            self._tell()

    def _tell(self) -> None:
        """Tell objectives and violations, all of them finite: one NaN would poison the sort."""
        offspring = self.offspring
        errors = np.array([self.errors.get(id, math.nan) for id in offspring.ids])
        failed = np.isnan(errors)
        violation = np.where(offspring.excess > 0, offspring.excess, failed)
        # The logarithm keeps the order and spreads the front evenly over factors of size.
        costs = np.log(self.problem.costs(offspring.genomes))
        told = np.column_stack([np.where(failed, FAILED_ERROR, errors), costs])
        assert np.isfinite(told).all() and np.isfinite(violation).all()
        answers = StaticProblem(self.stub, F=told, G=violation[:, None].astype(float))
        PymooEvaluator().eval(answers, offspring.individuals)
        self.algorithm.tell(infills=offspring.individuals)


@dataclass(frozen=True)
class _Offspring:
    """What pymoo asked for last: its individuals, their genomes, ids, excess over budgets."""

    individuals: Any
    genomes: list[Genome]
    ids: list[str]
    excess: Floats


def _directions(objectives: int, population: int) -> Floats:
    """Return evenly spread reference directions, at most as many as the population."""
    partitions = 1
    while math.comb(partitions + objectives, objectives - 1) <= population:
        partitions += 1
    directions: Floats = get_reference_directions("das-dennis", objectives, n_partitions=partitions)
    return directions


class SizeSampling(Sampling):  # type: ignore[misc]
    """Draws distinct genomes within the hard budgets, spread from small networks to large ones.

    If too few are found, the rest are genomes over budget, which are told as such.
    """

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem

    def _do(
        self,
        problem: PymooProblem,
        n_samples: int,
        *args: Any,
        random_state: Any = None,
        **kwargs: Any,
    ) -> Genomes:
        chosen, over = sample_sizes(self.problem, n_samples, random_state)
        return np.array([*chosen, *over][:n_samples])
