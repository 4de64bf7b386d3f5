"""The look-up graph of DCA-NAS: from a device's budget to the budget that the search must keep.

Dutta, Kanvar, Agarwal, 2023, https://arxiv.org/abs/2307.04443. A search keeps its budget K' on
average over op probabilities, in its own small network; the network derived from it costs K, which
is another number. So some searches with different K' are run once, the true K of each is recorded,
and a monotone curve K(K') is laid through them; for a device with budget K, the search gets the K'
at which the curve reaches K. One graph per data set and kind of cost.

The paper does not say which monotone curve. Ours is the lowest one with no recorded network above
it: a budget read from it was kept by every recorded search up to there, while a least-squares curve
would promise too much for about half of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy.stats import spearmanr

from evaluation.errors import InputError
from evaluation.files.atomic import json_text, read_json, write_atomic
from evaluation.workers.pool import WorkerDied, run_tasks
from evaluation.workers.workers import ONE_WORKER, Workers


@dataclass(frozen=True)
class LookupGraph:
    """What networks cost that were derived from searches with different budgets.

    Attributes:
        dataset: On which the searches ran.
        metric: What is counted: `params`, `flops`, or the name of a device.
        search_budgets: K' of each search, rising, in the unit of the metric or as a fraction.
        costs: True cost K of the network derived from each.
    """

    dataset: str
    metric: str
    search_budgets: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the points.

        Raises:
            ValueError: If there are none, the K' do not rise, or a number is not finite.
        """
        budgets, costs = self.search_budgets, self.costs
        rising = all(a < b for a, b in zip(budgets, budgets[1:], strict=False))
        if not budgets or len(budgets) != len(costs) or not rising:
            raise ValueError(f"expected one cost for each of some rising budgets, got {self}")
        if not np.isfinite([*budgets, *costs]).all():
            raise ValueError(f"expected finite numbers, got {self}")

    @classmethod
    def measure(
        cls,
        task: Callable[[float], float],
        search_budgets: Sequence[float],
        *,
        dataset: str,
        metric: str,
        workers: Workers = ONE_WORKER,
    ) -> Self:
        """Run one search per K' and record what its network costs.

        Args:
            task: K' -> true cost K of the network that a whole search with it derives; importable
                by name where there are several workers.
            search_budgets: The grid of K'.
            dataset: Name of the data set.
            metric: Name of the cost.
            workers: Where searches run, and how many at the same time.

        Raises:
            InputError: If a worker dies.
        """
        costs = {}
        tasks = {budget: (budget,) for budget in sorted(set(search_budgets))}
        for budget, cost in run_tasks(task, tasks, workers):
            if isinstance(cost, WorkerDied):
                raise InputError(f"search with budget {budget:g}: {cost}; is there enough memory?")
            costs[budget] = float(cost)
        return cls(dataset, metric, tuple(tasks), tuple(costs[budget] for budget in tasks))

    @property
    def curve(self) -> tuple[float, ...]:
        """K(K') at every K': the lowest rising curve with no recorded cost above it."""
        return tuple(np.maximum.accumulate(self.costs).tolist())

    @property
    def monotony(self) -> float:
        """Spearman's rank correlation of K' and the recorded costs, in [-1, 1]."""
        return float(spearmanr(self.search_budgets, self.costs).statistic)

    def search_budget(self, limit: float) -> float:
        """Return the largest recorded K' up to which every network cost at most `limit`.

        Between two points nothing is promised: networks grow by whole ops.

        Raises:
            InputError: If even the smallest K' gave a dearer network.
        """
        within = [
            k for k, cost in zip(self.search_budgets, self.curve, strict=True) if cost <= limit
        ]
        if not within:
            raise InputError(
                f"{self.metric}: no search in the look-up graph kept {limit:g}; "
                f"the smallest search budget gave {self.curve[0]:g}"
            )
        return within[-1]

    def save(self, path: Path) -> None:
        """Write the graph as JSON."""
        write_atomic(path, json_text(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing or holds something else.
        """
        data = read_json(path)
        try:
            points = {key: tuple(map(float, data[key])) for key in ("search_budgets", "costs")}
            return cls(str(data["dataset"]), str(data["metric"]), **points)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: not a look-up graph: {error}") from error
