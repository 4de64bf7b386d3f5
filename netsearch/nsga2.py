"""NSGA-II by pymoo's ask/tell over an archive, and random search in the same space.

Deb, Pratap, Agarwal, Meyarivan, 2002, https://doi.org/10.1109/4235.996017. A search resumes by
replay: it asks and tells again from its seed and is answered from the archive, so a killed run ends
with the archive of an unbroken one. Nothing of pymoo's state is ever saved.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator as PymooEvaluator
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.sampling import Sampling
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.ux import UX
from pymoo.problems.static import StaticProblem

from evaluation.pareto import objectives
from evaluation.records import Archive
from evaluation.training import TrainConfig
from netsearch.estimate import Evaluator, Genome

FAILED_ERROR = 1.0  # told to pymoo for a failed candidate; it never enters the archive
TRIES_PER_SAMPLE = 200
MAX_BARREN_GENERATIONS = 50


class NetSearchConfig(BaseModel):
    """The table `netsearch`: the space, the budgets, NSGA-II, and the proxy training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depths: tuple[int, ...] = Field(min_length=1)
    widths: tuple[int, ...] = Field(min_length=1)
    max_params: int | None = Field(ge=1)
    max_flops: int | None = Field(ge=1)
    costs: tuple[Literal["params", "flops"], ...] = Field(min_length=1)
    population: int = Field(ge=4)
    evaluations: int = Field(ge=4)
    crossover: float = Field(ge=0, le=1)
    mutation: float | None = Field(gt=0, le=1)
    random_search: bool
    train: TrainConfig

    @field_validator("depths", "widths")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)) or values[0] < 1:
            raise ValueError(f"expected distinct positive numbers in ascending order, got {values}")
        return values

    @field_validator("widths")
    @classmethod
    def _multiples_of_4(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value % 4 for value in values):
            raise ValueError(f"expected multiples of 4, as grouped ops need them, got {values}")
        return values


def nsga2(
    evaluator: Evaluator,
    archive: Archive,
    config: NetSearchConfig,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Search until `config.evaluations` networks are evaluated, all of them in `archive`.

    Candidates over a hard budget are told to pymoo as violated constraints and never trained.

    Args:
        evaluator: Evaluates genomes into the archive.
        archive: May hold records of an earlier, killed search with the same seed.
        config: Size of the population, operators, number of evaluations.
        seed: Of pymoo's random state.
        say: Called with a line when no new networks come up.
    """
    problem = Problem(
        n_var=len(evaluator.space.upper),
        n_obj=1 + len(config.costs),
        n_ieq_constr=1,
        xl=0,
        xu=evaluator.space.upper,
        vtype=int,
    )
    algorithm = NSGA2(
        pop_size=config.population,
        sampling=SizeSampling(evaluator, config.costs),
        crossover=UX(prob=config.crossover),
        mutation=RandomReset(prob_var=config.mutation or 1.0 / problem.n_var),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    seen: set[str] = set()
    barren = 0
    while len(seen) < config.evaluations:
        offspring = algorithm.ask()
        if offspring is None or len(offspring) == 0 or barren == MAX_BARREN_GENERATIONS:
            say(f"no new network comes up after {len(seen)}: the space within the budgets is small")
            return
        genomes = [_genome(row) for row in offspring.get("X")]
        new = {evaluator.id(g): g for g in genomes if evaluator.fits(g)}
        new = {id: genome for id, genome in new.items() if id not in seen}
        barren = 0 if new else barren + 1
        left = config.evaluations - len(seen)
        evaluator.evaluate(list(new.values())[:left], archive)
        seen.update(list(new)[:left])
        if len(seen) < config.evaluations:
            _tell(algorithm, offspring, problem, genomes, evaluator, archive, config)


def random_search(
    evaluator: Evaluator,
    archive: Archive,
    evaluations: int,
    costs: Sequence[str],
    seed: int,
) -> None:
    """Evaluate distinct networks drawn as the first population of `nsga2` is.

    With the same sampler, a difference between the two is the work of selection and variation.
    """
    generator = np.random.default_rng(seed)
    genomes, _ = sample_sizes(evaluator, evaluations, costs, generator)
    evaluator.evaluate(genomes, archive)


def sample_sizes(
    evaluator: Evaluator, count: int, costs: Sequence[str], generator: np.random.Generator
) -> tuple[list[Genome], list[Genome]]:
    """Draw genomes spread from small networks to large ones.

    The cheapest of the space by each of `costs` come first: one end of the front, known beforehand.

    Returns:
        At most `count` distinct genomes within the hard budgets, and some that are over them.
    """
    cheapest = [evaluator.cheapest(name) for name in costs]
    chosen = {genome: True for genome in cheapest if evaluator.fits(genome)}
    over: dict[Genome, bool] = {}
    drawn = max(count - len(chosen), 1)
    for attempt in range(count * TRIES_PER_SAMPLE):
        if len(chosen) == count:
            break
        size = attempt % drawn / max(drawn - 1, 1)
        genome = evaluator.space.random_of_size(size, generator)
        (chosen if evaluator.fits(genome) else over)[genome] = True
    return [*chosen], [*over]


def _tell(
    algorithm: Any,
    offspring: Any,
    problem: Problem,
    genomes: list[Genome],
    evaluator: Evaluator,
    archive: Archive,
    config: NetSearchConfig,
) -> None:
    """Tell pymoo objectives and violations, all of them finite: one NaN would poison its sort."""
    rows, violations = [], []
    for genome in genomes:
        record = archive.get(evaluator.id(genome))
        cost = evaluator.cost(genome)
        error, violation = FAILED_ERROR, 1.0
        if record is None:
            violation = evaluator.budgets.cost_excess(cost)
        elif record.valid_accuracy is not None:
            error, violation = objectives(record, config.costs)[0], 0.0
        # The logarithm keeps the order and spreads the front evenly over factors of size.
        rows.append([error, *(math.log(cost.count(name)) for name in config.costs)])
        violations.append([violation])
    told, constraint = np.array(rows), np.array(violations)
    assert np.isfinite(told).all() and np.isfinite(constraint).all()
    PymooEvaluator().eval(StaticProblem(problem, F=told, G=constraint), offspring)
    algorithm.tell(infills=offspring)


def _genome(row: NDArray[np.int64]) -> Genome:
    return tuple(int(gene) for gene in row)


class SizeSampling(Sampling):  # type: ignore[misc]
    """Draws distinct genomes within the hard budgets, spread from small networks to large ones.

    If too few are found, the rest are genomes over budget, which are told as such.
    """

    def __init__(self, evaluator: Evaluator, costs: Sequence[str]):
        super().__init__()
        self.evaluator, self.costs = evaluator, costs

    def _do(
        self, problem: Problem, n_samples: int, *args: Any, random_state: Any = None, **kwargs: Any
    ) -> NDArray[np.int64]:
        chosen, over = sample_sizes(self.evaluator, n_samples, self.costs, random_state)
        return np.array([*chosen, *over][:n_samples])


class RandomReset(Mutation):  # type: ignore[misc]
    """Gives each gene, with probability `prob_var`, a new uniform value other than its own.

    Block genes are categories, so a creeping mutation such as rounded polynomial mutation, which
    leaves most small integers where they are, would hardly explore them.
    """

    def _do(
        self,
        problem: Problem,
        X: NDArray[np.int64],
        *args: Any,
        random_state: Any = None,
        **kwargs: Any,
    ) -> NDArray[np.int64]:
        top = np.broadcast_to(problem.xu, X.shape).astype(np.int64)
        step = random_state.integers(1, np.maximum(top, 1) + 1)
        hit = random_state.random(X.shape) < self.prob_var.get()
        mutated: NDArray[np.int64] = np.where(hit & (top > 0), (X + step) % (top + 1), X)
        return mutated
