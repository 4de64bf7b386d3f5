"""Pareto set, hypervolume, and budgets on costs. Every objective is minimised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.cost.costs import COSTS, kind_of
from evaluation.parsing import Positive, parsed
from evaluation.records import Cost, ModelRecord, Name

AT_ONCE = 500  # points compared with all others: the memory is that of so many rows


def objectives(record: ModelRecord, costs: Sequence[str] = ("params",)) -> tuple[float, ...]:
    """Return (validation error in [0, 1], then the named costs, see `Cost.count`).

    Raises:
        ValueError: If the record is of a failed network, or a cost is not known of it.
    """
    if record.valid_accuracy is None:
        raise ValueError(f"network {record.id} has no accuracy: {record.failure}")
    return (1.0 - record.valid_accuracy, *(float(record.cost.count(name)) for name in costs))


def non_dominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mark the points (N, M) that no other point dominates.

    A point dominates another if it is nowhere worse and somewhere better; equal points do not
    dominate each other. A point that holds a NaN is never marked and dominates nothing.

    Returns:
        Mask (N,).
    """
    kept: NDArray[np.bool_] = ~np.any(np.isnan(points), axis=1)
    for first in range(0, len(points), AT_ONCE):
        part = points[None, first : first + AT_ONCE]
        no_worse = np.all(points[:, None] <= part, axis=2)  # (N, part): row against column
        better = np.any(points[:, None] < part, axis=2)
        # No comparison with a NaN holds.
        kept[first : first + AT_ONCE] &= ~np.any(no_worse & better, axis=0)
    return kept


def pareto_set(
    records: Sequence[ModelRecord], costs: Sequence[str] = ("params",)
) -> list[ModelRecord]:
    """Return the records that no other dominates, cheapest first; failed ones never stand on it.

    Of records with equal objectives the one with the smallest id stays, so that the answer does
    not depend on the order of arrival.
    """
    alive = sorted((r for r in records if r.valid_accuracy is not None), key=lambda r: r.id)
    unique = list({objectives(r, costs): r for r in reversed(alive)}.values())
    if not unique:
        return []
    mask = non_dominated(np.array([objectives(r, costs) for r in unique]))
    front = [record for record, keep in zip(unique, mask, strict=True) if keep]
    return sorted(front, key=lambda r: objectives(r, costs)[::-1])


@dataclass(frozen=True)
class Box:
    """The box in which hypervolume is measured, fixed before a search so that runs compare.

    The error runs from 0 to `worst_error`, each cost on a logarithmic axis from its least value to
    its reference: the area as one sees it in the picture of the front.

    Attributes:
        worst_error: The error of guessing, 1 - 1 / classes.
        least: Least value of each cost in the space.
        reference: Reference value of each cost: the hard budget, or the space's largest.
        costs: Names of the costs.
    """

    worst_error: Positive
    least: tuple[Positive, ...]
    reference: tuple[Positive, ...]
    costs: tuple[Name, ...] = ("params",)

    def __post_init__(self) -> None:
        """Check the numbers of values.

        Raises:
            ValueError: If there is not one of each for every cost.
        """
        if not self.costs or not len(self.costs) == len(self.least) == len(self.reference):
            raise ValueError(f"a box has a least and a reference value for each cost, got {self}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Box":
        """Rebuild from the fields as JSON holds them.

        Raises:
            ValueError: If they are those of no box.
        """
        return parsed(cls, data, "the box of a hypervolume")

    def describe(self) -> str:
        """Say in a sentence where the reference point lies."""
        ends = zip(self.costs, self.least, self.reference, strict=True)
        axes = ", ".join(f"{name} {_figure(low)} to {_figure(high)}" for name, low, high in ends)
        return (
            f"The box, fixed before the search: validation error 0 to {self.worst_error:.3f} "
            f"(guessing), and on a logarithmic axis {axes} (the space's least, and the budget or "
            "the space's largest)."
        )

    def hypervolume(self, records: Sequence[ModelRecord]) -> float:
        """Return the share of the box that the records dominate, in [0, 1].

        Failed records, and those beyond the reference, count for nothing.
        """
        from pymoo.indicators.hv import HV  # takes a third of a second to import

        alive = [objectives(r, self.costs) for r in records if r.valid_accuracy is not None]
        if not alive:
            return 0.0
        points = np.array(sorted(alive))  # sorted: a sum of floats depends on its order
        span = np.log(np.array(self.reference) / np.array(self.least))
        points[:, 0] /= self.worst_error
        points[:, 1:] = np.log(points[:, 1:] / np.array(self.least)) / np.maximum(span, 1e-12)
        return float(HV(ref_point=np.ones(points.shape[1]))(points.clip(min=0.0)))

    def growth(self, records: Sequence[ModelRecord]) -> tuple[float, ...]:
        """Return the hypervolume after each of the records, in their order."""
        front: list[ModelRecord] = []
        points = np.zeros((0, 1 + len(self.costs)))
        shares: list[float] = []
        for record in records:
            if record.valid_accuracy is not None:
                point = np.array(objectives(record, self.costs))
                if not np.any(np.all(points <= point, axis=1)):  # else nothing is gained
                    front = pareto_set([*front, record], self.costs)
                    points = np.array([objectives(one, self.costs) for one in front])
                    shares.append(self.hypervolume(front))
                    continue
            shares.append(shares[-1] if shares else 0.0)
        return tuple(shares)


def _figure(value: float) -> str:
    """Write a count whole, and what is measured with three digits after the point."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def spread(records: Sequence[ModelRecord], count: int) -> list[ModelRecord]:
    """Return at most `count` records, spread evenly over the logarithm of params.

    The cheapest and the most accurate are always among them; the order is by params.
    """
    ordered = sorted(records, key=lambda r: (r.cost.params, r.id))
    if count == 0:
        return []
    if len(ordered) <= count:
        return ordered
    best = max(ordered, key=lambda r: (r.valid_accuracy or 0.0, -r.cost.params))
    chosen = [best] if count == 1 or best is ordered[0] else [ordered[0], best]
    low, high = math.log(ordered[0].cost.params), math.log(ordered[-1].cost.params)
    for target in np.linspace(low, high, count)[1:]:
        left = [r for r in ordered if r not in chosen]
        if len(chosen) < count:
            chosen.append(min(left, key=lambda r: abs(math.log(r.cost.params) - target)))
    return sorted(chosen, key=lambda r: (r.cost.params, r.id))


@dataclass(frozen=True, init=False, repr=False)
class Budgets:
    """The largest costs that a user allows.

    Attributes:
        limits: The largest value of each cost that has a budget; ours first, in their order.
    """

    limits: tuple[tuple[str, float], ...]

    def __init__(self, **limits: float | None):
        """Take `max_<name of a cost>=limit`, also of a user's own costs; None is no limit."""
        given = {name.removeprefix("max_"): top for name, top in limits.items() if top is not None}
        wrong = [name for name in limits if not name.startswith("max_")]
        if wrong:
            raise TypeError(f"expected budgets such as max_params, got {', '.join(wrong)}")
        names = [*(name for name in COSTS if name in given), *sorted(given.keys() - COSTS.keys())]
        object.__setattr__(self, "limits", tuple((name, given[name]) for name in names))

    def __repr__(self) -> str:
        return f"Budgets({', '.join(f'max_{name}={top}' for name, top in self.limits)})"

    def of_costs(self) -> dict[str, float]:
        """Return the largest value allowed of each cost that has a budget, by its name."""
        return dict(self.limits)

    def exact(self) -> "Budgets":
        """Return the budgets on costs that are known before anything is measured."""
        return Budgets(**{f"max_{name}": top for name, top in self.limits if kind_of(name).exact})

    def cost_excess(self, cost: Cost) -> float:
        """Return the largest relative excess over a budget on costs, 0 when all are kept.

        A cost that is not known keeps no budget.
        """
        known = cost.known()
        if any(name not in known for name, _ in self.limits):
            return math.inf
        return max([0.0, *(known[name] / max(top, 1e-9) - 1 for name, top in self.limits)])
