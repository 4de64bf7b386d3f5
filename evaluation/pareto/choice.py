"""Which retrained model to take: by budgets, by a least accuracy or at the knee, and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.cost.costs import COSTS, FILE, kind_of
from evaluation.errors import InputError
from evaluation.pareto.front import Budgets
from evaluation.records import ModelRecord
from evaluation.words import fraction

FILE_BYTES = FILE.name  # a cost of files alone
ACCURACY = "test_accuracy"
POINT = 0.01  # of accuracy
DIGITS = 9  # of a mean accuracy; what is beyond them is rounding error of the mean


@dataclass(frozen=True)
class Wishes:
    """What a user allows and asks for; None is no limit.

    Attributes:
        budgets: The largest allowed costs.
        max_file_bytes: The largest allowed size of the file of weights.
        min_accuracy: The least mean test accuracy, in [0, 1].
        strict: Take the most accurate model, whatever a nearly equal one would save.
        knee: Take the model at the knee.
    """

    budgets: Budgets = Budgets()
    max_file_bytes: int | None = None
    min_accuracy: float | None = None
    strict: bool = False
    knee: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: If a budget is not positive, the accuracy is no fraction, or both the most
                accurate model and the knee are asked for.
        """
        for name, top in self.limits().items():
            if not 0 < top < math.inf:
                raise InputError(f"expected a positive budget on {kind_of(name).unit}, got {top}")
        if self.min_accuracy is not None and not 0 <= self.min_accuracy <= 1:
            raise InputError(f"min_accuracy is a fraction in [0, 1], got {self.min_accuracy}")
        if self.strict and self.knee:
            raise InputError("expected one rule: the most accurate model, or the knee")

    def limits(self) -> dict[str, float]:
        """Return the budgets that were given, by the name of their cost."""
        file = {} if self.max_file_bytes is None else {FILE_BYTES: self.max_file_bytes}
        return self.budgets.of_costs() | file

    def __str__(self) -> str:
        """Say it after the word for models."""
        allowed = [f"at most {amount_of(top, name)}" for name, top in self.limits().items()]
        if self.min_accuracy is not None:
            allowed.append(f"a test accuracy of at least {self.min_accuracy:.4f}")
        return f" with {' and '.join(allowed)}" if allowed else ""

    @property
    def axis(self) -> str:
        """The cost by which models are cheaper or dearer: the first budgeted one, else params."""
        return next(iter(self.limits()), "params")


@dataclass(frozen=True)
class Miss:
    """A wish that a model does not keep: the cost or `test_accuracy`, and by how much.

    `excess` is relative to the limit: 0.5 is half as much again, or half of the accuracy missing.
    """

    name: str
    value: float
    limit: float
    excess: float

    def __str__(self) -> str:
        """Say it in words."""
        if self.name == ACCURACY:
            short = (self.limit - self.value) / POINT
            return f"test accuracy {self.value:.4f} is {short:.2f} points under {self.limit:.4f}"
        value, top = amount_of(self.value, self.name), amount_of(self.limit, self.name)
        over = amount_of(self.value - self.limit, self.name)
        return f"{value}: {over} ({self.excess:,.1%}) over the budget of {top}"


@dataclass(frozen=True)
class Neighbour:
    """The next member of the front on one side of the chosen model; differences are to that.

    `test_accuracy_std` is over its seeds, None with one. `fits` is whether it keeps every wish.
    """

    id: str
    cost: float
    test_accuracy: float
    test_accuracy_std: float | None
    cost_difference: float
    accuracy_difference: float
    fits: bool


@dataclass(frozen=True)
class Choice:
    """A model and the reasons for it.

    Attributes:
        record: The model.
        why: The reason, in words.
        fits: Whether it keeps every wish; if not, it is the nearest.
        among: How many models keep every wish; the choice on test images was made among them.
        misses: The wishes that it does not keep.
        axis: The cost by which models are cheaper or dearer, see `Wishes.axis`.
        costs: Its costs that are known, by name.
        cheaper: The next cheaper member of the front of mean test accuracy against that cost.
        dearer: The next dearer member; it is always the more accurate one.
        unmeasured: Ids of the models for which a budgeted cost is not known, by its name.
    """

    record: ModelRecord
    why: str
    fits: bool
    among: int
    misses: tuple[Miss, ...]
    axis: str
    costs: Mapping[str, float]
    cheaper: Neighbour | None
    dearer: Neighbour | None
    unmeasured: Mapping[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """Return the choice for people, a fact a line."""
        record, seeds = self.record, len(self.record.test_accuracy)
        shown = [
            amount_of(value, name)
            for name, value in self.costs.items()
            if name != "bits" or record.cost.bit_params or self.axis == name
        ]
        mean, std = fraction(record.test_accuracy_mean), fraction(record.test_accuracy_std)
        spread = f"± {std} over {seeds} seeds" if seeds > 1 else "with one seed"
        return [
            *([] if self.fits else ["nothing fits the budgets; the nearest model is:"]),
            f"{record.id}: {', '.join(shown)}",
            f"test accuracy: {mean} {spread}",
            f"why: {self.why}",
            *(f"missed: {miss}" for miss in self.misses),
            self._beside("cheaper", self.cheaper),
            self._beside("dearer", self.dearer),
            *_unknown(self.unmeasured),
            *(
                [f"chosen by test accuracy among {self.among} models, so slightly optimistic"]
                if self.among > 1
                else []
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the row of `pick --json`, less where the weights are."""
        return self.record.row() | {
            FILE_BYTES: self.costs.get(FILE_BYTES),
            "fits": self.fits,
            "among": self.among,
            "why": self.why,
            "misses": [asdict(miss) for miss in self.misses],
            "by_cost": self.axis,
            "neighbours": {
                "cheaper": asdict(self.cheaper) if self.cheaper else None,
                "dearer": asdict(self.dearer) if self.dearer else None,
            },
            "unmeasured": {name: list(ids) for name, ids in self.unmeasured.items()},
        }

    def _beside(self, side: str, other: Neighbour | None) -> str:
        if other is None:
            return f"next {side}: none on the front"
        more, std = amount_of(other.cost_difference, self.axis, "+"), other.test_accuracy_std
        return (
            f"next {side}: {other.id}, {amount_of(other.cost, self.axis)} ({more}), test accuracy "
            f"{other.test_accuracy:.4f}{'' if std is None else f' ± {std:.4f}'} "
            f"({other.accuracy_difference / POINT:+.2f} points)"
            f"{'' if other.fits else ', which does not fit'}"
        )


def amount_of(value: float, cost: str, sign: str = "") -> str:
    """Return a cost for people: counts whole, others with four digits; `+` shows signs."""
    kind = kind_of(cost)
    digits = ",.0f" if kind.whole or abs(value) >= 1000 else ".4g"
    return f"{value:{sign}{digits}} {kind.unit}"


@dataclass(frozen=True)
class _Candidate:
    """A retrained model with the costs that are known of it, and what it keeps."""

    record: ModelRecord
    accuracy: float
    axis: float  # its cost by which it is cheaper or dearer; infinite when not known
    costs: Mapping[str, float]
    misses: tuple[Miss, ...]

    @property
    def fits(self) -> bool:
        return not self.misses

    @property
    def excess(self) -> float:
        return max((miss.excess for miss in self.misses), default=0.0)

    @property
    def cheapness(self) -> tuple[Any, ...]:
        """Order by cost; nothing that another candidate dominates comes before that one."""
        others = (self.costs.get(name, math.inf) for name in (*COSTS, FILE_BYTES))
        return (self.axis, -self.accuracy, *others, self.record.id)


def choose(
    records: Sequence[ModelRecord], wishes: Wishes, file_bytes: Mapping[str, int] | None = None
) -> Choice:
    """Choose one of the retrained records; their order does not matter.

    Accuracy is the mean test accuracy over the seeds. Cheaper is what costs less by `Wishes.axis`:
    the first given budget in the order of `COSTS`, then of own costs and file size, else params.

    - The most accurate model within the budgets, of mean m and standard deviation s over its seeds.
      Every model within the budgets whose mean is at least m - s is a tie, and the cheapest of them
      is chosen. With one seed there is no s, and only equal means tie.
    - `strict`: the most accurate one; of equal means the cheapest.
    - `min_accuracy`: the cheapest one that is at least so accurate.
    - `knee`: of the front of those that fit, the one farthest above the chord from the cheapest to
      the most accurate, with the cost on a logarithmic axis; of fewer than three the most accurate.
    - If nothing fits, the one whose largest excess over a wish, relative to it, is the least.

    Args:
        records: With the latency that counts in their costs; those not retrained are passed over.
        wishes: What is allowed and asked for. A cost that is not known keeps no budget.
        file_bytes: Size of the file of each model, by id, as far as it is known.

    Raises:
        InputError: If no record is retrained, or a budgeted cost is known of none.
    """
    candidates = [
        _candidate(record, wishes, file_bytes or {})
        for record in records
        if record.test_accuracy and math.isfinite(record.test_accuracy_mean or 0.0)
    ]
    if not candidates:
        raise InputError("expected at least one retrained model, got none")
    unmeasured = {
        name: tuple(sorted(c.record.id for c in candidates if name not in c.costs))
        for name in wishes.limits()
        if any(name not in c.costs for c in candidates)
    }
    fitting = [c for c in candidates if c.fits]
    if fitting:
        chosen, why = _best(fitting, wishes, len(candidates))
    else:
        chosen = min(candidates, key=lambda c: (c.excess, *c.cheapness))
        why = "it comes nearest: its largest excess, relative to the budget, is the smallest"
    if chosen.excess == math.inf:
        raise InputError("; ".join(_unknown(unmeasured)))
    front = _front(candidates)
    cheaper = [_beside(chosen, c) for c in front if c.axis < chosen.axis]
    dearer = [_beside(chosen, c) for c in front if c.axis > chosen.axis]
    return Choice(
        record=chosen.record,
        why=why,
        fits=bool(fitting),
        among=len(fitting),
        misses=chosen.misses,
        axis=wishes.axis,
        costs=chosen.costs,
        cheaper=cheaper[-1] if cheaper else None,
        dearer=dearer[0] if dearer else None,
        unmeasured=unmeasured,
    )


def _candidate(record: ModelRecord, wishes: Wishes, file_bytes: Mapping[str, int]) -> _Candidate:
    accuracy, known = round(record.test_accuracy_mean or 0.0, DIGITS), record.cost.known()
    if record.id in file_bytes:
        known[FILE_BYTES] = file_bytes[record.id]
    order = (*COSTS, *sorted(known.keys() - COSTS.keys() - {FILE_BYTES}), FILE_BYTES)
    costs = {name: known[name] for name in order if name in known}
    misses = []
    for name, top in wishes.limits().items():
        value = costs.get(name, math.inf)
        if value > top:
            misses.append(Miss(name, value, top, value / top - 1))
    least = wishes.min_accuracy
    if least is not None and accuracy < round(least, DIGITS):
        misses.append(Miss(ACCURACY, accuracy, least, 1 - accuracy / least))
    return _Candidate(record, accuracy, costs.get(wishes.axis, math.inf), costs, tuple(misses))


def _best(fitting: Sequence[_Candidate], wishes: Wishes, retrained: int) -> tuple[_Candidate, str]:
    """Return the one of those that fit, and why."""
    unit = kind_of(wishes.axis).unit
    part = "" if len(fitting) == retrained else f"{len(fitting)} of "
    models = f"the {part}{retrained} retrained models{wishes}"
    best = min(fitting, key=lambda c: (-c.accuracy, *c.cheapness))
    if len(fitting) == 1:
        return best, f"the only one of {retrained} retrained models{wishes}"
    if wishes.knee:
        return _knee(fitting, models, unit)
    if wishes.strict:
        return best, f"the most accurate of {models}"
    if wishes.min_accuracy is not None:
        return min(fitting, key=lambda c: c.cheapness), f"the cheapest in {unit} of {models}"
    std = best.record.test_accuracy_std
    bar = round(best.accuracy - (std or 0.0), DIGITS)
    ties = [c for c in fitting if c.accuracy >= bar]
    if len(ties) == 1:
        alone = "with one seed only an equal mean would tie"
        if std is not None:
            alone = f"no other is within one standard deviation ({std:.4f}) of it"
        return best, f"the most accurate of {models}; {alone}"
    near = "equal to" if std is None else f"within one standard deviation ({std:.4f}) of"
    return min(ties, key=lambda c: c.cheapness), (
        f"of {models}, {len(ties)} tie: their mean accuracy is {near} the best, "
        f"{best.accuracy:.4f} of {best.record.id}; this is the cheapest of them in {unit}"
    )


def _knee(fitting: Sequence[_Candidate], models: str, unit: str) -> tuple[_Candidate, str]:
    """Return the one farthest above the chord of the front, and why."""
    front = _front(fitting)
    if len(front) < 3:
        return front[-1], f"the most accurate of {models}: a knee needs a front of three"
    x = np.log([c.axis for c in front])
    y = np.array([c.accuracy for c in front])
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    return front[int(np.argmax(above))], (
        f"the knee of {models}: the farthest above the line from the cheapest of the front to the "
        f"most accurate, {unit} on a logarithmic axis"
    )


def _front(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return those that no other dominates in cost and accuracy, cheapest first; of equals one."""
    front: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda c: c.cheapness):
        if candidate.axis < math.inf and (not front or candidate.accuracy > front[-1].accuracy):
            front.append(candidate)
    return front


def _beside(chosen: _Candidate, other: _Candidate) -> Neighbour:
    return Neighbour(
        id=other.record.id,
        cost=other.axis,
        test_accuracy=other.accuracy,
        test_accuracy_std=other.record.test_accuracy_std,
        cost_difference=other.axis - chosen.axis,
        accuracy_difference=round(other.accuracy - chosen.accuracy, DIGITS),
        fits=other.fits,
    )


def _unknown(unmeasured: Mapping[str, Sequence[str]]) -> list[str]:
    """Say which models keep no budget because their cost is not known."""
    kinds = [(kind_of(name), ids) for name, ids in unmeasured.items()]
    return [
        f"no {kind.axis.name} {'is known' if kind.exact else 'was measured'} for {', '.join(ids)}"
        for kind, ids in kinds
    ]
