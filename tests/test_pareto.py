"""Pareto set, hypervolume and budgets, on fronts drawn by hand and against brute force."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from evaluation.cost.costs import COSTS
from evaluation.pareto.front import Box, Budgets, non_dominated, objectives, pareto_set, spread
from evaluation.records import Cost, ModelRecord

NAN = math.nan
BOX = Box(worst_error=0.5, least=(1,), reference=(10_000,))


def record(id, params, accuracy, flops=0, **changes):
    failure = "diverged" if accuracy is None else None
    cost = Cost(params, flops, changes.pop("latency_ms", None))
    return ModelRecord(id, (1,), (), cost, 0, accuracy, failure=failure, **changes)


def ids(records):
    return [r.id for r in records]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # error across, params down: (1,4) (2,2) (4,1) are a staircase, (3,3) lies behind it
        ([[1, 4], [2, 2], [3, 3], [4, 1]], [1, 1, 0, 1]),
        ([[2, 2]], [1]),
        ([[2, 2], [2, 2], [3, 2]], [1, 1, 0]),  # duplicates do not dominate each other
        ([[1, 2], [1, 3], [2, 2], [0, 9]], [1, 0, 0, 1]),  # a tie in one objective dominates
        ([[NAN, 0], [1, 1], [0, NAN], [2, 2]], [0, 1, 0, 0]),  # NaN: never on it, beats nothing
        ([[NAN, NAN]], [0]),
        ([[1, math.inf], [2, 1], [2, math.inf]], [1, 1, 0]),
        ([[1, 2, 3], [1, 3, 2], [2, 2, 2], [1, 3, 3], [3, 3, 1]], [1, 1, 1, 0, 1]),
    ],
)
def test_a_hand_drawn_front_is_marked(points, expected):
    assert non_dominated(np.array(points, dtype=float)).astype(int).tolist() == expected


@pytest.mark.parametrize("objective_count", [2, 3])
def test_the_mask_equals_brute_force_on_random_points_with_ties(objective_count):
    generator = np.random.default_rng(0)
    for _ in range(20):
        points = generator.integers(0, 6, (30, objective_count)).astype(float)
        points[generator.random(points.shape) < 0.02] = NAN
        for i, marked in enumerate(non_dominated(points)):
            beaten = any(
                not any(math.isnan(v) for v in other)
                and all(o <= p for o, p in zip(other, points[i], strict=True))
                and any(o < p for o, p in zip(other, points[i], strict=True))
                for other in points
            )
            assert marked == (not beaten and not any(math.isnan(v) for v in points[i]))


def test_objectives_are_error_and_the_named_costs_in_order():
    one = record("a", 10, 0.75, flops=7)
    assert objectives(one) == (0.25, 10.0)
    assert objectives(one, ("flops", "params")) == (0.25, 7.0, 10.0)


def test_a_failed_record_has_no_objectives_and_an_unknown_cost_is_refused():
    with pytest.raises(ValueError, match="x has no accuracy: diverged"):
        objectives(record("x", 1, None))
    with pytest.raises(ValueError, match=r"params, flops.*'watts'"):
        record("x", 1, 0.5).cost.count("watts")


def test_the_pareto_set_is_sorted_cheapest_first_without_dominated_or_failed_records():
    records = [
        record("big", 400, 0.9),
        record("failed", 1, None),
        record("small", 100, 0.6),
        record("dominated", 300, 0.7),
        record("middle", 200, 0.8),
        record("same accuracy, dearer", 201, 0.8),
    ]
    assert ids(pareto_set(records)) == ["small", "middle", "big"]


def test_a_third_objective_lets_more_records_stand():
    records = [
        record("a", 100, 0.9, flops=50),
        record("b", 200, 0.9, flops=20),  # fewer FLOPs than a
        record("c", 200, 0.9, flops=50),  # worse than both
        record("d", 100, 0.8, flops=20),
    ]
    assert ids(pareto_set(records)) == ["a"]
    assert ids(pareto_set(records, ("flops",))) == ["b"]
    assert ids(pareto_set(records, ("params", "flops"))) == ["d", "b", "a"]


def test_bits_and_milliseconds_are_objectives_too():
    costs = ("params", "flops", "bits", "latency_ms")
    one = ModelRecord("a", (1,), (), Cost(10, 7, 0.5, bit_params=4), 0, 0.75)
    assert objectives(one, costs) == (0.25, 10.0, 7.0, 196.0, 0.5)
    fast = replace(one, id="b", cost=Cost(10, 7, 0.4))  # 320 bits
    slow = replace(one, id="c", cost=Cost(10, 7, 0.6, bit_params=4))
    assert ids(pareto_set([one, fast, slow], costs)) == ["b", "a"]
    assert ids(pareto_set([one, fast, slow], ("params",))) == ["a"]
    unmeasured = replace(one, cost=Cost(10, 7))
    with pytest.raises(ValueError, match="is known, .* got 'latency_ms'"):
        objectives(unmeasured, costs)


def test_the_box_says_counts_whole_and_milliseconds_with_their_digits():
    box = Box(0.9, least=(1000.0, 0.25), reference=(2e6, 3.0), costs=("params", "latency_ms"))
    assert "params 1,000 to 2,000,000, latency_ms 0.250 to 3 (" in box.describe()


def test_of_equal_records_the_smallest_id_stays_whatever_the_order():
    records = [record("b", 1, 0.5), record("a", 1, 0.5), record("c", 1, 0.5), record("d", 2, 0.9)]
    for order in itertools.permutations(records):
        assert ids(pareto_set(order)) == ["a", "d"]


def test_no_records_or_only_failed_ones_have_an_empty_front():
    assert pareto_set([]) == []
    assert pareto_set([record("a", 1, None)]) == []
    assert BOX.hypervolume([record("a", 1, None)]) == 0.0
    assert BOX.hypervolume([]) == 0.0


def test_a_nan_accuracy_neither_stands_on_the_front_nor_adds_hypervolume():
    records = [record("nan", 1, NAN), record("a", 100, 0.75)]
    assert ids(pareto_set(records)) == ["a"]
    assert BOX.hypervolume(records) == pytest.approx(0.25)


def test_hypervolume_of_one_point_is_its_rectangle():
    # error .25 of .5 leaves 1/2; params 100 are half-way from 1 to 10 000 on a logarithmic axis
    assert BOX.hypervolume([record("a", 100, 0.75)]) == pytest.approx(0.25)
    assert BOX.hypervolume([record("whole box", 1, 1.0)]) == pytest.approx(1.0)


def test_hypervolume_of_a_staircase_is_the_union_of_its_rectangles():
    # scaled (error, params): a (1/2, 1/4), b (1/4, 3/4); union 1/2 * 3/4 + 1/4 * 1/4
    stairs = [record("a", 10, 0.75), record("b", 1000, 0.875)]
    inside = [record("dominated", 2000, 0.8), record("failed", 2, None)]
    outside = [record("too dear", 20_000, 0.99), record("too bad", 1, 0.5)]
    for order in itertools.permutations(stairs + inside + outside):
        assert BOX.hypervolume(order) == pytest.approx(7 / 16)


def test_hypervolume_with_two_costs_is_the_union_of_boxes():
    box = Box(1.0, (1, 10), (100, 1000), ("params", "flops"))
    # sides left free: a 1/2 * 1/2 * 1/2, b 1/2 * 1 * 1/4, both 1/2 * 1/2 * 1/4
    records = [
        record("a", 10, 0.5, flops=100),
        record("b", 1, 0.5, flops=round(10 * 100**0.75)),
    ]
    assert box.hypervolume(records) == pytest.approx(0.125 + 0.125 - 0.0625, abs=1e-3)


def test_hypervolume_of_a_space_with_one_size_is_still_a_share():
    box = Box(0.5, (100,), (100,))
    assert 0.0 <= box.hypervolume([record("a", 100, 0.75)]) <= 1.0


def test_spread_keeps_the_cheapest_and_the_most_accurate_and_the_middle_of_the_log_axis():
    records = [record(str(i), 2**i, i / 10) for i in range(9)]
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert ids(spread(records, 3)) == ["0", "4", "8"]
        assert ids(spread(records, 2)) == ["0", "8"]
        assert ids(spread(records, 1)) == ["8"]
        assert ids(spread(records, 50)) == [str(i) for i in range(9)]


def test_spread_returns_as_many_different_records_as_asked_for():
    # by FLOPs both stand on the front, and the one of fewer params is the more accurate too
    records = [record(str(i), 2**i, 0.9 - i / 10) for i in range(5)]
    for count in range(1, 6):
        assert len(set(ids(spread(records, count)))) == count
        assert "0" in ids(spread(records, count))


def test_a_budget_on_bits_is_kept_by_1_bit_weights():
    small, plain = Cost(100, 0, bit_params=90), Cost(100, 0)
    limit = Budgets(max_bits=small.model_bits)  # 10 * 32 + 90 = 410
    assert limit.cost_excess(small) == 0
    assert limit.cost_excess(plain) == pytest.approx(3200 / 410 - 1)
    assert Budgets(max_bits=409).cost_excess(small) > 0


def test_the_limits_of_costs_go_by_name():
    budgets = Budgets(max_zeal=9, max_latency_ms=3.5, max_bits=4, max_flops=2, max_params=1)
    order = ("params", 1), ("flops", 2), ("bits", 4), ("latency_ms", 3.5), ("zeal", 9)
    assert tuple(budgets.of_costs().items()) == order  # that of COSTS; the first one is the axis
    assert Budgets(max_params=None) == Budgets() and Budgets().of_costs() == {}
    assert budgets.exact() == Budgets(max_params=1, max_flops=2, max_bits=4)
    with pytest.raises(TypeError, match="budgets such as max_params, got params"):
        Budgets(params=1)


def test_every_cost_has_its_budget():
    cost = Cost(100, 100, 100.0, bit_params=100, activation_bytes=100, flash_bytes=100)  # 100 bits
    assert cost.known().keys() == COSTS.keys()
    for name in COSTS:
        assert Budgets(**{f"max_{name}": 100}).cost_excess(cost) == 0
        assert Budgets(**{f"max_{name}": 80}).cost_excess(cost) == pytest.approx(0.25)
    assert Budgets(max_latency_ms=1e9).cost_excess(Cost(1, 1)) == math.inf


def test_excess_is_the_largest_relative_one():
    budgets = Budgets(max_params=100, max_flops=15, max_latency_ms=2.0)
    assert budgets.cost_excess(Cost(100, 15, 2.0)) == 0
    assert budgets.cost_excess(Cost(150, 18, 1.0)) == pytest.approx(0.5)
    assert budgets.cost_excess(Cost(150, 30, 1.0)) == pytest.approx(1.0)
    assert budgets.cost_excess(Cost(150, 30, 7.0)) == pytest.approx(2.5)


def test_a_spread_of_none_is_empty():
    assert spread([record("a", 10, 0.5), record("b", 20, 0.6)], 0) == []
