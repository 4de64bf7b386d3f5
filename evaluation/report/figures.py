"""The interactive figures of the page: accuracy against a cost of choice, and how fronts grew."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from evaluation.cost.costs import FILE, kind_of
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.sizes import BITS, FLOPS, PARAMS
from evaluation.pareto.choice import amount_of
from evaluation.records import ModelMeasurement, ModelRecord
from evaluation.report.findings import Report
from evaluation.report.plots import BASELINE_STYLES, FRONT_COLOUR, SEARCH_COLOURS, visible_range
from evaluation.words import kilobytes, milliseconds, percent

FRONT = "Pareto set"
SYMBOLS = {"s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down"}  # of plotly
FIRST_AXES = (PARAMS.name, FLOPS.name, LATENCY.name, FILE.name, BITS.name)  # of every report
HOVER_CHARACTERS = 46
PANEL_PX, PANEL_GAP = 330, 0.04
LAYOUT = {
    "template": "plotly_white",
    "showlegend": True,
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    "margin": {"l": 70, "r": 14, "t": 50, "b": 70},
}


@dataclass(frozen=True)
class _Series:
    """A trace, and its x and y on the axis of each cost; an x is None where it is not known."""

    trace: go.Scatter
    at: Mapping[str, tuple[Sequence[float | None], Sequence[float]]]


def cost_figure(report: Report) -> go.Figure | None:
    """Draw the searches, below them what is retrained, and a menu of costs for the axis of both.

    The point of a member carries its place among the front and then the baselines. None where
    there is nothing to draw.
    """
    axes = axes_of(report)
    titled = {
        "validation accuracy in the search": _searches(report, axes),
        "mean test accuracy ± one std": _retrained(report, axes),
    }
    panels = [(title, panel) for title, panel in titled.items() if panel]
    if not panels:
        return None
    every = [series for _, panel in panels for series in panel]
    menu = [_choice(cost, every) for cost in axes]
    figure = go.Figure(layout=LAYOUT | {"height": 120 + PANEL_PX * len(panels)})
    figure.update_xaxes(type="log", nticks=5, anchor=f"y{len(panels)}", showline=True)
    figure.update_xaxes(showspikes=True, spikemode="across", spikethickness=1)
    figure.update_layout(
        updatemenus=[{"buttons": menu, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}]
    )
    for number, (title, panel) in enumerate(panels, start=1):
        points = [y for one in panel if one.trace.mode == "markers" for y in one.at[axes[0]][1]]
        low, high, note = visible_range(points) or (None, None, "")
        bottom, top = 1 - number / len(panels) + PANEL_GAP, 1 - (number - 1) / len(panels)
        axis = {"title": title, "tickformat": "~%", "zeroline": False}
        axis |= {"range": [low, high], "domain": [bottom, top]}
        figure.update_layout({f"yaxis{number}": axis})
        if note:
            place = {"xref": "paper", "x": 0, "yref": "paper", "y": bottom, "yanchor": "bottom"}
            figure.add_annotation(text=note, showarrow=False, bgcolor="white", **place)
        for series in panel:
            x, y = series.at[axes[0]]
            figure.add_trace(series.trace.update(x=x, y=y, yaxis=f"y{number}"))
    return figure.update_layout(menu[0]["args"][1])


def growth_figure(report: Report) -> go.Figure | None:
    """Draw the hypervolume after every evaluation of each search; None where it is not known."""
    if not report.growth:
        return None
    figure = go.Figure(layout=LAYOUT | {"height": 350, "hovermode": "x unified"})
    figure.update_xaxes(title="evaluated networks", rangemode="tozero", zeroline=False)
    figure.update_yaxes(tickformat="~%", hoverformat=".2%", zeroline=False)
    for (label, shares), colour in zip(report.growth, SEARCH_COLOURS, strict=False):
        evaluations = list(range(1, len(shares) + 1))
        figure.add_scatter(x=evaluations, y=shares, mode="lines", **_line(label, colour))
    return figure


def searches_of(report: Report) -> dict[str, tuple[ModelRecord, ...]]:
    """Return the networks that the search and random search evaluated, by label."""
    labels = [label for label, _ in report.hypervolume[:2]]
    labels += ["search", "random search"][len(labels) :]
    if labels[0] == labels[1]:  # the search may be random itself
        labels[1] += ", once more"
    return dict(zip(labels, (report.archive, report.random_archive), strict=True))


def members_of(report: Report) -> list[tuple[str, tuple[ModelRecord, ...]]]:
    """Return the networks that a reader may choose, by group: the front, then the baselines."""
    return [(FRONT, report.front), *((group.label, group.records) for group in report.baselines)]


def latency_of(record: ModelRecord, measured: ModelMeasurement | None) -> tuple[float | None, bool]:
    """Return the latency in ms, and whether it was measured of the whole network.

    It is the estimate that the search worked with where nothing was measured, None without either.
    """
    if measured is not None and measured.latency_ms is not None:
        return measured.latency_ms, True
    return record.cost.latency_ms, False


def costs_of(record: ModelRecord, measured: ModelMeasurement | None) -> dict[str, float | None]:
    """Return every cost of a network by its name, None where it is not known."""
    known: dict[str, float | None] = dict.fromkeys(FIRST_AXES) | record.cost.known()
    known[LATENCY.name] = latency_of(record, measured)[0]
    known[FILE.name] = None if measured is None else measured.file_bytes
    return known


def other_costs(records: Iterable[ModelRecord]) -> list[str]:
    """Return the names of the costs of these records that not every record speaks of."""
    return list(dict.fromkeys(name for record in records for name in record.cost.others()))


def axes_of(report: Report) -> list[str]:
    """Return the costs that there is something to draw against; bits only of 1-bit networks."""
    baselines = [record for baseline in report.baselines for record in baseline.records]
    everyone = (*report.front, *report.archive, *report.random_archive, *baselines)
    costs = [costs_of(record, report.measured.get(record.id)) for record in everyone]
    return [
        name
        for name in (*FIRST_AXES, *other_costs(everyone))
        if any(cost.get(name) is not None for cost in costs)
        and (name != BITS.name or any(record.cost.bit_params for record in everyone))
    ]


def facts(record: ModelRecord, measured: ModelMeasurement | None) -> dict[str, str]:
    """Return whatever is known of a network, for a reader, by what it is."""
    cost = record.cost
    known = {"params": f"{cost.params:,}", "FLOPs": f"{cost.flops:,}"}
    if cost.bit_params:
        known["bits"] = f"{cost.model_bits:,}"
    latency, whole = latency_of(record, measured)
    if latency is not None:
        known["latency"] = f"{milliseconds(latency)} ms{'' if whole else ', estimated'}"
    if measured is not None and measured.spread_ms is not None:
        known["quartile range"] = f"{milliseconds(measured.spread_ms, 2)} ms"
    if measured is not None and measured.file_bytes is not None:
        known["file size"] = kilobytes(measured.file_bytes)
    for name, value in cost.others().items():
        known[kind_of(name).axis.name] = amount_of(value, name)
    if record.valid_accuracy is not None:
        known["validation accuracy"] = percent(record.valid_accuracy)
    if record.test_accuracy:
        std = record.test_accuracy_std
        noise = "" if std is None else f" ± {100 * std:.2f}"
        known["test accuracy"] = percent(fmean(record.test_accuracy)) + noise
        each = zip(record.seeds, record.test_accuracy, strict=True)
        known["seeds"] = ", ".join(f"{seed}: {percent(value)}" for seed, value in each)
    if record.blocks:
        known["blocks"] = " · ".join(record.blocks)
    if record.genome:
        known["genome"] = " ".join(map(str, record.genome))
    return known


def _choice(cost: str, every: Sequence[_Series]) -> dict[str, Any]:
    """Return the entry of the menu that moves every series to the axis of a cost."""
    axis = kind_of(cost).axis
    points = [series.at[cost] for series in every]
    layout = {"title.text": _plain(axis.title), "tickformat": axis.format, "autorange": True}
    layout["ticksuffix"] = axis.suffix
    moved = {"x": [x for x, _ in points], "y": [y for _, y in points]}
    return {
        "label": _plain(axis.name),
        "method": "update",
        "args": [moved, {f"xaxis.{key}": value for key, value in layout.items()}],
    }


def _searches(report: Report, axes: Sequence[str]) -> list[_Series]:
    """Return of each search its best accuracy at every cost and all networks, and the front."""
    shown: list[_Series] = []
    for (label, records), colour in zip(searches_of(report).items(), SEARCH_COLOURS, strict=True):
        alive = [record for record in records if record.valid_accuracy is not None]
        line = go.Scatter(mode="lines", hoverinfo="skip", **_line(label, colour))
        shown.append(_Series(line, {cost: _steps(alive, cost) for cost in axes}))
        dots = _points(report, axes, label, alive, {}, [r.valid_accuracy or 0.0 for r in alive])
        pale = {"color": colour, "size": 6, "opacity": 0.3}
        dots.trace.update(marker=pale, unselected_marker_opacity=0.3, showlegend=False)
        shown.append(dots)
    found = [record for record in report.front if record.valid_accuracy is not None]
    accuracies = [record.valid_accuracy or 0.0 for record in found]
    front = _points(report, axes, FRONT, found, report.measured, accuracies)
    front.trace.update(marker_color=FRONT_COLOUR)
    return [series for series in (*shown, front) if series.at[axes[0]][0]]


def _retrained(report: Report, axes: Sequence[str]) -> list[_Series]:
    """Return mean test accuracies with one standard deviation."""
    groups = [(FRONT, report.front, (FRONT_COLOUR, "circle"))]
    for order, baseline in enumerate(report.baselines):
        colour, marker = BASELINE_STYLES[order % len(BASELINE_STYLES)]
        groups.append((baseline.label, baseline.records, (colour, SYMBOLS[marker])))
    shown = []
    for label, records, (colour, symbol) in groups:
        tested = [record for record in records if record.test_accuracy]
        means = [fmean(record.test_accuracy) for record in tested]
        stds = [record.test_accuracy_std for record in tested]
        series = _points(report, axes, label, tested, report.measured, means)
        series.trace.update(marker_color=colour, marker_symbol=symbol, showlegend=label != FRONT)
        series.trace.update(error_y={"type": "data", "array": stds, "thickness": 1.3, "width": 4})
        shown.append(series)
    return [series for series in shown if series.at[axes[0]][0]]


def _points(
    report: Report,
    axes: Sequence[str],
    label: str,
    records: Sequence[ModelRecord],
    measured: Mapping[str, ModelMeasurement],
    accuracies: Sequence[float],
) -> _Series:
    """Return records as points that say what is known of them, and which member they are."""
    members = [(group, r.id) for group, records in members_of(report) for r in records]
    places = {member: place for place, member in enumerate(members)}
    costs = [costs_of(record, measured.get(record.id)) for record in records]
    trace = go.Scatter(
        mode="markers",
        marker={"size": 10, "line": {"color": "white", "width": 1}},
        selected_marker_size=18,
        unselected_marker_opacity=1,
        customdata=[places.get((label, r.id), places.get((FRONT, r.id))) for r in records],
        hoverinfo="text",
        hovertext=[_hover(label, record, measured.get(record.id)) for record in records],
        hoverlabel={"bgcolor": "white", "align": "left"},
        name=_plain(label),
        legendgroup=_plain(label),
    )
    return _Series(trace, {name: ([cost.get(name) for cost in costs], accuracies) for name in axes})


def _steps(alive: Sequence[ModelRecord], cost: str) -> tuple[list[float], list[float]]:
    """Return the known costs, ascending, and the best accuracy up to each."""
    known = [(record.cost.known().get(cost), record.valid_accuracy or 0.0) for record in alive]
    points = sorted((place, accuracy) for place, accuracy in known if place is not None)
    return [x for x, _ in points], list(accumulate((y for _, y in points), max))


def _line(label: str, colour: str) -> dict[str, Any]:
    line = {"shape": "hv", "color": colour, "width": 2}
    return {"name": _plain(label), "legendgroup": _plain(label), "line": line}


def _hover(label: str, record: ModelRecord, measured: ModelMeasurement | None) -> str:
    """Return what plotly shows at a point, in short lines."""
    said = [f"{name}: {text}" for name, text in facts(record, measured).items()]
    texts = [textwrap.wrap(text, HOVER_CHARACTERS) for text in (record.id, label, *said)]
    first, *rest = ["<br>  ".join(map(_plain, lines)) for lines in texts]
    return "<br>".join([f"<b>{first}</b>", *rest])


def _plain(text: str) -> str:
    """Keep a text from being read as the little HTML that plotly knows."""
    return escape(text, quote=False)
