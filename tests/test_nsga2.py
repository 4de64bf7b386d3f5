"""NSGA-II: its parts against brute force, what pymoo is told, a search of an enumerated space."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.algorithm import Algorithm
from pymoo.core.population import Population
from pymoo.core.problem import Problem

from analytic import (
    SPACE,
    TINY,
    counts,
    every_record,
    genomes_of,
    learn,
    problem_of,
    replace_training,
    run,
)
from evaluation.pareto.front import Budgets, pareto_set
from netsearch.search import hypervolume_box
from netsearch.searches.nsga2 import SizeSampling, _directions
from netsearch.searches.variation import RandomReset

TWO_OR_THREE = pytest.mark.parametrize("costs", [("params",), ("params", "flops")])


@pytest.fixture
def trained(monkeypatch):
    """Replace the training by a formula; (id, epochs) of what is trained are listed."""
    return replace_training(monkeypatch)


@pytest.fixture
def told(monkeypatch):
    """List what pymoo is told: (genome, objectives, violations)."""
    individuals, tell = [], Algorithm.tell

    def spy(self, infills=None, **kwargs):
        individuals.extend((i.X, i.F, i.G) for i in infills)
        return tell(self, infills=infills, **kwargs)

    monkeypatch.setattr(Algorithm, "tell", spy)
    return individuals


def survivors(objectives):
    problem = Problem(n_var=1, n_obj=objectives.shape[1], xl=0, xu=1)
    population = Population.new("X", np.zeros((len(objectives), 1)), "F", objectives)
    survival = NSGA2(pop_size=len(objectives)).survival
    return survival.do(
        problem,
        population,
        n_survive=len(objectives),
        random_state=np.random.default_rng(0),
    )


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_fast_non_dominated_sort_equals_brute_force(objectives):
    generator = np.random.default_rng(objectives)
    points = generator.integers(0, 8, (60, objectives)).astype(float)
    expected, left, rank = {}, {tuple(p) for p in points}, 0
    while left:
        front = {
            p
            for p in left
            if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in left)
        }
        expected.update(dict.fromkeys(front, rank))
        left, rank = left - front, rank + 1
    assert rank > 3
    ranked = survivors(points)
    assert len(ranked) == 60
    for individual in ranked:
        assert individual.get("rank") == expected[tuple(individual.F)]


def test_the_ends_of_a_front_are_crowded_infinitely_little_and_gaps_count():
    points = np.array([[0.0, 10], [1, 6], [2, 5], [3, 4], [10, 0], [11, 11]])
    crowding = {tuple(i.F): i.get("crowding") for i in survivors(points)}
    assert crowding[0, 10] == crowding[10, 0] == math.inf
    assert crowding[11, 11] == math.inf  # alone on the second front
    # gaps to the neighbours as shares of 10: (2 + 5) > (2 + 2), and (8 + 5) above all
    assert crowding[3, 4] > crowding[1, 6] > crowding[2, 5] > 0


@pytest.mark.slow
def test_the_search_recovers_nearly_all_hypervolume_of_an_enumerated_space(tmp_path, trained):
    every, problem = every_record(), problem_of()
    box = hypervolume_box(problem)
    exact = box.hypervolume(every)
    assert len(every) == 1458 and len(pareto_set(every)) > 15
    for seed in range(3):
        sizes = {"population": 20, "evaluations": 300}
        found = run(tmp_path / str(seed), "nsga2", problem, seed=seed, **sizes)
        assert box.hypervolume(found) >= 0.99 * exact


@pytest.mark.parametrize("population", [5, 10, 40])
@pytest.mark.parametrize("objectives", [3, 4, 5])
def test_reference_directions_are_even_and_no_more_than_the_population(objectives, population):
    directions = _directions(objectives, population)
    assert objectives <= len(directions) <= population
    assert (directions >= 0).all() and np.allclose(directions.sum(axis=1), 1)
    assert len(np.unique(directions, axis=0)) == len(directions)


def test_a_population_smaller_than_the_directions_is_filled_up_without_a_word(
    tmp_path, trained, capsys
):
    problem = problem_of(costs=("params", "flops", "bits", "params"))
    assert len(run(tmp_path, "nsga2", problem, population=4, evaluations=20)) == 20
    assert capsys.readouterr().out == ""


def test_a_longer_search_goes_on_where_the_shorter_one_ended(tmp_path, trained):
    shorter = run(tmp_path / "a", "nsga2", problem_of(), evaluations=40)
    longer = run(tmp_path / "a", "nsga2", problem_of(), evaluations=60)
    assert longer[:40] == shorter and len(longer) == 60
    assert set(run(tmp_path / "b", "nsga2", problem_of(), evaluations=60)) == set(longer)


@TWO_OR_THREE
def test_a_failed_network_never_stands_on_the_front_and_is_told_as_finite_and_infeasible(
    tmp_path, monkeypatch, told, costs
):
    def fails(genome):
        return genome[2] == 0  # all that are narrow in stage one, the cheapest of the space

    def estimate(record, build, context, recipe):
        failed = replace(record, failure="RuntimeError: out of memory")
        return failed if fails(record.genome) else learn(record, build, context, recipe)

    replace_training(monkeypatch, estimate)
    records = run(tmp_path, "nsga2", problem_of(costs=costs), evaluations=120)
    failed = [r for r in records if fails(r.genome)]
    assert failed and all(r.valid_accuracy is None and r.failure for r in failed)
    assert not any(fails(r.genome) for r in pareto_set(records))
    assert len(told) >= 108
    for genome, objectives, violation in told:
        assert len(objectives) == 1 + len(costs)
        assert np.isfinite(objectives).all() and np.isfinite(violation).all()
        assert (violation[0] > 0) == fails(genome)
    # Infeasible ones die out: the last fifty hold fewer of them than chance would, a third.
    assert sum(fails(r.genome) for r in records[-50:]) < 50 / 4


@TWO_OR_THREE
@pytest.mark.parametrize("count", ["params", "flops"])
def test_candidates_over_a_budget_are_told_as_infeasible_and_never_trained(
    tmp_path, trained, told, count, costs
):
    amounts = dict(zip(genomes_of(SPACE), counts(count), strict=True))
    budget = int(np.quantile([*amounts.values()], 0.2))
    bounded = problem_of(budgets=Budgets(**{f"max_{count}": budget}), costs=costs)
    records = run(tmp_path, "nsga2", bounded)
    assert len(records) == 60
    assert all(r.cost.count(count) <= budget for r in records)
    assert sorted(id for id, _ in trained) == sorted(r.id for r in records)
    over = [amounts[tuple(genome)] > budget for genome, _, _ in told]
    assert any(over) and over == [violation[0] > 0 for _, _, violation in told]


def mutate(genomes, upper, **parameters):
    problem = Problem(n_var=len(upper), n_obj=1, xl=0, xu=np.array(upper), vtype=int)
    generator = np.random.default_rng(0)
    population = Population.new("X", genomes.copy())
    return RandomReset(**parameters).do(problem, population, random_state=generator).get("X")


def test_mutation_changes_about_one_gene_of_each_genome_always_to_another_value_in_bounds():
    upper = [1, 2, 7, 3, 1, 4, 2, 5]
    before = np.random.default_rng(1).integers(0, np.array(upper) + 1, (8000, 8))
    after = mutate(before, upper, prob_var=1 / 8)
    assert np.issubdtype(after.dtype, np.integer)
    assert (after >= 0).all() and (after <= upper).all()
    changed = after != before
    assert changed.sum(axis=1).mean() == pytest.approx(1, abs=0.05)
    # Each gene by itself too, however few its choices: a reset to its own value would show.
    assert changed.mean(axis=0) == pytest.approx(1 / 8, abs=0.015)


def test_mutation_reaches_every_other_value_equally_often_and_leaves_single_choices():
    before = np.full((6000, 2), [2, 0])
    after = mutate(before, [4, 0], prob_var=1.0)
    values, counts = np.unique(after[:, 0], return_counts=True)
    assert values.tolist() == [0, 1, 3, 4]
    assert counts == pytest.approx(1500, rel=0.1)
    assert (after[:, 1] == 0).all()


def test_mutation_does_not_change_its_argument():
    problem = Problem(n_var=2, n_obj=1, xl=0, xu=np.array([4, 4]), vtype=int)
    genomes = np.full((50, 2), 2)
    RandomReset(prob_var=1.0)._do(problem, genomes, random_state=np.random.default_rng(0))
    assert (genomes == 2).all()


def sample(problem, count):
    stub = Problem(n_var=len(problem.genes.upper), n_obj=1)
    generator = np.random.default_rng(0)
    population = SizeSampling(problem).do(stub, count, random_state=generator)
    return [tuple(int(gene) for gene in row) for row in population.get("X")]


def test_the_first_population_is_distinct_and_feasible_also_under_a_tight_budget():
    limit = int(sorted(counts("params"))[40])
    tight = problem_of(budgets=Budgets(max_params=limit), costs=("params", "flops"))
    genomes = sample(tight, 20)
    assert len(set(genomes)) == 20
    assert all(tight.cost(g).params <= limit for g in genomes)


def test_the_first_population_reaches_from_the_smallest_size_to_the_largest():
    sizes = 2 * SPACE.stages
    for count in (4, 10):
        sampled = sample(problem_of(costs=("params", "flops")), count)
        genomes = [genome[:sizes] for genome in sampled]
        assert genomes[0] == (0,) * sizes and genomes[-1] == tuple(SPACE.upper[:sizes])


def test_the_first_population_is_filled_up_when_too_few_networks_are_feasible():
    free = problem_of(TINY)
    limit = sorted(free.cost(g).params for g in genomes_of(TINY))[2]
    tight = problem_of(TINY, Budgets(max_params=limit), ("params", "flops"))
    genomes = sample(tight, 8)
    assert len(genomes) == 8
    assert sum(tight.cost(g).params <= limit for g in set(genomes)) == 3


@pytest.mark.slow
def test_three_objectives_are_searched_as_well(tmp_path, trained):
    problem = problem_of(costs=("params", "flops"))
    box = hypervolume_box(problem)
    found = run(tmp_path, "nsga2", problem, population=20, evaluations=300)
    assert box.hypervolume(found) >= 0.97 * box.hypervolume(every_record())


@pytest.mark.slow
def test_both_searches_evaluate_the_cheapest_network_so_a_front_reaches_that_end(tmp_path, trained):
    problem = problem_of(costs=("params", "flops"))
    for seed in range(3):
        drawn = run(tmp_path / f"random{seed}", "random", problem, seed=seed, evaluations=8)
        evolved = run(tmp_path / f"{seed}", "nsga2", problem, seed=seed)
        for archive in (evolved, drawn):
            front = pareto_set(archive, ("params",))
            assert front[0].cost.params == counts("params").min()
            assert min(record.cost.flops for record in archive) == counts("flops").min()
