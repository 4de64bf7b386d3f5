"""The searches alone, for any problem: sizes and kinds in place of a network's genes."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np

from evaluation.errors import InputError, reason_of, require
from evaluation.pareto.front import non_dominated
from evaluation.workers.pool import WorkerDied, check_picklable, run_tasks
from evaluation.workers.workers import Workers
from netsearch.searches import SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, SearchName, run_search
from netsearch.space.genome import KINDS, SIZES, Floats, Genes, Genome, descended

Choice = Mapping[str, Any]  # a value for every name of a space
Function = Callable[[Choice], float]

FIRST, TOO_MANY = 10, 0.5  # evaluations after which a larger part of failures ends the search
ENUMERATED = 10_000  # choices, up to which the ends of a cost are sought among all
STARTS = 8  # of the descents beyond that
MAX_VALUES = 1000  # of a name: a search looks at all of them
ALONE = "nothing"  # stands for a cost where there is none: one of 1 for all
ALONE_SEARCHES = tuple(name for name in SEARCHES if name != "halving")  # it needs fidelities


@dataclass(frozen=True)
class Space:
    """What may be chosen: for every name a number, which counts from 0, or a list of values.

    Attributes:
        sizes: Names whose values ascend, such as a depth; what is near is alike.
        kinds: Names whose values have no order.
    """

    sizes: Mapping[str, int | Sequence[Any]] = field(default_factory=dict)
    kinds: Mapping[str, int | Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names and the values.

        Raises:
            InputError: If there is nothing to choose, a name stands twice, or has no value.
        """
        both = sorted(set(self.sizes) & set(self.kinds))
        require(not both, f"expected names that are sizes or kinds, got {', '.join(both)} as both")
        require(self.count > 1, f"expected a space of several choices, got {self.count}")

    @cached_property
    def choices(self) -> dict[str, Sequence[Any]]:
        """The values of each name, in the order of the genes."""
        return {name: _values(name, one) for name, one in {**self.sizes, **self.kinds}.items()}

    @property
    def count(self) -> int:
        """Number of choices."""
        return math.prod(map(len, self.choices.values())) if self.choices else 0

    @cached_property
    def genes(self) -> Genes:
        """One gene for each name."""
        upper = np.array([len(values) - 1 for values in self.choices.values()])
        groups = [SIZES] * len(self.sizes) + [KINDS] * len(self.kinds)
        return Genes(upper, tuple((group, 1) for group in groups))

    def decode(self, genome: Genome) -> dict[str, Any]:
        """Return the values that a genome stands for."""
        pairs = zip(self.choices.items(), genome, strict=True)
        return {name: values[gene] for (name, values), gene in pairs}


def _values(name: str, given: object) -> Sequence[Any]:
    """Return the values that a number or a list stands for.

    Raises:
        InputError: If it is neither; a set has no order.
    """
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return range(_checked_count(name, int(given)))
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    require(listed, f"{name}: expected a number of values or a list of them, got {given!r:.80}")
    values = tuple(cast(Sequence[Any], given))
    _checked_count(name, len(values))
    return values


def _checked_count(name: str, count: int) -> int:
    good = 1 <= count <= MAX_VALUES
    require(good, f"{name}: expected 1 to {MAX_VALUES:,} values, got {count:,}")
    return count


@dataclass(frozen=True)
class Point:
    """What was evaluated.

    Attributes:
        values: Name to value.
        costs: Name to cost.
        error: What the function returned; None where it failed.
        failure: Why it failed.
    """

    values: Mapping[str, Any]
    costs: Mapping[str, float]
    error: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        front: The points of which none has both less error and less of each cost, by first cost.
        history: All points in the order in which they were asked for.
    """

    front: tuple[Point, ...]
    history: tuple[Point, ...]


def minimise(
    error: Function,
    space: Space,
    *,
    costs: Mapping[str, Function] | None = None,
    budgets: Mapping[str, float] | None = None,
    evaluations: int = 100,
    search: SearchName = "surrogate",
    population: int | None = None,
    workers: int = 1,
    seed: int = 0,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Found:
    """Search for the choices with the least error at every cost.

    Args:
        error: Expensive: a choice, name to value, to a finite number of at least 0. What raises or
            returns something else is a failed point and does not end the search.
        space: What may be chosen.
        costs: Cheap, of a choice as well: finite and positive, since their axes are logarithmic.
            Each is minimised beside the error. None minimises the error alone.
        budgets: The most of a cost that is ever evaluated.
        evaluations: How often `error` is called, at least 4; fewer where the space is smaller.
        search: `surrogate`, `nsga2`, `smem` or `random`.
        population: Points of the first generation, at least 4; None is a quarter of the
            evaluations, from 4 to 20.
        workers: Processes that compute errors side by side; `error` must pickle for several.
        seed: Of all random numbers: the same seed gives the same points with any number of workers.
        on_point: Called with every point as soon as it is known, to show or to keep it.

    Raises:
        InputError: If a name is unknown, a number out of range, a cost not finite and positive; if
            no choice keeps the budgets, most evaluations fail, or `error` cannot be pickled.
    """
    if search not in ALONE_SEARCHES:
        raise InputError(f"search: expected one of {', '.join(ALONE_SEARCHES)}, got {search!r:.80}")
    _check_whole("evaluations", evaluations, least=4)
    _check_whole("workers", workers, least=1)
    _check_whole("seed", seed, least=0)
    if population is None:
        population = max(4, min(20, evaluations // 4))
    _check_whole("population", population, least=4)
    if workers > 1:
        check_picklable(error, "error")
    problem = _Problem(space, dict(costs or {}), dict(budgets or {}))
    config = SearchConfig(search=search, evaluations=evaluations, population=population)
    history: dict[Genome, Point] = {}

    def evaluate(batch: Batch) -> Floats:
        tasks = {genome: (error, space.decode(genome)) for genome in batch.genomes}
        found: dict[Genome, Point] = {}
        for genome, answer in run_tasks(_call, tasks, Workers(workers)):
            found[genome] = problem.point(genome, answer)
            on_point(found[genome])
            _check_failures([*history.values(), *found.values()])
        history.update({genome: found[genome] for genome in batch.genomes})
        return np.array([_error_of(found[genome]) for genome in batch.genomes])

    run_search(SEARCHES[search](problem, config, seed), evaluate, evaluations)
    points = tuple(history.values())
    _check_failures(points, first=1)
    return Found(_front(points), points)


def _check_whole(name: str, got: object, *, least: int) -> None:
    whole = isinstance(got, int) and not isinstance(got, bool) and got >= least
    require(whole, f"{name}: expected a whole number, at least {least}, got {got!r:.80}")


def _call(error: Function, values: Choice) -> float | str:
    """Return the error of a choice, or why there is none, in a worker."""
    try:
        found = float(error(values))
    except Exception as failure:  # whatever a user's function raises
        return reason_of(failure)
    good = 0 <= found < math.inf
    return found if good else f"expected a finite error of at least 0, got {found}"


def _error_of(point: Point) -> float:
    return math.nan if point.error is None else point.error


def _check_failures(points: Sequence[Point], first: int = FIRST) -> None:
    """Stop where most of at least `first` evaluations have failed.

    Raises:
        InputError: If so; it names the commonest reason.
    """
    reasons = Counter(point.failure for point in points if point.failure is not None)
    failed = reasons.total()
    if len(points) >= first and failed > TOO_MANY * len(points):
        (reason, count), *_ = reasons.most_common(1)
        raise InputError(
            f"{failed} of {len(points)} evaluations failed, so the search stops: {count} x {reason}"
        )


def _front(points: Sequence[Point]) -> tuple[Point, ...]:
    sound = [point for point in points if point.error is not None]
    rows = np.array([[_error_of(point), *point.costs.values()] for point in sound])
    chosen = [sound[index] for index in np.flatnonzero(non_dominated(rows))] if sound else []
    return tuple(sorted(chosen, key=lambda point: (*point.costs.values(), _error_of(point))))


class _Problem:
    """A `Problem` of functions."""

    def __init__(self, space: Space, costs: dict[str, Function], budgets: dict[str, float]):
        for name, limit in budgets.items():
            known = ", ".join(costs) or "none"
            require(name in costs, f"budgets: expected a cost, one of {known}, got {name!r}")
            sound = isinstance(limit, int | float) and 0 < limit < math.inf
            require(sound, f"budgets: expected a positive number for {name}, got {limit!r:.80}")
        self.space, self.functions, self.budgets = space, costs or {ALONE: _one}, budgets
        self.is_alone = not costs
        self._costs: dict[Genome, tuple[float, ...]] = {}
        for name, (least, _) in self._ends.items():
            if least > budgets.get(name, math.inf):
                raise InputError(
                    f"budgets: {name}={budgets[name]}: no choice fits; the least found is {least}"
                )

    @property
    def genes(self) -> Genes:
        """Those of the space."""
        return self.space.genes

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """Least of each cost, and the largest that counts: the budget, where there is one."""
        ends = self._ends
        least = [ends[name][0] for name in self.functions]
        largest = [min(ends[n][1], self.budgets.get(n, math.inf)) for n in self.functions]
        return np.array(least), np.array(largest)

    def costs(self, genomes: Sequence[Genome]) -> Floats:
        """Return the costs, (N, M - 1)."""
        rows = [self._cost(genome) for genome in genomes]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.functions))

    def excess(self, genomes: Sequence[Genome]) -> Floats:
        """Return the largest relative excess over a budget, (N,)."""
        limits = np.array([self.budgets.get(name, math.inf) for name in self.functions])
        over: Floats = np.maximum(self.costs(genomes) / limits - 1.0, 0.0)
        largest: Floats = over.max(axis=1)
        return largest

    def id(self, genome: Genome) -> str:
        """Return the genome as a text: all of them differ."""
        return repr(genome)

    def cheapest(self) -> list[Genome]:
        """Return for each cost a genome than which none found has less of it."""
        return [self._extreme(name)[0] for name in self.functions]

    def features(self, genomes: Sequence[Genome]) -> Floats:
        """Return those of the genes, and the logarithms of the costs between their ends."""
        low, high = np.log(np.array([*self._ends.values()])).T
        scaled = (np.log(self.costs(genomes)) - low) / np.maximum(high - low, 1e-12)
        return np.hstack([self.genes.features(np.array(genomes)), scaled])

    def point(self, genome: Genome, answer: float | str | WorkerDied) -> Point:
        """Return what came of a genome."""
        values = self.space.decode(genome)
        costs = {} if self.is_alone else dict(zip(self.functions, self._cost(genome), strict=True))
        if isinstance(answer, float):
            return Point(values, costs, answer)
        return Point(values, costs, None, answer if isinstance(answer, str) else reason_of(answer))

    def _cost(self, genome: Genome) -> tuple[float, ...]:
        if genome not in self._costs:
            values = self.space.decode(genome)
            found = []
            for name, function in self.functions.items():
                try:
                    value = function(values)
                except Exception as error:  # whatever a user's function raises
                    raise InputError(f"{name} of {values}: {reason_of(error)}") from error
                number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
                if not number or not 0 < value < math.inf:
                    raise InputError(
                        f"{name} of {values}: expected a finite number above 0, got {value!r:.80}"
                    )
                found.append(float(value))
            self._costs[genome] = tuple(found)
        return self._costs[genome]

    @cached_property
    def _ends(self) -> dict[str, tuple[float, float]]:
        """Least and largest value of each cost, as far as found."""
        ends = {}
        for place, name in enumerate(self.functions):
            least, largest = self._extreme(name)
            ends[name] = self._cost(least)[place], self._cost(largest)[place]
        return ends

    def _extreme(self, name: str) -> tuple[Genome, Genome]:
        place, tops = [*self.functions].index(name), self.genes.upper.tolist()

        def cost(genome: Genome) -> float:
            return self._cost(genome)[place]

        if self.space.count <= ENUMERATED:
            every = [*itertools.product(*(range(top + 1) for top in tops))]
            return min(every, key=cost), max(every, key=cost)
        generator = np.random.default_rng(0)
        shares = np.linspace(0, 1, STARTS)
        starts = [self.genes.random_of_size(share, generator) for share in shares]
        low = [descended(start, tops, cost) for start in starts]
        high = [descended(start, tops, lambda genome: -cost(genome)) for start in starts]
        return min(low, key=cost), max(high, key=cost)


def _one(values: Choice) -> float:
    return 1.0
