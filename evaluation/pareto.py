"""Pareto set, hypervolume, and the choice of one model by budget. Every objective is minimised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV

from evaluation.records import COST_NAMES, Cost, ModelRecord


def objectives(record: ModelRecord, costs: Sequence[str] = ("params",)) -> tuple[float, ...]:
    """Return (validation error in [0, 1], then the named costs, see `Cost.count`).

    Raises:
        ValueError: If the record is of a failed network, or a cost has an unknown name or was not
            measured.
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
    finite = ~np.any(np.isnan(points), axis=1)
    no_worse = np.all(points[:, None] <= points[None], axis=2)  # (N, N): row against column
    better = np.any(points[:, None] < points[None], axis=2)
    dominated = np.any(no_worse & better, axis=0)  # no comparison with a NaN holds
    return np.asarray(finite & ~dominated)


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

    worst_error: float
    least: tuple[float, ...]
    reference: tuple[float, ...]
    costs: tuple[str, ...] = ("params",)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Box":
        """Rebuild from the fields as JSON holds them."""
        lists = {name: tuple(data[name]) for name in ("least", "reference", "costs")}
        return cls(worst_error=float(data["worst_error"]), **lists)

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
        alive = [objectives(r, self.costs) for r in records if r.valid_accuracy is not None]
        if not alive:
            return 0.0
        points = np.array(sorted(alive))  # sorted: a sum of floats depends on its order
        span = np.log(np.array(self.reference) / np.array(self.least))
        points[:, 0] /= self.worst_error
        points[:, 1:] = np.log(points[:, 1:] / np.array(self.least)) / np.maximum(span, 1e-12)
        return float(HV(ref_point=np.ones(points.shape[1]))(points.clip(min=0.0)))


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


@dataclass(frozen=True)
class Budgets:
    """What a user allows; None is no limit.

    `min_accuracy` is a fraction in [0, 1], `max_bits` the size of the weights.
    """

    max_params: int | None = None
    max_flops: int | None = None
    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    max_bits: int | None = None

    def of_costs(self) -> dict[str, float | None]:
        """Return the largest value allowed of each cost, by its name in `COST_NAMES`."""
        limits = (self.max_params, self.max_flops, self.max_bits, self.max_latency_ms)
        return dict(zip(COST_NAMES, limits, strict=True))

    def cost_excess(self, cost: Cost) -> float:
        """Return the largest relative excess over a budget on costs, 0 when all are kept.

        A cost without a measured latency keeps no latency budget.
        """
        if self.max_latency_ms is not None and cost.latency_ms is None:
            return math.inf
        limits = {name: top for name, top in self.of_costs().items() if top is not None}
        excesses = [cost.count(name) / max(top, 1e-9) - 1 for name, top in limits.items()]
        return max([0.0, *excesses])

    def excess(self, record: ModelRecord) -> float:
        """Return the largest relative excess over any budget, 0 when the record fits all."""
        shortfall = 0.0
        if self.min_accuracy is not None:
            accuracy = record.test_accuracy_mean or 0.0
            shortfall = (self.min_accuracy - accuracy) / max(self.min_accuracy, 1e-9)
        return max(self.cost_excess(record.cost), shortfall)


def pick(records: Sequence[ModelRecord], budgets: Budgets) -> tuple[ModelRecord, bool]:
    """Return the most accurate retrained record within the budgets, and True.

    If none fits, return the one that exceeds the budgets least, and False. Ties in accuracy go to
    the cheaper network.

    Raises:
        ValueError: If no record is retrained.
    """
    retrained = [r for r in records if r.test_accuracy]
    if not retrained:
        raise ValueError("expected at least one retrained model, got none")
    fitting = [r for r in retrained if budgets.excess(r) <= 0]
    if not fitting:
        return min(retrained, key=lambda r: (budgets.excess(r), r.cost.params, r.id)), False
    return min(fitting, key=lambda r: (-(r.test_accuracy_mean or 0.0), r.cost.params, r.id)), True


def knee(records: Sequence[ModelRecord]) -> ModelRecord:
    """Return the record farthest above the chord of the front, with params on a logarithmic axis.

    Accuracy is the mean test accuracy. With fewer than three records, the most accurate one.

    Raises:
        ValueError: If no record is retrained.
    """
    retrained = sorted(
        (r for r in records if r.test_accuracy),
        key=lambda r: (r.cost.params, r.test_accuracy_mean or 0.0),
    )
    if not retrained:
        raise ValueError("expected at least one retrained model, got none")
    best = max(retrained, key=lambda r: (r.test_accuracy_mean or 0.0, -r.cost.params))
    retrained = [r for r in retrained if r.cost.params <= best.cost.params]
    if len(retrained) < 3:
        return best
    x = np.log([r.cost.params for r in retrained])
    y = np.array([r.test_accuracy_mean or 0.0 for r in retrained])
    x = (x - x[0]) / max(x[-1] - x[0], 1e-12)
    y = (y - y[0]) / max(y[-1] - y[0], 1e-12)
    return retrained[int(np.argmax(y - x))]
