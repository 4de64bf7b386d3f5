"""SMEM: evolution with a model of order, which tells of two networks the better one.

After SMEM-NAS (2024, https://arxiv.org/abs/2407.15600), of which only the abstract was read, as its
repository holds no code: a multi-objective evolution whose model predicts the order of pairs
instead of an accuracy, whose main population guides and whose vice population adds diversity. All
else is our reconstruction: the classifier, who counts as an opponent, what the two populations
consist of, how they mate, and how a generation is chosen. Non-dominated sorting and crowding are
those of NSGA-II (Deb et al., 2002, https://doi.org/10.1109/4235.996017), pruned one by one.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from netsearch.searches.protocol import Batch, History, SearchConfig
from netsearch.searches.selection import survivors
from netsearch.searches.variation import Variation
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import Problem, sample_sizes

Order = Callable[[Floats, Floats], NDArray[np.bool_]]  # features (N, D) twice -> first wins, (N,)

HIDDEN = 32
WEIGHT_DECAY = 0.1
LEARNING_RATE = 0.01
PAIRS_PER_STEP = 200
STEPS = 150
MAX_PAIRS = 10_000  # unordered ones to learn from: more take time and hardly tell more
MAX_OPPONENTS = 500
MAX_OTHERS = 1000  # among which the vice population is looked for; of more every second, third...
PAIRS_AT_ONCE = 100_000
VICE_PART = 4  # one in so many of a generation comes from the vice population


class Smem:
    """Half a population at a time, by predicted losses against all in view and by exact costs.

    The main population is the front of all networks told. The vice population is as large as
    `population` says: those told that lie farthest from the front and from one another.
    """

    def __init__(self, problem: Problem, config: SearchConfig, seed: int):
        """Draw nothing yet."""
        self.problem = problem
        self.config = config
        self.generator = np.random.default_rng(seed)
        self.variation = Variation.of(problem, config, self.generator)
        self.history = History(problem)

    def ask(self, left: float) -> Batch:
        """Return the first population, then children of both populations."""
        if not len(self.history):
            count = min(self.config.population, int(left))
            return Batch(tuple(sample_sizes(self.problem, count, self.generator)[0]))
        count = min(max(1, self.config.population // 2), int(left))
        with threadpool_limits(1):  # sums of floats in one order, and small matrices
            main, vice = self._candidates()
            return Batch(tuple(self._choose(main, vice, count)))

    def tell(self, batch: Batch, errors: Floats) -> None:
        """Learn the errors."""
        self.history.add(batch.genomes, errors)

    def _candidates(self) -> tuple[list[Genome], list[Genome]]:
        """Return new children of the main population, and those in which the vice one has a part.

        Once all of those are known, the first are new genomes from anywhere.
        """
        front = self.history.front()
        main = self.history.new(self._children(front))
        known = set(map(self.problem.id, main))
        born = self.history.new(self._children([*front, *self._vice(front)]))
        vice = [genome for genome in born if self.problem.id(genome) not in known]
        if main or vice:
            return main, vice
        return self.history.new(self.variation.anywhere()), []

    def _children(self, parents: Sequence[Genome]) -> list[Genome]:
        return self.variation.children(parents, self.config.candidates)

    def _vice(self, front: Sequence[Genome]) -> list[Genome]:
        alive = zip(self.history.genomes, self.history.failed, strict=True)
        guides = set(front)
        others = [genome for genome, failed in alive if not failed and genome not in guides]
        if not others:
            return []
        others = others[:: math.ceil(len(others) / MAX_OTHERS)]
        features = self.problem.features
        chosen = farthest(features(others), features(front), self.config.population)
        return [others[index] for index in chosen]

    def _choose(self, main: list[Genome], vice: list[Genome], count: int) -> list[Genome]:
        both = main + vice
        if len(both) <= count:
            return both
        of_main = min(len(main), count - min(len(vice), count // VICE_PART))
        costs = np.log(self.problem.costs(both))  # keeps the order, spreads over factors of size
        points = np.column_stack([self._losses(both), costs])
        chosen = survivors(points[: len(main)], of_main)
        rest = survivors(points[len(main) :], count - of_main)
        return [*(main[index] for index in chosen), *(vice[index] for index in rest)]

    def _losses(self, candidates: Sequence[Genome]) -> Floats:
        """Return how many networks in view, told or candidates, each is not said to beat, (N,)."""
        history, problem = self.history, self.problem
        learned = history.learned_from()
        features = problem.features([history.genomes[index] for index in learned])
        errors = np.where(history.failed, np.inf, history.errors)[learned]
        order = pairwise_order(features, errors, self.generator)
        asked = problem.features(candidates)
        opponents = np.vstack([features, asked])
        if len(opponents) > MAX_OPPONENTS:
            drawn = self.generator.choice(len(opponents), MAX_OPPONENTS, replace=False)
            opponents = opponents[drawn]
        return len(opponents) - wins(order, asked, opponents)


def ordered_pairs(
    errors: Floats, generator: np.random.Generator, limit: int = MAX_PAIRS
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return pairs of networks in both orders, none of equal errors, and in which the first wins.

    Args:
        errors: Smaller is better, infinite for failed networks, (N,).
        generator: Draws pairs if there are more than `limit`.
        limit: How many pairs at most, each counted once.

    Returns:
        Indices of the first, of the second, and whether the first is better, (2 * pairs,) each.
    """
    first, second = np.triu_indices(len(errors), 1)
    differ = errors[first] != errors[second]
    first, second = first[differ], second[differ]
    if len(first) > limit:
        drawn = generator.choice(len(first), limit, replace=False)
        first, second = first[drawn], second[drawn]
    one, other = np.concatenate([first, second]), np.concatenate([second, first])
    return one, other, errors[one] < errors[other]


def pairwise_order(features: Floats, errors: Floats, generator: np.random.Generator) -> Order:
    """Fit a small perceptron that is shown two networks and says whether the first is better.

    Logistic regression did as well on the NATS-Bench size space and worse on NAS-Bench-201; forests
    and boosting the other way round (Kendall's tau of the wins of held-out networks, 100 labelled
    ones, four seeds): the perceptron was near the best on both.

    Args:
        features: (N, D).
        errors: Smaller is better, infinite for failed networks, (N,).
        generator: Draws the pairs if there are too many, and the initial weights.

    Returns:
        The order; where all errors are equal nobody wins.
    """
    from sklearn.exceptions import ConvergenceWarning  # takes seconds to import
    from sklearn.neural_network import MLPClassifier

    one, other, better = ordered_pairs(errors, generator)
    if not len(one):
        return lambda a, b: np.zeros(len(a), dtype=bool)
    model = MLPClassifier(
        (HIDDEN,),
        alpha=WEIGHT_DECAY,
        learning_rate_init=LEARNING_RATE,
        batch_size=min(PAIRS_PER_STEP, len(one)),
        max_iter=math.ceil(STEPS * PAIRS_PER_STEP / len(one)),
        random_state=int(generator.integers(2**31)),
    )
    with warnings.catch_warnings():
        # The number of steps is fixed: that the loss would fall further is no fault.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.hstack([features[one], features[other]]), better)

    def order(a: Floats, b: Floats) -> NDArray[np.bool_]:
        said: NDArray[np.bool_] = model.predict(np.hstack([a, b]))
        return said

    return order


def wins(order: Order, asked: Floats, opponents: Floats) -> Floats:
    """Return how many of the opponents (R, D) each of the asked (N, D) is said to beat, (N,)."""
    rows = max(1, PAIRS_AT_ONCE // len(opponents))
    counts = [np.zeros(0)]
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        said = order(np.repeat(part, len(opponents), axis=0), np.tile(opponents, (len(part), 1)))
        counts.append(said.reshape(len(part), -1).sum(axis=1).astype(float))
    return np.concatenate(counts)


def farthest(points: Floats, kept: Floats, count: int) -> list[int]:
    """Return points one by one, each the farthest from those kept and from those before it.

    Args:
        points: (N, D).
        kept: (K, D), at least one.
        count: How many, at most N are returned.

    Returns:
        Indices of points; the first of equally far ones comes first.
    """
    distance = np.min(np.square(points[:, None] - kept[None]).sum(axis=2), axis=1)
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        index = int(np.argmax(distance))
        chosen.append(index)
        distance = np.minimum(distance, np.square(points - points[index]).sum(axis=1))
        distance[chosen] = -1.0
    return chosen
