"""`minimise`: the searches alone, on problems that can be enumerated."""

import itertools
import math

import pytest

from evaluation.errors import InputError
from netsearch import Space, minimise

SPACE = Space(sizes={"depth": 4, "width": (12, 24, 48)}, kinds={"block": ["a", "b", "c"]})


def error(choice):
    """Falls with both sizes; one block is better than the others."""
    return 0.5 * 0.7 ** (choice["depth"] + choice["width"] / 12) + 0.05 * (choice["block"] != "b")


def energy(choice):
    return 1.0 + choice["depth"] * choice["width"]


def front():
    """The true one."""
    choices = [
        dict(zip(SPACE.choices, values, strict=True))
        for values in itertools.product(*SPACE.choices.values())
    ]
    points = [(error(one), energy(one), one) for one in choices]
    return [
        one
        for e, c, one in points
        if not any(e2 <= e and c2 <= c and (e2, c2) != (e, c) for e2, c2, _ in points)
    ]


@pytest.mark.parametrize(
    "search", ["random", "surrogate", pytest.param("nsga2", marks=pytest.mark.slow)]
)
def test_all_of_a_small_space_is_found_with_its_front(search):
    found = minimise(error, SPACE, costs={"energy": energy}, evaluations=100, search=search)
    assert len(found.history) == SPACE.count == 36  # nothing new comes up any more
    assert [dict(point.values) for point in found.front] == sorted(front(), key=energy)
    assert all(point.costs == {"energy": energy(point.values)} for point in found.history)


def test_the_surrogate_needs_fewer_evaluations_than_random_search_on_errors_of_any_scale():
    space = Space(sizes={f"s{number}": 8 for number in range(6)})

    def far(choice):
        return 1e-7 * (1 + sum((value - 5) ** 2 for value in choice.values()))

    best = {
        search: min(p.error for p in minimise(far, space, evaluations=60, search=search).history)
        for search in ("random", "surrogate")
    }
    assert best["surrogate"] < 2e-7 < best["random"]


def test_no_point_over_a_budget_is_evaluated():
    found = minimise(error, SPACE, costs={"energy": energy}, budgets={"energy": 40}, evaluations=20)
    assert {point.values["depth"] * point.values["width"] for point in found.history} <= {
        *(0, 12, 24, 36)
    }


@pytest.mark.slow
def test_one_seed_gives_the_same_points_with_any_number_of_workers():
    runs = [minimise(error, SPACE, evaluations=12, workers=n, seed=3) for n in (1, 2)]
    assert runs[0] == runs[1] and runs[0].front[0].costs == {}
    assert minimise(error, SPACE, evaluations=12, seed=4) != runs[0]


def test_a_failed_point_stands_in_the_history_and_ends_nothing():
    def fragile(choice):
        place = tuple(choice.values())
        if place == (1, 24, "c"):
            raise MemoryError("too wide")
        return {(0, 12, "a"): math.nan, (2, 24, "b"): math.inf}.get(place, error(choice))

    found = minimise(fragile, SPACE, costs={"energy": energy}, evaluations=36, search="random")
    reasons = {point.failure for point in found.history}
    odd = "expected a finite error of at least 0, got"
    assert reasons == {None, "MemoryError: too wide", f"{odd} nan", f"{odd} inf"}
    for point in found.history:
        assert (point.error is None) == (point.failure is not None)
    assert all(point.error is not None for point in found.front)


def nothing(choice):
    raise ValueError("no data")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (error, {"costs": {"e": lambda c: 0.0}}, r"e of \{'depth': 0, .*above 0, got 0.0"),
        (error, {"costs": {"e": lambda c: math.inf}}, "above 0, got inf"),
        (error, {"costs": {"e": lambda c: math.nan}}, "above 0, got nan"),
        (error, {"costs": {"e": lambda c: "much"}}, "above 0, got 'much'"),
        (error, {"costs": {"e": energy}, "budgets": {"e": 0.5}}, "e=0.5: no choice fits; .*is 1.0"),
        (error, {"costs": {"e": energy}, "budgets": {"f": 5}}, "one of e, got 'f'"),
        (error, {"costs": {"e": energy}, "budgets": {"e": -1}}, "a positive number for e, got -1"),
        (error, {"search": "halving"}, "one of random, nsga2, surrogate, smem, got 'halving'"),
        (error, {"evaluations": 3}, "evaluations: expected a whole number, at least 4, got 3"),
        (error, {"evaluations": "9"}, "evaluations: expected a whole number, .*, got '9'"),
        (error, {"workers": 0}, "workers: expected a whole number, at least 1, got 0"),
        (error, {"population": 3}, "population: expected a whole number, at least 4, got 3"),
        (error, {"seed": True}, "seed: expected a whole number, at least 0, got True"),
        (error, {"costs": {"e": nothing}}, r"e of \{.*\}: ValueError: no data"),
        (error, {"costs": {"e": energy}, "budgets": {"e": "9"}}, "positive number for e, got '9'"),
        (lambda choice: -1.0, {}, "failed, .* x expected a finite error of at least 0, got -1.0"),
        (lambda choice: None, {}, "failed, so the search stops: .* x TypeError: float"),
        (nothing, {}, "evaluations failed, so the search stops: .* x ValueError: no data"),
    ],
)
def test_what_cannot_be_searched_is_refused(function, changes, message):
    with pytest.raises(InputError, match=message):
        minimise(function, SPACE, **{"evaluations": 8, **changes})


def test_what_cannot_be_pickled_is_refused_before_the_search():
    lock = (one for one in "generators do not pickle")
    with pytest.raises(InputError, match="error: it cannot be pickled, so that no worker .*Type"):
        minimise(lambda choice: lock and 1.0, SPACE, evaluations=8, workers=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": {"a": 3}, "kinds": {"a": 2}}, "got a as both"),
        ({"sizes": {"a": 0}}, "a: expected 1 to 1,000 values, got 0"),
        (
            {"kinds": {"a": 10**20}},
            "a: expected 1 to 1,000 values, got 100,000,000,000,000,000,000",
        ),
        ({"sizes": {"a": {1, 2}}}, r"a: expected a number of values or a list .*\{1, 2\}"),
        ({"sizes": {"a": "abc"}}, "a number of values or a list of them, got 'abc'"),
        ({"kinds": {"a": 1}}, "several choices, got 1"),
        ({}, "several choices, got 0"),
    ],
)
def test_a_space_without_a_choice_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Space(**given)


def test_the_ends_of_costs_are_found_in_a_space_too_large_to_enumerate():
    space = Space(sizes={f"s{number}": 9 for number in range(6)})  # 531,441
    found = minimise(
        lambda choice: 1.0 / (1 + sum(choice.values())),
        space,
        costs={"sum": lambda choice: 1 + sum(choice.values())},
        evaluations=10,
    )
    assert found.front[0].costs == {"sum": 1}  # the cheapest comes first of all


def test_every_point_is_told_as_soon_as_it_is_known():
    told = []
    found = minimise(error, SPACE, evaluations=8, on_point=told.append)
    assert told == list(found.history) and len(told) == 8
