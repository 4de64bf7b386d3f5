"""Which model is chosen, why, and what stands beside it, on fronts made by hand."""

import itertools
import json
import math
import random
import statistics
from dataclasses import replace

import pytest

from evaluation.errors import InputError
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets
from evaluation.records import Cost, ModelRecord


def model(id, params, *test_accuracy, flops=1, latency_ms=None, bit_params=0):
    cost = Cost(params, flops, latency_ms, bit_params=bit_params)
    seeds = tuple(range(len(test_accuracy)))
    return ModelRecord(id, (1,), (), cost, 0, 0.5, test_accuracy=test_accuracy, seeds=seeds)


def wishes(max_file_bytes=None, min_accuracy=None, strict=False, knee=False, **budgets):
    return Wishes(Budgets(**budgets), max_file_bytes, min_accuracy, strict, knee)


FRONT = [
    model("s", 100, 0.5, flops=10, latency_ms=1.0),
    model("m", 200, 0.7, 0.8, flops=30, latency_ms=2.0),
    model("l", 400, 0.9, flops=20, latency_ms=4.0),
]
BYTES = {"s": 4_000, "m": 9_000, "l": 8_000}


@pytest.mark.parametrize(
    ("asked", "chosen", "fits"),
    [
        (wishes(), "l", True),
        (wishes(max_params=400), "l", True),
        (wishes(max_params=399), "m", True),
        (wishes(max_params=200), "m", True),
        (wishes(max_params=199), "s", True),
        (wishes(max_params=100), "s", True),
        (wishes(max_params=99), "s", False),
        (wishes(max_flops=30), "l", True),
        (wishes(max_flops=19), "s", True),
        (wishes(max_flops=10), "s", True),
        (wishes(max_flops=9), "s", False),
        (wishes(max_bits=6400), "m", True),
        (wishes(max_bits=6399), "s", True),
        (wishes(max_latency_ms=4.0), "l", True),
        (wishes(max_latency_ms=3.9), "m", True),
        (wishes(max_latency_ms=0.9), "s", False),
        (wishes(max_file_bytes=8_000), "l", True),
        (wishes(max_file_bytes=7_999), "s", True),
        (wishes(max_file_bytes=3_999), "s", False),
        (wishes(min_accuracy=0.75), "m", True),  # the mean of .7 and .8, exactly; l is dearer
        (wishes(min_accuracy=0.75, strict=True), "l", True),
        (wishes(min_accuracy=0.75, max_flops=29), "l", True),
        (wishes(min_accuracy=0.75, max_file_bytes=9_000), "l", True),  # the smaller file
        (wishes(min_accuracy=0.751), "l", True),
        (wishes(min_accuracy=0.9), "l", True),
        (wishes(min_accuracy=0.91), "l", False),
        (wishes(min_accuracy=0.0), "s", True),
        (wishes(max_params=399, max_flops=29), "s", True),
        (wishes(max_params=200, min_accuracy=0.8), "m", False),  # 6% of accuracy, not 100% params
        (wishes(knee=True), "m", True),
        (wishes(knee=True, max_params=399), "m", True),  # two are left: the more accurate
        (wishes(knee=True, max_params=99), "s", False),
    ],
    ids=lambda value: str(value).strip() if isinstance(value, Wishes) else None,
)
def test_the_choice_at_above_and_below_every_limit(asked, chosen, fits):
    for order in itertools.permutations(FRONT):
        choice = choose(order, asked, BYTES)
        assert (choice.record.id, choice.fits) == (chosen, fits)
        assert bool(choice.misses) != fits and (choice.among > 0) == fits


def test_the_validation_accuracy_and_what_is_not_retrained_do_not_count():
    searched = replace(model("searched", 1), valid_accuracy=0.99)
    flattered = replace(model("flattered", 1, 0.1), valid_accuracy=0.99)
    choice = choose([searched, flattered, *FRONT], wishes())
    assert (choice.record.id, choice.among) == ("l", 4)
    with pytest.raises(InputError, match="at least one retrained model"):
        choose([searched], wishes())


def test_an_accuracy_that_is_nan_is_never_chosen():
    diverged = model("diverged", 1, math.nan, 0.9)
    for asked in (wishes(), wishes(min_accuracy=0.1), wishes(knee=True), wishes(max_flops=9)):
        choice = choose([diverged, *FRONT], asked)
        assert "diverged" not in [choice.record.id, *(n.id for n in neighbours(choice))]
    with pytest.raises(InputError, match="at least one retrained model"):
        choose([diverged], wishes())


# means .90, .88, .85; the standard deviation of the best is .02
TIED = [
    model("cheap", 100, 0.85, 0.85, 0.85),
    model("middle", 200, 0.84, 0.88, 0.92),
    model("best", 400, 0.88, 0.90, 0.92),
    model("dear", 800, 0.89, 0.89, 0.89),
]


def test_within_one_standard_deviation_of_the_best_the_cheapest_is_taken():
    for order in itertools.permutations(TIED):
        choice = choose(order, wishes())
        assert choice.record.id == "middle"  # .88 is .90 - .02: on the border is a tie
    assert "3 tie" in choice.why and "one standard deviation (0.0200)" in choice.why
    assert "0.9000 of best" in choice.why and "cheapest of them in params" in choice.why


def test_strictly_the_most_accurate_is_taken_whatever_a_tie_would_save():
    assert choose(TIED, wishes(strict=True)).record.id == "best"
    assert "standard deviation" not in choose(TIED, wishes(strict=True)).why


def test_just_outside_one_standard_deviation_there_is_no_tie():
    further = replace(TIED[1], test_accuracy=(0.839, 0.879, 0.919))
    choice = choose([TIED[0], further, TIED[2]], wishes())
    assert choice.record.id == "best" and "no other is within" in choice.why


def test_the_spread_of_the_best_decides_and_not_that_of_the_cheaper():
    noisy = model("noisy", 100, 0.6, 0.8, 1.0)
    steady = model("steady", 200, 0.9, 0.9, 0.9)
    assert choose([noisy, steady], wishes()).record.id == "steady"


def test_ties_are_sought_within_the_budgets_only():
    # without best, the best is dear with no spread at all
    choice = choose(TIED[:2] + TIED[3:], wishes())
    assert choice.record.id == "dear"
    assert choose(TIED, wishes(max_params=399)).record.id == "cheap"  # .88 +- .04 against .85


def test_with_one_seed_only_equal_means_tie():
    tied = [model("dear", 300, 0.9), model("cheap", 150, 0.9), model("less", 100, 0.8999)]
    for order in itertools.permutations(tied):
        choice = choose(order, wishes())
        assert choice.record.id == "cheap"
        assert "2 tie" in choice.why and "equal to the best" in choice.why
    alone = choose([tied[0], tied[2]], wishes())
    assert alone.record.id == "dear" and "only an equal mean would tie" in alone.why


def test_means_that_differ_by_rounding_alone_are_equal():
    one, other = model("one", 300, 0.7, 0.8, 0.9), model("other", 150, 0.8, 0.8, 0.8)
    assert choose([one, other], wishes(strict=True)).record.id == "other"
    third = model("third", 10, *(1 / 3, 1 / 7, 0.1))
    exact = statistics.fmean(third.test_accuracy)
    assert choose([third], wishes(min_accuracy=exact)).fits


def test_cheaper_is_by_the_first_cost_that_has_a_budget():
    quick = model("quick", 300, 0.9, flops=20, latency_ms=1.0, bit_params=300)  # 300 bits
    small = model("small", 100, 0.9, flops=30, latency_ms=2.0)
    sizes = {"quick": 5_000, "small": 6_000}
    limits = {"max_params": 10**6, "max_flops": 10**6, "max_bits": 10**6, "max_latency_ms": 9.0}
    for name, id in zip(limits, ("small", "quick", "quick", "quick"), strict=True):
        choice = choose([quick, small], wishes(**{name: limits[name]}), sizes)
        assert (choice.record.id, f"max_{choice.axis}") == (id, name)
    by_file = choose([quick, small], wishes(max_file_bytes=9_000), sizes)
    assert (by_file.record.id, by_file.axis) == ("quick", "file_bytes")
    both = choose([quick, small], wishes(max_file_bytes=9_000, max_flops=99), sizes)
    assert both.axis == "flops"
    every = choose([quick, small], wishes(max_file_bytes=9_000, **limits), sizes)
    assert (every.record.id, every.axis) == ("small", "params")


def dominates(one, other, sizes):
    costs = [
        (m.cost.params, m.cost.flops, m.cost.latency_ms, sizes[m.id], -m.test_accuracy_mean)
        for m in (one, other)
    ]
    return costs[0] != costs[1] and all(a <= b for a, b in zip(*costs, strict=True))


def test_a_dominated_model_is_never_chosen_and_the_order_does_not_matter():
    generator = random.Random(0)
    for _ in range(150):
        models, sizes = [], {}
        for i in range(generator.randint(1, 9)):
            seeds = [generator.randint(5, 8) / 10 for _ in range(generator.choice((1, 3)))]
            costs = [generator.randint(1, 4) for _ in range(4)]
            models.append(model(f"m{i}", costs[0], *seeds, flops=costs[1], latency_ms=costs[2]))
            sizes[f"m{i}"] = costs[3]
        top, least = generator.randint(1, 4), generator.randint(5, 8) / 10
        for asked in (
            wishes(),
            wishes(strict=True),
            wishes(min_accuracy=least),
            wishes(knee=True),
            wishes(max_params=top),
            wishes(max_flops=top, max_latency_ms=3),
            wishes(max_latency_ms=top, knee=True),
            wishes(max_file_bytes=top, min_accuracy=least),
        ):
            choice = choose(models, asked, sizes)
            shuffled = generator.sample(models, len(models))
            assert choose(shuffled, asked, sizes) == choice
            beaten_by = [m.id for m in models if dominates(m, choice.record, sizes)]
            assert not beaten_by, (choice.record, beaten_by, asked)
            json.dumps(choice.to_json(), allow_nan=False)
            if choice.dearer:  # more cost on the front is more accuracy
                assert choice.dearer.accuracy_difference > 0 < choice.dearer.cost_difference
            if choice.cheaper:
                assert choice.cheaper.cost_difference < 0


def test_one_model_alone_is_chosen_without_neighbours():
    for asked in (wishes(), wishes(strict=True), wishes(knee=True), wishes(min_accuracy=0.5)):
        choice = choose(FRONT[:1], asked)
        assert (choice.record.id, choice.fits, choice.among) == ("s", True, 1)
        assert (choice.cheaper, choice.dearer) == (None, None)
        assert "the only one of 1 retrained models" in choice.why
    last = choose(FRONT[:1], wishes()).lines()[-2:]
    assert last == [f"next {side}: none on the front" for side in ("cheaper", "dearer")]


def test_models_of_equal_cost_leave_the_most_accurate_and_no_neighbour():
    equal = [model("a", 100, 0.5), model("b", 100, 0.7), model("c", 100, 0.6)]
    for asked in (wishes(), wishes(knee=True), wishes(min_accuracy=0.1)):
        choice = choose(equal, asked)
        assert (choice.record.id, choice.cheaper, choice.dearer) == ("b", None, None)
    twins = [model("b", 100, 0.7), model("a", 100, 0.7)]
    assert choose(twins, wishes()).record.id == "a"


def neighbours(choice):
    return [n for n in (choice.cheaper, choice.dearer) if n is not None]


def test_the_neighbours_are_the_next_members_of_the_front_on_either_side():
    others = [model("behind", 190, 0.4), model("beyond", 300, 0.74), model("far", 900, 0.91)]
    choice = choose([model("tiny", 50, 0.1), *FRONT, *others], wishes(max_params=200))
    assert choice.record.id == "m"
    cheaper, dearer = choice.cheaper, choice.dearer
    assert (cheaper.id, cheaper.cost, cheaper.test_accuracy, cheaper.fits) == ("s", 100, 0.5, True)
    assert (cheaper.cost_difference, cheaper.accuracy_difference) == (-100, -0.25)
    assert (dearer.id, dearer.cost, dearer.test_accuracy, dearer.fits) == ("l", 400, 0.9, False)
    assert (dearer.cost_difference, dearer.accuracy_difference) == (200, 0.15)
    assert "accuracy 0.9000 (+15.00 points)" in choice.lines()[4]  # one seed has no std


def test_the_neighbours_are_by_the_budgeted_cost_and_only_of_what_has_it():
    unmeasured = model("unmeasured", 1, 0.95)
    choice = choose([*FRONT, unmeasured], wishes(max_latency_ms=2.0))
    assert (choice.record.id, choice.axis) == ("m", "latency_ms")
    assert [(n.id, n.cost) for n in neighbours(choice)] == [("s", 1.0), ("l", 4.0)]
    assert choose([*FRONT, unmeasured], wishes(max_latency_ms=9.0)).dearer is None


def test_nothing_that_fits_is_answered_with_the_nearest_and_what_it_misses():
    choice = choose(FRONT, wishes(max_params=80, max_flops=8, min_accuracy=0.6))
    assert (choice.record.id, choice.fits, choice.among) == ("s", False, 0)
    assert [(m.name, m.value, m.limit) for m in choice.misses] == [
        ("params", 100, 80),
        ("flops", 10, 8),
        ("test_accuracy", 0.5, 0.6),
    ]
    assert [m.excess for m in choice.misses] == pytest.approx([0.25, 0.25, 1 / 6])
    lines = choice.lines()
    assert lines[0].startswith("nothing fits")
    assert "missed: 100 params: 20 params (25.0%) over the budget of 80 params" in lines
    assert "missed: test accuracy 0.5000 is 10.00 points under 0.6000" in lines
    assert not any("optimistic" in line for line in lines)


def test_a_model_without_a_measured_latency_keeps_no_latency_budget_and_is_named():
    unmeasured = [model("y", 10, 0.99), model("x", 20, 0.98)]
    choice = choose([*unmeasured, *FRONT], wishes(max_latency_ms=1e9))
    assert (choice.record.id, choice.fits, choice.among) == ("l", True, 3)
    assert "no latency was measured for x, y" in choice.lines()
    assert choice.to_json()["unmeasured"] == {"latency_ms": ["x", "y"]}
    nearest = choose([*unmeasured, *FRONT], wishes(max_latency_ms=0.5))
    assert (nearest.record.id, nearest.fits) == ("s", False)
    with pytest.raises(InputError, match="no latency was measured for x, y"):
        choose(unmeasured, wishes(max_latency_ms=1e9))
    assert choose(unmeasured, wishes()).record.id == "y"


def test_a_model_without_a_known_file_keeps_no_budget_on_its_size():
    sizes = {"s": 4_000}
    choice = choose(FRONT, wishes(max_file_bytes=10**9), sizes)
    assert (choice.record.id, choice.among) == ("s", 1)
    assert "no file size is known for l, m" in choice.lines()
    with pytest.raises(InputError, match="no file size is known for l, m, s"):
        choose(FRONT, wishes(max_file_bytes=10**9))


def test_the_lines_say_what_was_chosen_why_and_what_lies_beside_it():
    front = [
        model("a", 5_000, 0.90, 0.90, flops=100_000, latency_ms=0.05678),
        model("b", 12_000, 0.95, 0.97, flops=400_000, latency_ms=0.1),
        model("c", 15_000, 0.97, 0.99, flops=1_400_000, latency_ms=0.1567),
    ]
    assert choose(front, wishes(max_params=14_000), {"b": 51_234}).lines() == [
        "b: 12,000 params, 400,000 FLOPs, 0.1 ms, 51,234 bytes on disk",
        "test accuracy: 0.9600 ± 0.0141 over 2 seeds",
        "why: the most accurate of the 2 of 3 retrained models with at most 14,000 params; "
        "no other is within one standard deviation (0.0141) of it",
        "next cheaper: a, 5,000 params (-7,000 params), test accuracy 0.9000 ± 0.0000 "
        "(-6.00 points)",
        "next dearer: c, 15,000 params (+3,000 params), test accuracy 0.9800 ± 0.0141 "
        "(+2.00 points), which does not fit",
        "chosen by test accuracy among 2 models, so slightly optimistic",
    ]
    quick = choose(front, wishes(max_latency_ms=0.09, min_accuracy=0.5)).lines()
    assert quick[0] == "a: 5,000 params, 100,000 FLOPs, 0.05678 ms"
    assert quick[2] == (
        "why: the only one of 3 retrained models with at most 0.09 ms and "
        "a test accuracy of at least 0.5000"
    )
    assert "next dearer: b, 0.1 ms (+0.04322 ms)" in quick[4]


def test_bits_are_shown_of_a_1_bit_network_and_where_they_are_budgeted():
    one_bit, plain = model("one", 100, 0.5, bit_params=100), model("plain", 100, 0.9)
    assert "100 bits" in choose([one_bit], wishes()).lines()[0]
    assert "bits" not in choose([plain], wishes()).lines()[0]
    assert "3,200 bits" in choose([plain], wishes(max_bits=5_000)).lines()[0]


def test_json_has_the_promised_keys_and_the_reasons():
    row = choose(FRONT, wishes(max_params=200), BYTES).to_json()
    assert (row["id"], row["params"], row["flops"], row["latency_ms"]) == ("m", 200, 30, 2.0)
    assert row["test_accuracy"] == pytest.approx(0.75) and row["seeds"] == [0, 1]
    facts = [row[key] for key in ("file_bytes", "by_cost", "fits", "among")]
    assert facts == [9_000, "params", True, 2]
    assert row["neighbours"]["cheaper"]["id"] == "s" and row["neighbours"]["dearer"]["id"] == "l"
    assert "at most 200 params" in row["why"] and row["misses"] == []


@pytest.mark.parametrize(
    "bad",
    [
        {"max_params": 0},
        {"max_latency_ms": math.nan},
        {"max_latency_ms": math.inf},
        {"max_file_bytes": -1},
        {"min_accuracy": 1.01},
        {"min_accuracy": math.nan},
        {"strict": True, "knee": True},
    ],
    ids=str,
)
def test_wishes_that_nobody_can_mean_are_refused(bad):
    with pytest.raises(InputError, match="expected|fraction"):
        wishes(**bad)


def test_the_knee_is_the_corner_of_a_hand_drawn_front():
    # each step doubles the params; accuracy rises steeply to c, then hardly at all
    front = [
        model("a", 100, 0.50),
        model("b", 200, 0.60),
        model("c", 400, 0.90),
        model("d", 800, 0.91),
        model("e", 1600, 0.92),
    ]
    for seed in range(5):
        random.Random(seed).shuffle(front)
        assert choose(front, wishes(knee=True)).record.id == "c"


def test_the_knee_is_judged_on_a_logarithmic_axis():
    # log2: chord values 0, .5, 1, accuracies 0, .6, 1; on a linear axis x would be 1/11 and 5/11
    front = [model("a", 1, 0.0), model("b", 2, 0.2), model("c", 32, 0.9), model("d", 64, 1.0)]
    # above the chord: b .2 - 1/6 = .03, c .9 - 5/6 = .07; on a linear axis b .18, c .41
    assert choose(front, wishes(knee=True)).record.id == "c"
    front[1] = model("b", 2, 0.3)  # b .13 against c .07; on a linear axis c still leads
    choice = choose(front, wishes(knee=True))
    assert choice.record.id == "b" and "params on a logarithmic axis" in choice.why


def test_the_knee_is_by_the_budgeted_cost():
    # by params the corner is b, by FLOPs it is c
    front = [
        model("a", 100, 0.1, flops=100),
        model("b", 200, 0.8, flops=900),
        model("c", 900, 0.9, flops=910),
        model("d", 1000, 1.0, flops=8000),
    ]
    assert choose(front, wishes(knee=True)).record.id == "b"
    assert choose(front, wishes(knee=True, max_flops=8000)).record.id == "c"


@pytest.mark.parametrize(("params", "accuracy"), [(100_000, 0.85), (400, 0.1), (100, 0.01)])
def test_the_knee_is_not_moved_by_a_dominated_model(params, accuracy):
    for order in itertools.permutations([*FRONT, model("worse", params, accuracy)]):
        assert choose(order, wishes(knee=True)).record.id == "m"


def test_the_knee_of_fewer_than_three_members_is_the_most_accurate():
    choice = choose(FRONT[1::-1], wishes(knee=True))
    assert choice.record.id == "m" and "a knee needs a front of three" in choice.why
