"""The interactive figures: which axes there are, and where every point stands."""

import random
from dataclasses import replace
from typing import Any

import pytest

from evaluation.records import Cost, ModelMeasurement
from evaluation.report.figures import axes_of, cost_figure
from evaluation.report.report import Baseline, Report
from test_report import DOMINATED, FAILED, FRONT, MEASURED, NEAR_SMALL, REPORT, network


def traces(report: Report, cost: str = "params") -> list[dict[str, Any]]:
    """Return the traces as they are when the cost is chosen in the menu."""
    figure: Any = cost_figure(report)
    drawn = figure.to_dict()
    (menu,) = drawn["layout"]["updatemenus"]
    moved, _ = menu["buttons"][axes_of(report).index(cost)]["args"]
    pairs = zip(drawn["data"], moved["x"], moved["y"], strict=True)
    return [trace | {"x": [*x], "y": [*y]} for trace, x, y in pairs]


def test_the_figures_have_an_axis_for_every_known_cost_and_no_other():
    def axes(**changes: Any) -> list[str]:
        return axes_of(replace(REPORT, **changes))

    one_bit = replace(FRONT[0], cost=Cost(100, 10, bit_ops=5, bit_params=60))
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    assert axes() == ["params", "flops"]
    assert axes(random_archive=(one_bit,)) == ["params", "flops", "bits"]
    assert axes(archive=(estimated,)) == ["params", "flops", "latency_ms"]
    assert axes(measured={"large": ModelMeasurement(1.0, 0.1)}) == ["params", "flops", "latency_ms"]
    assert axes(measured={"large": ModelMeasurement(None, None, 9)}) == [
        "params",
        "flops",
        "file_bytes",
    ]


def test_the_figure_begins_with_the_first_cost_of_its_menu():
    figure: Any = cost_figure(REPORT)
    for trace, first in zip(figure.data, traces(REPORT), strict=True):
        assert ([*trace.x], [*trace.y]) == (first["x"], first["y"])
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert (labels, figure.layout.xaxis.title.text) == (["params", "FLOPs"], "params")


def test_members_stand_at_what_was_measured_and_dots_at_the_estimate():
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    report = replace(REPORT, front=(estimated,), archive=(estimated, FAILED), measured=MEASURED)
    line, dots, _, _, found, _, baseline = traces(report, "latency_ms")
    assert dots["x"] == [0.2] and found["x"] == [0.25]
    assert (line["x"], line["y"]) == ([0.2], [0.81])
    assert traces(report, "file_bytes")[0]["x"] == []
    assert [*dots["customdata"]] == [*found["customdata"]] == [0]  # one network, pale or not
    assert baseline["x"] == [None, 11.0]
    assert not any(FAILED.id in text for text in dots["hovertext"])


@pytest.mark.parametrize("cost", ["params", "flops", "bits"])
def test_the_line_is_the_best_accuracy_at_every_cost(cost: str):
    draw = random.Random(3)
    records = [network(f"n{i}", draw.randint(1, 999), draw.random()) for i in range(60)]
    records.append(replace(records[0], cost=Cost(500, 500, bit_ops=5, bit_params=60)))
    line = traces(replace(REPORT, archive=tuple(records)), cost)[0]
    corners = list(zip(line["x"], line["y"], strict=True))
    assert corners == sorted(corners)
    for limit in {record.cost.count(cost) for record in records}:
        best = max(r.valid_accuracy or 0.0 for r in records if r.cost.count(cost) <= limit)
        assert max(accuracy for place, accuracy in corners if place <= limit) == best
    assert corners[-1][0] == max(record.cost.count(cost) for record in records)


def test_stragglers_are_cut_from_the_picture_and_counted():
    records = tuple(network(f"n{i}", 100 + i, 0.9 + i / 1000) for i in range(20))
    alone = replace(REPORT, front=(), random_archive=(), archive=(*records, DOMINATED))
    cut: Any = cost_figure(alone)
    assert [note.text for note in cut.layout.annotations] == ["not shown: 1 at or below 70.00 %"]
    low, high = cut.layout.yaxis.range
    assert 0.7 < low < 0.9 and high > 0.919
    whole: Any = cost_figure(replace(alone, archive=records))
    assert not whole.layout.annotations and whole.layout.yaxis.range == (None, None)


def test_a_point_knows_its_member_also_where_a_baseline_has_the_same_network():
    twin = replace(FRONT[0], test_accuracy=(0.5, 0.5))
    report = replace(REPORT, baselines=(Baseline("twins", (NEAR_SMALL, twin)),))
    named = {trace["name"]: [*trace["customdata"]] for trace in traces(report)[1::2]}
    front, baseline = traces(report)[-2:]
    assert ([*front["customdata"]], [*baseline["customdata"]]) == ([0, 2], [3, 4])
    assert named["NSGA-II"] == [0, 1, 2, None]


def test_a_search_that_is_random_itself_keeps_its_points():
    report = replace(REPORT, hypervolume=(("random search", 0.5),))
    _, first, _, second = traces(report)[:4]
    assert (first["name"], len(first["x"])) == ("random search", len(REPORT.archive))
    assert second["name"] != first["name"] and len(second["x"]) == len(REPORT.random_archive)
    alone = traces(replace(report, random_archive=()))
    assert [one["name"] for one in alone[:3]] == ["random search"] * 2 + ["Pareto set"]
