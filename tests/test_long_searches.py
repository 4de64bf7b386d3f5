"""What keeps a search of ten thousand evaluations flat changes nothing that it is told."""

import numpy as np
import pytest

import evaluation.pareto.front
import netsearch.searches.protocol
from analytic import SPACE, accuracy, every_record, genomes_of, problem_of
from evaluation.pareto.front import Box, non_dominated, pareto_set
from netsearch.searches.protocol import History


def plain(points):
    """The definition, pair by pair."""
    return [
        not np.isnan(one).any() and not any((o <= one).all() and (o < one).any() for o in points)
        for one in points
    ]


@pytest.mark.parametrize("at_once", [1, 7, 500])
def test_the_front_does_not_depend_on_how_many_points_are_compared_at_once(at_once, monkeypatch):
    monkeypatch.setattr(evaluation.pareto.front, "AT_ONCE", at_once)
    points = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)
    points[::11] = np.nan
    points[5, 1] = np.inf
    assert non_dominated(points).tolist() == plain(points)


def told(order, failed=()):
    history = History(problem_of())
    for start in range(0, len(order), 7):
        batch = order[start : start + 7]
        errors = [np.nan if g in failed else 1 - accuracy(g) for g in batch]
        history.add(batch, np.array(errors))
        yield history


def test_the_front_of_a_history_is_that_of_all_it_was_told_after_every_batch():
    generator = np.random.default_rng(0)
    genomes = genomes_of(SPACE)
    order = [genomes[index] for index in generator.permutation(len(genomes))[:60]]
    failed = {*order[:9], *order[20::13]}
    for history in told(order, failed):
        points = np.column_stack([history.errors, history.costs])
        points[history.failed] = np.nan
        expected = plain(points) if not history.failed.all() else [True] * len(history)
        named = [g for g, keep in zip(history.genomes, expected, strict=True) if keep]
        assert history.front() == named


def test_a_model_learns_from_everything_until_it_is_too_much(monkeypatch):
    monkeypatch.setattr(netsearch.searches.protocol, "MAX_LEARNT", 100)
    monkeypatch.setattr(netsearch.searches.protocol, "LEARNT_LATER", 40)
    genomes = genomes_of(SPACE)
    order = [genomes[index] for index in np.random.default_rng(1).permutation(300)]
    for history in told(order):
        learned, front = history.learned_from().tolist(), history.front_indices().tolist()
        assert learned == sorted(set(learned))
        if len(history) <= 100:
            assert learned == list(range(len(history)))
            continue
        assert len(learned) == 40 and (set(front) <= set(learned) or len(front) > 20)
        rest = sorted(set(learned) - set(front))
        assert rest[-5:] == [i for i in range(len(history)) if i not in front][-5:]
    assert len(front) > 3


def test_growth_is_the_hypervolume_of_every_beginning():
    records = every_record()
    box = Box(0.9, (1.0,), (1e6,))
    drawn = [records[i] for i in np.random.default_rng(2).permutation(len(records))[:80]]
    drawn = drawn + drawn[:5]
    shares = [box.hypervolume(pareto_set(drawn[: n + 1])) for n in range(len(drawn))]
    assert box.growth(drawn) == tuple(shares)
