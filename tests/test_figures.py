"""The data of the interactive figures: which axes there are, and where every point stands."""

import random
from dataclasses import replace
from typing import Any

import pytest

from evaluation.records import Cost, Measured
from evaluation.report.figures import figures
from test_report import DOMINATED, FAILED, FRONT, MEASURED, REPORT, network


def test_the_figures_have_an_axis_for_every_known_cost_and_no_other():
    def axes(**changes: Any) -> list[str]:
        return [axis["cost"] for axis in figures(replace(REPORT, **changes))["axes"]]

    one_bit = replace(FRONT[0], cost=Cost(100, 10, bit_ops=5, bit_params=60))
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    assert axes() == ["params", "flops"]
    assert axes(random_archive=(one_bit,)) == ["params", "flops", "bits"]
    assert axes(archive=(estimated,)) == ["params", "flops", "latency_ms"]
    assert axes(measured={"large": Measured(1.0, 0.1)}) == ["params", "flops", "latency_ms"]
    assert axes(measured={"large": Measured(None, None, 9)}) == ["params", "flops", "file_bytes"]


def test_members_stand_at_what_was_measured_and_dots_at_the_estimate():
    estimated = replace(FRONT[0], cost=FRONT[0].cost.with_latency(0.2))
    report = replace(REPORT, front=(estimated,), archive=(estimated, FAILED), measured=MEASURED)
    drawn = figures(report)
    dots, _, found = drawn["searches"]["series"]
    assert dots["costs"]["latency_ms"] == [0.2] and found["costs"]["latency_ms"] == [0.25]
    assert dots["steps"]["latency_ms"] == [(0.2, 0.81), (0.2, 0.81)]
    assert dots["steps"].get("file_bytes") is None
    assert dots["networks"] == found["networks"] == [0]  # a member is one network, pale or not
    baseline = drawn["retrained"]["series"][1]
    assert baseline["costs"]["latency_ms"] == [None, 11.0]
    assert FAILED.id not in [drawn["networks"][n]["id"] for n in dots["networks"]]


@pytest.mark.parametrize("cost", ["params", "flops", "bits"])
def test_the_line_is_the_best_accuracy_at_every_cost(cost: str):
    draw = random.Random(3)
    records = tuple(network(f"n{i}", draw.randint(1, 999), draw.random()) for i in range(60))
    corners = figures(replace(REPORT, archive=records))["searches"]["series"][0]["steps"][cost]
    assert corners == sorted(corners)
    for limit in {record.cost.count(cost) for record in records}:
        best = max(r.valid_accuracy or 0.0 for r in records if r.cost.count(cost) <= limit)
        assert max(accuracy for place, accuracy in corners if place <= limit) == best
    assert corners[-1][0] == max(record.cost.count(cost) for record in records)


def test_stragglers_are_cut_from_both_pictures_and_counted():
    records = tuple(network(f"n{i}", 100 + i, 0.9 + i / 1000) for i in range(20))
    alone = replace(REPORT, front=(), random_archive=(), archive=(*records, DOMINATED))
    panel = figures(alone)["searches"]
    assert panel["note"] == "not shown: 1 at or below 70.00 %"
    assert 0.7 < panel["range"][0] < 0.9 and panel["range"][1] > 0.919
    together = figures(replace(alone, archive=records))["searches"]
    assert (together["note"], together["range"]) == ("", None)


def test_a_member_lists_each_cell_once_with_its_uses():
    member = replace(FRONT[0], blocks=("normal-0", "reduction-1", "normal-0", "gone"))
    shown = figures(replace(REPORT, front=(member,)))["networks"][0]
    assert shown["cells"] == [(0, "normal-0 × 2"), (1, "reduction-1")]
    assert ("blocks", "normal-0 · reduction-1 · normal-0 · gone") in shown["facts"]


def test_a_search_that_is_random_itself_keeps_its_points():
    report = replace(REPORT, hypervolume=(("random search", 0.5),))
    first, second, _ = figures(report)["searches"]["series"]
    assert (first["label"], len(first["networks"])) == ("random search", len(REPORT.archive))
    assert second["label"] != first["label"]
    assert len(second["networks"]) == len(REPORT.random_archive)
    alone = figures(replace(report, random_archive=()))["searches"]["series"]
    assert [one["label"] for one in alone] == ["random search", "Pareto set"]
