"""SMEM: a model of pairwise order, and the search that it leads."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.linear_model import LinearRegression

from netsearch.searches import SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from netsearch.searches.selection import survivors
from netsearch.searches.smem import (
    Smem,
    farthest,
    ordered_pairs,
    pairwise_order,
    wins,
)
from netsearch.space.genome import SIZES, Floats, Genes, Genome
from netsearch.space.problem import sample_sizes
from tabular import TableProblem, nats_size

SIDE = 6
PLAIN_NSGA2 = 0.952  # share of hypervolume at 200 evaluations on the NATS size table


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def all_genomes(side: int, genes: int) -> NDArray[np.int64]:
    return np.stack(np.meshgrid(*[np.arange(side)] * genes, indexing="ij"), -1).reshape(-1, genes)


@pytest.fixture
def toy() -> TableProblem:
    """Three sizes of six: each costs, each lowers the error, the last most of all."""
    genomes = all_genomes(SIDE, 3)
    errors = 0.9 - genomes @ np.array([0.02, 0.04, 0.08])
    costs = 1.0 + genomes @ np.array([1.0, 1.0, 1.5])
    return TableProblem(Genes(np.full(3, SIDE - 1), ((SIZES, 3),)), genomes, errors, costs[:, None])


@pytest.fixture(scope="module")
def nats(data_root: Path) -> TableProblem:
    return nats_size(data_root)


def config(evaluations: int, population: int = 20) -> SearchConfig:
    return SearchConfig(search="smem", evaluations=evaluations, population=population)


def asked(problem: TableProblem, evaluations: int, seed: int = 0) -> list[Batch]:
    """Run a search; return its batches."""
    batches: list[Batch] = []

    def evaluate(batch: Batch) -> Floats:
        batches.append(batch)
        return problem.evaluate(batch)

    run_search(Smem(problem, config(evaluations), seed), evaluate, evaluations)
    return batches


def test_it_is_registered() -> None:
    assert SEARCHES["smem"] is Smem


def test_pairs_stand_in_both_orders_with_opposite_labels_and_equal_errors_make_none() -> None:
    errors = np.array([0.3, 0.1, 0.3, np.inf, np.inf])
    one, other, better = ordered_pairs(errors, generator())
    label = dict(zip(zip(one.tolist(), other.tolist(), strict=True), better.tolist(), strict=True))
    assert len(label) == len(one) == 2 * (10 - 2)  # 0 and 2 are equal, so are both failed ones
    assert all(label[b, a] is not said for (a, b), said in label.items())
    assert label[1, 0] and label[0, 3] and label[2, 4]


def test_too_many_pairs_are_drawn_from_and_keep_both_orders() -> None:
    one, other, better = ordered_pairs(generator().random(30), generator(), limit=50)
    assert len(one) == 100 and better.sum() == 50
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    assert len(pairs) == 100 and {(b, a) for a, b in pairs} == pairs


def test_win_counts_order_a_toy_whose_order_is_known(toy: TableProblem) -> None:
    told = [tuple(row) for row in toy.genomes[generator().permutation(216)[:60]].tolist()]
    features = toy.features(told)
    order = pairwise_order(features, toy.errors[toy.row(told)], generator())
    held_out = [tuple(row) for row in toy.genomes.tolist() if tuple(row) not in set(told)]
    counts = wins(order, toy.features(held_out), features)
    tau = kendalltau(counts, -toy.errors[toy.row(held_out)])[0]
    assert tau > 0.9
    least, largest = toy.features([(0, 0, 0)]), toy.features([(5, 5, 5)])
    assert wins(order, largest, features)[0] >= 58 and wins(order, least, features)[0] <= 2


def test_wins_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opponents = generator(1).random((7, 2)), generator(2).random((5, 2))

    def order(a: Floats, b: Floats) -> NDArray[np.bool_]:
        return a[:, 0] < b[:, 0]

    expected = (asked[:, None, 0] < opponents[None, :, 0]).sum(axis=1)
    for rows in (1, 11, 1000):
        monkeypatch.setattr("netsearch.searches.smem.PAIRS_AT_ONCE", rows)
        assert wins(order, asked, opponents).tolist() == expected.tolist()


def test_failed_networks_lose(toy: TableProblem) -> None:
    """Networks whose last gene is large fail: the model learns to keep away from them."""
    told = [tuple(row) for row in toy.genomes[generator().permutation(216)[:80]].tolist()]
    errors = toy.errors[toy.row(told)]
    errors[np.array(told)[:, 2] >= 4] = np.nan
    search = Smem(toy, config(200), 0)
    search.tell(Batch(tuple(told)), errors)
    held_out = [tuple(row) for row in toy.genomes.tolist() if tuple(row) not in set(told)]
    losses, fails = search._losses(held_out), np.array(held_out)[:, 2] >= 4
    assert losses[fails].mean() > losses[~fails].mean() + 50
    assert losses[fails].min() > np.median(losses[~fails])


def test_a_search_whose_networks_all_fail_goes_on_asking_for_new_ones(toy: TableProblem) -> None:
    search = Smem(toy, config(60), 0)
    told: list[Genome] = []
    for _ in range(4):
        batch = search.ask(60)
        told += batch.genomes
        search.tell(batch, np.full(len(batch.genomes), np.nan))
    assert len(set(told)) == len(told) == 20 + 3 * 10


def test_the_farthest_points_come_first() -> None:
    points = np.array([[0.0], [1.0], [5.0], [9.0], [10.0]])
    assert farthest(points, np.array([[0.0]]), 2) == [4, 2]
    assert sorted(farthest(points, np.array([[0.0]]), 9)) == [0, 1, 2, 3, 4]


def test_survivors_are_the_first_rank_and_then_the_least_crowded() -> None:
    front = np.array([[0.0, 4.0], [1.0, 3.0], [1.1, 2.9], [2.0, 2.0], [4.0, 0.0]])
    behind = front + 5.0
    points = np.vstack([behind, front])
    assert sorted(survivors(points, 5)) == [5, 6, 7, 8, 9]
    four = set(survivors(points, 4))
    assert {5, 8, 9} < four < {5, 6, 7, 8, 9}
    assert len(survivors(points, 99)) == 10 and survivors(points, 0) == []


def test_the_vice_population_is_far_from_the_front_and_has_its_part_in_a_batch(
    toy: TableProblem,
) -> None:
    told = [tuple(row) for row in toy.genomes[::2].tolist()]
    search = Smem(toy, config(200), 0)
    errors = toy.errors[toy.row(told)]
    errors[-1] = np.nan
    search.tell(Batch(tuple(told)), errors)
    front = search.history.front()
    vice = search._vice(front)
    assert len(vice) == 20 and not set(vice) & {*front, told[-1]}
    main, other = search._candidates()
    assert main and other and not set(main) & set(other)
    chosen = search._choose(main, other, 8)
    assert len(set(chosen)) == 8 and len(set(chosen) & set(other)) == 2


@pytest.mark.slow
def test_it_orders_held_out_networks_better_than_linear_regression(nats: TableProblem) -> None:
    """100 labelled networks of the NATS size space, 500 held out, the same features."""
    taus: list[tuple[float, float]] = []
    for seed in range(5):
        draw = generator(seed)
        told = sample_sizes(nats, 100, draw)[0]
        held_out = [tuple(row) for row in draw.permutation(nats.genomes)[:500].tolist()]
        held_out = [genome for genome in held_out if genome not in set(told)]
        features, asked = nats.features(told), nats.features(held_out)
        errors, truth = nats.errors[nats.row(told)], -nats.errors[nats.row(held_out)]
        order = pairwise_order(features, errors, draw)
        counts = wins(order, asked, features)
        linear = LinearRegression().fit(features, errors).predict(asked)
        taus.append((kendalltau(counts, truth)[0], kendalltau(-linear, truth)[0]))
    pairwise, linear = np.array(taus).T
    assert pairwise.mean() > linear.mean() + 0.04, taus
    assert np.all(pairwise > linear + 0.02), taus


@pytest.mark.slow
def test_it_beats_plain_nsga2_at_200_evaluations(nats: TableProblem) -> None:
    shares = [
        nats.share([genome for batch in asked(nats, 200, seed) for genome in batch.genomes])
        for seed in range(2)
    ]
    assert np.mean(shares) > PLAIN_NSGA2 + 0.01, shares


class HalfAllowed:
    """The toy with a hard budget: the first gene must be even."""

    def __init__(self, table: TableProblem):
        self.table = table
        self.genes, self.bounds = table.genes, table.bounds
        self.costs, self.id, self.features = table.costs, table.id, table.features
        self.cheapest = table.cheapest

    def excess(self, genomes: list[Genome]) -> Floats:
        return np.array([float(genome[0] % 2) for genome in genomes])


@pytest.mark.slow
def test_networks_asked_for_are_new_distinct_and_allowed(toy: TableProblem) -> None:
    problem = HalfAllowed(toy)
    search = Smem(problem, config(90), 0)
    told: list[Genome] = []
    while len(told) < 90:
        batch = search.ask(90 - len(told))
        assert 0 < len(batch.genomes) <= 90 - len(told)
        told += batch.genomes
        search.tell(batch, toy.evaluate(batch))
    assert len(set(told)) == len(told) == 90
    assert all(genome[0] % 2 == 0 for genome in told)


@pytest.mark.slow
def test_the_same_seed_asks_the_same_and_another_one_does_not(toy: TableProblem) -> None:
    assert asked(toy, 50, seed=3) == asked(toy, 50, seed=3)
    assert asked(toy, 50, seed=3) != asked(toy, 50, seed=4)


@pytest.mark.slow
def test_an_exhausted_space_ends_with_an_empty_batch() -> None:
    genomes = all_genomes(3, 2)
    genes = Genes(np.full(2, 2), ((SIZES, 2),))
    problem = TableProblem(genes, genomes, 0.5 - genomes.sum(1) / 10, 1.0 + genomes.sum(1)[:, None])
    search = Smem(problem, config(100, population=4), 0)
    told: list[Genome] = []
    while (batch := search.ask(100)).genomes:
        told += batch.genomes
        search.tell(batch, problem.evaluate(batch))
    assert sorted(told) == [tuple(row) for row in genomes.tolist()]
    assert search.ask(100) == Batch(())
