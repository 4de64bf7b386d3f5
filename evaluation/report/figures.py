"""What the interactive figures of the page show, as plain JSON data that `page.js` draws.

Whatever a reader sees as text is written here; the script only places it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from evaluation.cost.costs import FILE, kind_of
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.sizes import BITS, FLOPS, PARAMS
from evaluation.pareto.choice import amount_of
from evaluation.pareto.front import pareto_set
from evaluation.records import Measured, ModelRecord
from evaluation.report.findings import Report
from evaluation.report.plots import BASELINE_STYLES, FRONT_COLOUR, SEARCH_COLOURS, visible_range
from evaluation.words import kilobytes, milliseconds, percent

JSON = dict[str, Any]
FRONT = "Pareto set"
SYMBOLS = {"s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down"}  # of plotly
FIRST_AXES = (PARAMS.name, FLOPS.name, LATENCY.name, FILE.name, BITS.name)  # of every report


def figures(report: Report) -> JSON:
    """Return the data of the figures.

    A network that can be pointed at has a number: its place in `networks`, with its id and what is
    known of it. The first `members` are those of the front and of the baselines; `first` is the one
    to show first. A series of points has those numbers, the places on every cost axis (null where
    that cost is not known), accuracies in [0, 1], and standard deviations (null for fewer than two
    seeds).
    """
    networks, axes = _Networks(report), axes_of(report)
    front = networks.numbers(FRONT, report.front, report.measured)
    front_of = {record.id: number for record, number in zip(report.front, front, strict=True)}
    baselines = [
        (networks.numbers(baseline.label, baseline.records, report.measured), baseline)
        for baseline in report.baselines
    ]
    members = len(networks.shown)
    searches: list[JSON] = []
    groups = zip(searches_of(report).items(), SEARCH_COLOURS, strict=True)
    for (label, records), colour in groups:
        alive = [record for record in records if record.valid_accuracy is not None]
        numbers = networks.numbers(label, alive, {}, front_of if not searches else {})
        searches.append(_search(axes, numbers, alive) | {"label": label, "colour": colour})
    style = {"label": FRONT, "colour": FRONT_COLOUR, "symbol": "circle"}
    searches.append(_found(axes, report, front) | style)
    retrained = [_retrained(axes, front, report.front, report.measured) | style]
    for order, (numbers, baseline) in enumerate(baselines):
        colour, marker = BASELINE_STYLES[order % len(BASELINE_STYLES)]
        style = {"label": baseline.label, "colour": colour, "symbol": SYMBOLS[marker]}
        retrained.append(_retrained(axes, numbers, baseline.records, report.measured) | style)
    tested = [
        number for number, record in zip(front, report.front, strict=True) if record.test_accuracy
    ]
    return {
        "axes": [
            asdict(kind_of(cost).axis) | {"cost": cost} for cost in axes if _known(report, cost)
        ],
        "networks": networks.shown,
        "members": members,
        "first": max(tested, default=0),
        "searches": _panel(searches),
        "retrained": _panel(retrained),
        "growth": [
            {"label": label, "shares": shares, "colour": colour}
            for (label, shares), colour in zip(report.growth, SEARCH_COLOURS, strict=False)
        ],
    }


def searches_of(report: Report) -> dict[str, tuple[ModelRecord, ...]]:
    """Return the networks that the search and random search evaluated, by label."""
    labels = [label for label, _ in report.hypervolume[:2]]
    labels += ["search", "random search"][len(labels) :]
    if labels[0] == labels[1]:  # the search may be random itself
        labels[1] += ", once more"
    return dict(zip(labels, (report.archive, report.random_archive), strict=True))


def latency_of(record: ModelRecord, measured: Measured | None) -> tuple[float | None, bool]:
    """Return the latency in ms, and whether it was measured of the whole network.

    It is the estimate that the search worked with where nothing was measured, None without either.
    """
    if measured is not None and measured.latency_ms is not None:
        return measured.latency_ms, True
    return record.cost.latency_ms, False


def costs_of(record: ModelRecord, measured: Measured | None) -> dict[str, float | None]:
    """Return every cost of a network by its name, None where it is not known."""
    known: dict[str, float | None] = dict.fromkeys(FIRST_AXES) | record.cost.known()
    known[LATENCY.name] = latency_of(record, measured)[0]
    known[FILE.name] = None if measured is None else measured.file_bytes
    return known


def other_costs(records: Iterable[ModelRecord]) -> list[str]:
    """Return the names of the costs of these records that not every record speaks of."""
    return list(dict.fromkeys(name for record in records for name in record.cost.others()))


def axes_of(report: Report) -> list[str]:
    """Return the names of all costs that may have an axis."""
    return [*FIRST_AXES, *other_costs(_everyone(report))]


def _everyone(report: Report) -> tuple[ModelRecord, ...]:
    baselines = [record for baseline in report.baselines for record in baseline.records]
    return (*report.front, *report.archive, *report.random_archive, *baselines)


def _known(report: Report, cost: str) -> bool:
    """Tell whether there is anything to draw against a cost; bits only for 1-bit networks."""
    everyone = _everyone(report)
    if cost == BITS.name:
        return any(record.cost.bit_params for record in everyone)
    return any(costs_of(r, report.measured.get(r.id)).get(cost) is not None for r in everyone)


@dataclass
class _Networks:
    """The networks that a reader can point at, numbered in the order of arrival."""

    report: Report
    shown: list[JSON] = field(default_factory=list)

    def numbers(
        self,
        group: str,
        records: Iterable[ModelRecord],
        measured: Mapping[str, Measured],
        known: Mapping[str, int] | None = None,
    ) -> list[int]:
        """Number records; those whose id is in `known` keep the number that they have."""
        numbers = []
        for record in records:
            number = (known or {}).get(record.id)
            if number is None:
                number = len(self.shown)
                self.shown.append(self._shown(group, record, measured.get(record.id)))
            numbers.append(number)
        return numbers

    def _shown(self, group: str, record: ModelRecord, measured: Measured | None) -> JSON:
        """Return what is shown of a network: (name, text) pairs and (place, caption) of cells."""
        places = {block.name: place for place, block in enumerate(self.report.blocks)}
        cells = [
            (places[name], name if uses == 1 else f"{name} × {uses}")
            for name, uses in Counter(record.blocks).items()
            if name in places
        ]
        return {"id": record.id, "group": group, "facts": _facts(record, measured), "cells": cells}


def _facts(record: ModelRecord, measured: Measured | None) -> list[tuple[str, str]]:
    """Return (name, text) for whatever is known of a network."""
    cost, others, facts = record.cost, record.cost.others(), []
    facts += [("params", f"{cost.params:,}"), ("FLOPs", f"{cost.flops:,}")]
    if cost.bit_params:
        facts.append(("bits", f"{cost.model_bits:,}"))
    latency, whole = latency_of(record, measured)
    if latency is not None:
        facts.append(("latency", f"{milliseconds(latency)} ms{'' if whole else ', estimated'}"))
    if measured is not None and measured.spread_ms is not None:
        facts.append(("quartile range", f"{milliseconds(measured.spread_ms, 2)} ms"))
    if measured is not None and measured.file_bytes is not None:
        facts.append(("file size", kilobytes(measured.file_bytes)))
    facts += [(kind_of(name).axis.name, amount_of(value, name)) for name, value in others.items()]
    if record.valid_accuracy is not None:
        facts.append(("validation accuracy", percent(record.valid_accuracy)))
    if record.test_accuracy:
        std = record.test_accuracy_std
        noise = "" if std is None else f" ± {100 * std:.2f}"
        facts.append(("test accuracy", percent(fmean(record.test_accuracy)) + noise))
        each = zip(record.seeds, record.test_accuracy, strict=True)
        facts.append(("seeds", ", ".join(f"{seed}: {percent(value)}" for seed, value in each)))
    if record.blocks:
        facts.append(("blocks", " · ".join(record.blocks)))
    if record.genome:
        facts.append(("genome", " ".join(map(str, record.genome))))
    return facts


def _series(
    axes: Sequence[str],
    numbers: Sequence[int],
    points: Sequence[tuple[dict[str, float | None], float]],
    deviations: Sequence[float | None] = (),
) -> JSON:
    """Return the points of (costs, accuracy) of the networks of these numbers."""
    return {
        "networks": numbers,
        "costs": {cost: [costs.get(cost) for costs, _ in points] for cost in axes},
        "accuracy": [accuracy for _, accuracy in points],
        "deviations": deviations,
    }


def _search(axes: Sequence[str], numbers: Sequence[int], alive: Sequence[ModelRecord]) -> JSON:
    """Return every network that did not fail, and for each cost the steps of the best so far."""
    points = [(costs_of(record, None), record.valid_accuracy or 0.0) for record in alive]
    steps = {cost: _steps(alive, cost) for cost in axes if cost != FILE.name}
    return _series(axes, numbers, points) | {"steps": steps}


def _steps(alive: Sequence[ModelRecord], cost: str) -> list[tuple[float, float]]:
    """Return the corners (cost, accuracy) of the best accuracy so far, up to the largest cost."""
    placed = [(record.cost.known().get(cost), record) for record in alive]
    known = [(place, record) for place, record in placed if place is not None]
    best = pareto_set([record for _, record in known], (cost,))
    corners = [(r.cost.count(cost), r.valid_accuracy or 0.0) for r in best]
    return [*corners, (max(place for place, _ in known), corners[-1][1])] if corners else []


def _found(axes: Sequence[str], report: Report, numbers: Sequence[int]) -> JSON:
    """Return the Pareto set as the search saw it: by validation accuracy."""
    points = [
        (number, costs_of(record, report.measured.get(record.id)), record.valid_accuracy)
        for number, record in zip(numbers, report.front, strict=True)
    ]
    shown = [(n, costs, accuracy) for n, costs, accuracy in points if accuracy is not None]
    return _series(
        axes, [n for n, _, _ in shown], [(costs, accuracy) for _, costs, accuracy in shown]
    )


def _retrained(
    axes: Sequence[str],
    numbers: Sequence[int],
    records: Sequence[ModelRecord],
    measured: Mapping[str, Measured],
) -> JSON:
    """Return mean test accuracies with one standard deviation."""
    tested = [(n, r) for n, r in zip(numbers, records, strict=True) if r.test_accuracy]
    points = [(costs_of(r, measured.get(r.id)), fmean(r.test_accuracy)) for _, r in tested]
    return _series(axes, [n for n, _ in tested], points, [r.test_accuracy_std for _, r in tested])


def _panel(series: list[JSON]) -> JSON:
    """Return series that have points, with what part of the axis of accuracies to show first."""
    shown = [one for one in series if one["networks"]]
    place = visible_range(accuracy for one in shown for accuracy in one["accuracy"])
    low, high, note = place or (None, None, "")
    return {"series": shown, "range": place and [low, high], "note": note}
