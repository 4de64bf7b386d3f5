"""Evolution with a model: children and neighbours of the front, chosen by expected hypervolume.

After a first population the errors told so far (of more than a thousand those on the front and the
latest, see `History.learned_from`) are regressed on the genomes. Candidates are varied
from the front as NSGA-II varies its parents; evaluated are those from which the front is expected
to gain most. The costs of a candidate are exact and known at once, so that only its error is in
doubt, and the expected gain of hypervolume is an expected improvement (Jones et al., 1998,
https://doi.org/10.1023/A:1008306431147) averaged over budgets. That form of the infill criterion,
and the neighbours, are our own design; expected hypervolume is Emmerich's (2005).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from netsearch.searches.models import MODELS
from netsearch.searches.protocol import Batch, History, SearchConfig
from netsearch.searches.variation import Variation, neighbours
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import Problem, sample_sizes

MIN_ERROR = 1e-3  # of the largest; an error of nothing has no logarithm
MAX_NEIGHBOURS = 1000
BUDGETS = 128


class Surrogate:
    """Half a population at a time, each chosen as if those before it had turned out as expected."""

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Draw nothing yet."""
        self.problem = problem
        self.config = config
        self.generator = np.random.default_rng(seed)
        self.variation = Variation.of(problem, config, self.generator)
        self.history = History(problem)
        self.budgets = budget_points(problem)

    def ask(self, left: float) -> Batch:
        """Return the first population, then what promises most."""
        if not len(self.history):
            count = min(self.config.population, int(left))
            return Batch(tuple(sample_sizes(self.problem, count, self.generator)[0]))
        candidates = self._candidates()
        if not candidates:
            return Batch(())
        count = min(max(1, self.config.population // 2), int(left))
        with threadpool_limits(1):  # sums of floats in one order, and small matrices
            return Batch(tuple(candidates[index] for index in self._choose(candidates, count)))

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Learn the errors."""
        self.history.add(batch.genomes, errors)

    def _candidates(self) -> list[Genome]:
        """Return new genomes near the front, or from anywhere once all of those are known."""
        upper, front = self.problem.genes.upper, self.history.front()
        near = [other for genome in front for other in neighbours(genome, upper)]
        if len(near) > MAX_NEIGHBOURS:
            chosen = self.generator.choice(len(near), MAX_NEIGHBOURS, replace=False)
            near = [near[index] for index in chosen]
        born = self.variation.children(front, self.config.candidates)
        drawn = self.variation.anywhere()
        return self.history.new(near + born) or self.history.new(drawn)

    def _choose(self, candidates: Sequence[Genome], count: int) -> list[int]:
        history, problem = self.history, self.problem
        floor = MIN_ERROR * (history.errors.max() or 1.0)
        values = np.log(np.maximum(history.errors, floor))
        learned = history.learned_from()
        features = problem.features([history.genomes[index] for index in learned])
        model = MODELS[self.config.model](features, values[learned])
        mean, std = model(problem.features(candidates))
        front = history.front_indices()  # the best within a budget is on the front
        keeps = within(history.costs[front], self.budgets)
        best = np.where(keeps, values[front], values.max()).min(axis=1)
        return choose(mean, std, within(problem.costs(candidates), self.budgets), best, count)


def budget_points(problem: Problem) -> Floats:
    """Return budgets on all costs, spread evenly over the box, (Q, M - 1).

    Half are even on a logarithmic scale, as fronts are drawn; half on a linear one.
    """
    from scipy.stats import qmc  # takes a second to import

    least, largest = problem.bounds
    count = BUDGETS * 2 ** (len(least) - 1).bit_length()  # a power of 2, or they are not even
    points = qmc.Sobol(len(least), scramble=False).random(count) + 0.5 / count
    logarithmic = least * (largest / least) ** points
    return np.vstack([logarithmic, least + (largest - least) * points])


def within(costs: Floats, budgets: Floats) -> NDArray[np.bool_]:
    """Mark which costs (N, M - 1) keep which budgets (Q, M - 1), (Q, N)."""
    kept: NDArray[np.bool_] = np.all(costs[None] <= budgets[:, None], axis=2)
    return kept


def expected_improvement(best: Floats, mean: Floats, std: Floats) -> Floats:
    """Return E[max(0, best - value)] of a normal value."""
    from scipy.special import ndtr

    z = (best - mean) / std
    density = np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi)
    improvement: Floats = std * (z * ndtr(z) + density)
    return improvement


def choose(
    mean: Floats, std: Floats, keeps: NDArray[np.bool_], best: Floats, count: int
) -> list[int]:
    """Choose candidates one by one by their improvement, expected over all budgets.

    A front within a budget is worth the best error within it, so its hypervolume is the average of
    that over budgets. Who was chosen counts from then on as evaluated, with the mean as its value.

    Args:
        mean: Predicted values, smaller is better, (N,).
        std: Their standard deviations, (N,).
        keeps: Which candidates keep which budgets, (Q, N).
        best: Best value within each budget so far, (Q,).
        count: How many to choose.

    Returns:
        Indices, at most N.
    """
    best, alive = best.copy(), np.ones(len(mean), dtype=bool)
    gains = np.where(keeps, expected_improvement(best[:, None], mean, std), 0.0)
    chosen: list[int] = []
    for _ in range(min(count, len(mean))):
        index = int(np.argmax(np.where(alive, gains.sum(axis=0), -1.0)))
        chosen.append(index)
        alive[index] = False
        better = keeps[:, index] & (mean[index] < best)
        best[better] = mean[index]
        gains[better] = np.where(
            keeps[better], expected_improvement(best[better, None], mean, std), 0.0
        )
    return chosen
