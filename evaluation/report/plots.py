"""Fronts drawn as PNG."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox, BboxBase

from evaluation.cost.costs import COSTS
from evaluation.pareto.front import pareto_set
from evaluation.records import ModelRecord
from evaluation.words import count, percent

FRONT_COLOUR, SEARCH_COLOURS = "#1d5fbf", ("#1d5fbf", "#d97706")
BASELINE_STYLES = (("#0f8a6a", "s"), ("#8b3a8b", "D"), ("#b91c1c", "^"), ("#4b5563", "v"))
GREY, GRID_GREY = "#6b7280", "#e5e7eb"
SHORT_ID = 6  # characters of an id beside its point
NAME_OFFSETS = tuple((x, y) for y in (3, -9, 13, -19, 23, -29) for x in (7, -7))  # points


def visible_range(values: Iterable[float]) -> tuple[float, float, str] | None:
    """Return where an axis of accuracies begins and ends, and a note about those below it.

    None where all belong together: nothing is cut unless a tenth or less of the values lies
    farther off than the rest spans.
    """
    values = sorted(values)
    for hidden in range(len(values) // 10, 0, -1):
        span = values[-1] - values[hidden]
        if 0 < span < values[hidden] - values[hidden - 1]:
            note = f"not shown: {hidden} at or below {percent(values[hidden - 1])}"
            return values[hidden] - 0.08 * span, values[-1] + 0.06 * span, note
    return None


def draw_fronts(
    front: Sequence[ModelRecord],
    searches: Mapping[str, Sequence[ModelRecord]],
    *,
    baselines: Mapping[str, Sequence[ModelRecord]],
    cost: str,
) -> bytes:
    """Draw accuracy against one cost on a logarithmic axis as PNG; equal input, equal bytes.

    Left the validation accuracy of every network that each search evaluated, with a line for the
    best at every cost; right the mean test accuracy of what is retrained, with one std.

    Args:
        front: The Pareto set.
        searches: Evaluated networks by label, at most two searches; failed ones are left out.
        baselines: Retrained networks by label.
        cost: Name of the cost, one of `COSTS` that every record knows.
    """
    figure = Figure(figsize=(12, 4.7), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_searches(left, front, searches, cost)
    _draw_retrained(right, front, baselines, cost)
    for axes in (left, right):
        _dress(axes, cost)
    figure.draw_without_rendering()  # the layout must stand before names find room
    named = [record for record in front if record.test_accuracy]
    others = [record for group in baselines.values() for record in group if record.test_accuracy]
    _name_points(right, named, others, cost)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_searches(
    axes: Axes,
    front: Sequence[ModelRecord],
    searches: Mapping[str, Sequence[ModelRecord]],
    cost: str,
) -> None:
    """Draw every network that did not fail, and for each search the best accuracy by cost."""
    axes.set_title("Search: validation accuracy after proxy training", fontsize=11, loc="left")
    everyone = [record for records in searches.values() for record in _alive(records)]
    if not everyone:
        return
    end = max(record.cost.count(cost) for record in everyone)
    for order, (label, records) in enumerate(searches.items()):
        alive, best = _alive(records), pareto_set(records, (cost,))
        if not best:
            continue
        colour = SEARCH_COLOURS[order]
        axes.scatter(*_points(alive, cost), s=13, c=colour, alpha=0.3, linewidths=0, zorder=3)
        x, y = _points(best, cost)
        line = axes.step([*x, end], [*y, y[-1]], where="post", c=colour, lw=1.8, zorder=5 - order)
        line[0].set_label(_plain(label))
    if front:
        x, y = _points(_alive(front), cost)
        axes.scatter(x, y, s=32, c=FRONT_COLOUR, edgecolors="w", zorder=6, label="Pareto set")
    _cut_stragglers(axes, _points(everyone, cost)[1])


def _cut_stragglers(axes: Axes, values: Iterable[float]) -> None:
    """End the axis above values that lie far off, and say so."""
    shown = visible_range(values)
    if shown is None:
        return
    low, high, note = shown
    axes.set_ylim(low, high)
    axes.annotate(
        note, (0.01, 0.02), xycoords="axes fraction", fontsize=8, color=GREY, zorder=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _draw_retrained(
    axes: Axes,
    front: Sequence[ModelRecord],
    baselines: Mapping[str, Sequence[ModelRecord]],
    cost: str,
) -> None:
    """Draw mean test accuracies; a bar of one std where there are at least two seeds."""
    axes.set_title("Retrained: mean test accuracy ± one std", fontsize=11, loc="left")
    groups = [("Pareto set", front, (FRONT_COLOUR, "o"))]
    for order, (label, records) in enumerate(baselines.items()):
        groups.append((label, records, BASELINE_STYLES[order % len(BASELINE_STYLES)]))
    values = []
    for label, records, (colour, marker) in groups:
        retrained = [record for record in records if record.test_accuracy]
        if not retrained:
            continue
        x, y = _test_points(retrained, cost)
        dots = axes.scatter(x, y, s=38, c=colour, marker=marker, edgecolors="w", zorder=4)
        dots.set_label(_plain(label))
        values += y
        bars = [(a, b, r.test_accuracy_std) for a, b, r in zip(x, y, retrained, strict=True)]
        for at, mean, std in bars:
            if std is not None:
                axes.errorbar(at, mean, yerr=std, ecolor=colour, capsize=3, lw=1.2, fmt="none")
    _cut_stragglers(axes, values)


def _dress(axes: Axes, cost: str) -> None:
    """Give the axes their scale, ticks and legend; without points, say so instead."""
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 4:  # too narrow for more than one tick
        middle = math.sqrt(low * high)
        low, high = axes.set_xlim(middle / 2, middle * 2)
    subs = (1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value, "g")))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.4g} %" if value < 1 + 1e-9 else "")
    )
    axes.set_xlabel(COSTS[cost].unit)
    axes.grid(color=GRID_GREY, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.9)


def _name_points(
    axes: Axes,
    named: Sequence[ModelRecord],
    others: Sequence[ModelRecord],
    cost: str,
) -> None:
    """Write short ids beside the points, each where it covers the least of what is there."""
    legend = axes.get_legend()
    if legend is None:
        return
    taken = [legend.get_window_extent()]
    for record in (*named, *others):
        (x,), (y,) = _test_points([record], cost)
        std = record.test_accuracy_std or 0.0
        taken.append(Bbox(axes.transData.transform([(x, y - std), (x, y + std)])).padded(8))
    for record in named:
        (x,), (y,) = _test_points([record], cost)
        note = axes.annotate(
            _plain(record.id[:SHORT_ID]), (x, y), (0, 0), textcoords="offset points", fontsize=7.5
        )
        note.set_in_layout(False)
        extents = []
        for dx, dy in NAME_OFFSETS:
            note.set(position=(dx, dy), horizontalalignment="left" if dx > 0 else "right")
            extents.append(note.get_window_extent())
        covered = [
            sum(box.overlaps(other) for other in taken) + (not _inside(box, axes.bbox))
            for box in extents
        ]
        best = covered.index(min(covered))
        dx, dy = NAME_OFFSETS[best]
        note.set(position=(dx, dy), horizontalalignment="left" if dx > 0 else "right")
        taken.append(extents[best])


def _inside(box: BboxBase, frame: BboxBase) -> bool:
    """Tell whether a box lies between the left and right side of a frame, below its top."""
    return bool(box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1)


def _alive(records: Iterable[ModelRecord]) -> list[ModelRecord]:
    """Return the records that have a validation accuracy."""
    return [record for record in records if record.valid_accuracy is not None]


def _points(records: Iterable[ModelRecord], cost: str) -> tuple[list[float], list[float]]:
    """Return cost and validation accuracy of records that did not fail."""
    pairs = [
        (r.cost.count(cost), r.valid_accuracy) for r in records if r.valid_accuracy is not None
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _test_points(records: Iterable[ModelRecord], cost: str) -> tuple[list[float], list[float]]:
    """Return cost and mean test accuracy of retrained records."""
    pairs = [(r.cost.count(cost), fmean(r.test_accuracy)) for r in records]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _plain(text: str) -> str:
    """Keep a text from being read as TeX."""
    return text.replace("$", r"\$")
