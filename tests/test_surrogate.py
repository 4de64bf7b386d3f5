"""The surrogate search: its regressions, its infill criterion, its candidates."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from scipy.stats import kendalltau, norm

from netsearch.searches.models import MODELS
from netsearch.searches.protocol import SearchConfig
from netsearch.searches.surrogate import (
    Surrogate,
    budget_points,
    choose,
    expected_improvement,
    within,
)
from netsearch.searches.variation import Variation, neighbours
from netsearch.space.genome import SIZES, Genes
from tabular import TableProblem


def toy(costs=1):
    """Three sizes of five: the first two lower the error, all cost; some residue of chance."""
    genomes = np.array(list(itertools.product(range(5), repeat=3)))
    noise = np.random.default_rng(0).normal(0, 0.01, len(genomes))
    errors = 0.9 * np.exp(-0.3 * genomes[:, 0] - 0.4 * genomes[:, 1]) + 0.05 + noise
    weights = np.array([[3.0, 2.0, 4.0], [1.0, 5.0, 2.0], [2.0, 2.0, 1.0]])[:costs]
    return TableProblem(
        Genes(np.full(3, 4), ((SIZES, 3),)), genomes, errors, 1 + genomes @ weights.T
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_ranks_unseen_networks_and_doubts_what_is_far_more_than_what_it_saw(name):
    problem = toy()
    generator = np.random.default_rng(1)
    order = generator.permutation(len(problem.genomes))
    seen, unseen = order[:40], order[40:]
    features = problem.genes.features(problem.genomes)
    predict = MODELS[name](features[seen], np.log(problem.errors[seen]))
    mean, std = predict(features[unseen])
    assert kendalltau(mean, problem.errors[unseen]).statistic > 0.75
    assert (std > 0).all()
    far = predict(features[unseen] + 3.0)[1]
    if name == "gaussian_process":
        assert far.min() > std.max()
    again, _ = MODELS[name](features[seen], np.log(problem.errors[seen]))(features[unseen])
    assert np.array_equal(again, mean)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_equal_values_as_they_come_when_all_have_failed(name):
    mean, std = MODELS[name](np.eye(6), np.zeros(6))(np.eye(6))
    assert np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()


def test_expected_improvement_equals_the_mean_over_draws():
    draws = norm.rvs(0.3, 0.2, 400_000, random_state=0)
    expected = np.maximum(0.0, 0.25 - draws).mean()
    found = expected_improvement(np.array([0.25]), np.array([0.3]), np.array([0.2]))
    assert found[0] == pytest.approx(expected, rel=0.01)
    sure = expected_improvement(np.array([0.5, 0.1]), np.array([0.2, 0.2]), np.full(2, 1e-6))
    assert sure == pytest.approx([0.3, 0.0], abs=1e-5)


@pytest.mark.parametrize("costs", [1, 2, 3])
def test_the_mean_best_error_over_budgets_is_the_hypervolume(costs):
    """So that expected improvement averaged over budgets is expected hypervolume improvement."""
    problem = toy(costs)
    least, largest = problem.bounds
    budgets = budget_points(problem)
    logarithmic, linear = np.split(budgets, 2)
    assert len(budgets) >= 256 and (budgets >= least).all() and (budgets <= largest).all()
    rows = np.random.default_rng(0).choice(len(problem.genomes), 15, replace=False)
    errors, table = problem.errors[rows], problem.table_costs[rows]
    for points, scaled in (
        (linear, (table - least) / (largest - least)),
        (logarithmic, np.log(table / least) / np.log(largest / least)),
    ):
        best = np.where(within(table, points), errors, 1.0).min(axis=1)
        exact = HV(ref_point=np.ones(1 + costs))(np.column_stack([errors, scaled]))
        assert 1.0 - best.mean() == pytest.approx(exact, abs=0.012)


def test_what_is_chosen_counts_at_once_so_a_generation_does_not_crowd_one_place():
    mean = np.array([0.50, 0.501, 0.30, 0.9])
    keeps = np.array([[True, True, False, False], [True, True, True, True]])  # two budgets
    best = np.array([0.6, 0.6])
    std = np.full(4, 1e-3)
    # 0.30 gains 0.3 under the loose budget; then 0.50 gains 0.1 under the tight one; then the
    # twin of that gains nothing more than chance does.
    assert choose(mean, std, keeps, best, 3)[:2] == [2, 0]
    assert sorted(choose(mean, std, keeps, best, 9)) == [0, 1, 2, 3]
    assert best.tolist() == [0.6, 0.6]


def test_doubt_is_worth_a_look():
    mean, keeps, best = np.array([0.5, 0.52]), np.ones((1, 2), dtype=bool), np.array([0.5])
    assert choose(mean, np.array([1e-4, 0.1]), keeps, best, 1) == [1]


def test_neighbours_differ_in_one_gene_and_are_all_of_them():
    near = neighbours((0, 2, 1), np.array([1, 2, 4]))
    assert len(near) == len(set(near)) == 1 + 2 + 4
    assert all(sum(a != b for a, b in zip(g, (0, 2, 1), strict=True)) == 1 for g in near)


def test_children_mix_their_parents_genes_and_mutate_as_often_as_told():
    parents = [(0,) * 8, (9,) * 8]
    pure = Variation(np.full(8, 9), 0.0, 1e-12, np.random.default_rng(0))
    assert set(pure.children(parents, 500)) == set(parents)
    mixed = replace(pure, crossover=1.0).children(parents, 500)
    assert {gene for g in mixed for gene in g} == {0, 9} and len(set(mixed)) > 50
    mutated = np.array(replace(pure, mutation=0.25).children(parents, 2000))
    changed = (mutated != 0) & (mutated != 9)
    assert changed.mean() == pytest.approx(0.25 * 8 / 9, abs=0.015)  # one in nine resets to 0 or 9


def test_a_search_asks_near_its_front_and_for_half_a_population():
    problem = toy()
    search = Surrogate(problem, SearchConfig(evaluations=60, population=12), seed=3)
    first = search.ask(60)
    assert len(first.genomes) == 12
    search.tell(first, problem.evaluate(first))
    second = search.ask(48)
    assert len(second.genomes) == 6 and not set(second.genomes) & set(first.genomes)
    assert len(search.ask(2.5).genomes) == 2
