"""Tabular benchmarks: what the tables hold, and what the searches make of them."""

import gzip

import numpy as np
import pytest

from evaluation.errors import InputError
from netsearch.searches import SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from tabular import nats_size, nb201

DEVICE = "raspi4"


@pytest.fixture(scope="module")
def sizes(data_root):
    return nats_size(data_root)


@pytest.fixture(scope="module")
def cells(data_root):
    return nb201(data_root)


def share(problem, search, evaluations, population, seed):
    told = []

    def evaluate(batch):
        told.extend(batch.genomes)
        return problem.evaluate(batch)

    config = SearchConfig(search=search, evaluations=evaluations, population=population)
    run_search(SEARCHES[search](problem, config, seed), evaluate, evaluations)
    assert len(set(told)) == len(told) == evaluations
    return problem.share(told)


def test_the_nats_size_space_has_the_params_and_the_front_that_are_known(sizes):
    params = sizes.table_costs[:, 0]
    assert (len(params), params.min(), params.max()) == (32_768, 11_714, 713_674)
    points = np.column_stack([sizes.errors, params])
    points = points[np.lexsort((points[:, 0], points[:, 1]))]
    before = np.minimum.accumulate(np.append(1.0, points[:-1, 0]))
    assert (points[:, 0] < before).sum() == 72  # as methods.md section 10 says
    front = [tuple(g) for g in sizes.genomes[np.lexsort((sizes.errors, params))].tolist()]
    whole = [g for g, on in zip(front, points[:, 0] < before, strict=True) if on]
    assert sizes.share(whole) == pytest.approx(1.0)
    assert 0.9 < sizes.share(whole[::2]) < 1.0


@pytest.mark.slow
def test_nas_bench_201_has_its_published_optimum_and_costs(cells, data_root):
    assert len(cells.genomes) == 15_625
    assert 1 - cells.reported.min() == pytest.approx(0.943733, abs=1e-6)
    best = cells.genomes[cells.reported.argmin()]
    assert cells.row([tuple(best.tolist())])[0] == 6111  # the official index
    full = [(3,) * 6, (0,) * 6]
    assert cells.costs(full)[:, 0].tolist() == [1_531_546, 73_306]
    timed = nb201(data_root, costs=("params", DEVICE))
    assert timed.costs(full).shape == (2, 2) and (timed.costs(full)[:, 1] > 0).all()


@pytest.mark.slow
def test_what_is_searched_is_validation_and_what_is_reported_is_test(cells, data_root):
    assert not np.array_equal(cells.errors, cells.reported)
    long = nb201(data_root, epochs=200)
    assert np.array_equal(long.errors, cells.reported)
    fidelity, short = long.low
    assert fidelity < 1 and np.array_equal(short, cells.errors)
    genome = (3, 2, 1, 3, 0, 3)
    low = long.evaluate(Batch((genome,), fidelity))
    assert low == cells.evaluate(Batch((genome,)))
    with pytest.raises(ValueError, match="fidelity"):
        cells.evaluate(Batch((genome,), 0.5))


@pytest.mark.slow
def test_features_do_not_see_ops_that_nothing_reaches(cells):
    # 01 02 12 03 13 23: without 01 nothing arrives at node 1, so 12 and 13 say nothing.
    one, other, third = cells.features([(0, 0, 3, 3, 3, 0), (0, 0, 0, 3, 0, 0), (1, 0, 3, 3, 3, 0)])
    assert np.array_equal(one[:-1], other[:-1])  # the last feature is the cost
    assert not np.array_equal(one[:-1], third[:-1])


# Measured with benchmarks/network_search.py, 20 seeds, see docs/searches.md.
@pytest.mark.parametrize(("population", "evaluations", "least"), [(20, 100, 0.95), (40, 400, 0.96)])
def test_on_the_size_table_plain_nsga2_nears_the_true_front(sizes, population, evaluations, least):
    shares = [share(sizes, "nsga2", evaluations, population, seed) for seed in range(20)]
    assert np.mean(shares) >= least
    uniform = []
    for seed in range(20):
        rows = np.random.default_rng(seed).choice(len(sizes.genomes), evaluations, replace=False)
        uniform.append(sizes.share([tuple(g) for g in sizes.genomes[rows].tolist()]))
    assert (np.array(shares) > np.array(uniform)).sum() >= 15


@pytest.mark.slow
def test_in_100_evaluations_the_default_beats_nsga2_and_equals_its_400_on_the_size_table(sizes):
    default = SearchConfig(evaluations=100, population=20).search
    seeds = range(6)
    found = np.array([share(sizes, default, 100, 20, seed) for seed in seeds])
    plain = np.array([share(sizes, "nsga2", 100, 20, seed) for seed in seeds])
    longer = np.array([share(sizes, "nsga2", 400, 40, seed) for seed in seeds])
    drawn = np.array([share(sizes, "random", 100, 20, seed) for seed in seeds])
    assert (found > plain).all() and (found > drawn).all()
    assert found.mean() >= longer.mean()


@pytest.mark.slow
def test_in_100_evaluations_the_default_beats_nsga2_on_cells(cells):
    seeds = range(6)
    found = np.array([share(cells, "surrogate", 100, 20, seed) for seed in seeds])
    plain = np.array([share(cells, "nsga2", 100, 20, seed) for seed in seeds])
    assert (found > plain).sum() >= 5 and found.mean() > plain.mean() + 0.004


@pytest.mark.parametrize("read", [nats_size, nb201])
def test_a_missing_table_is_named(tmp_path, read):
    with pytest.raises(InputError, match=r"csv\.gz: no such table"):
        read(tmp_path)


def test_a_table_with_other_columns_says_which_are_missing(tmp_path):
    path = tmp_path / "nats_size_cifar10.csv.gz"
    path.write_bytes(gzip.compress(b"c0,c1,c2,c3,c4,loss\n8,8,8,8,8,1.0\n"))
    with pytest.raises(InputError, match="no data on accuracy; columns: c0, c1, c2, c3, c4, loss"):
        nats_size(tmp_path)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"c0,c1\n1,2")[:-9]], ids=["no gzip", "cut"]
)
def test_a_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "nats_size_cifar10.csv.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"csv\.gz"):
        nats_size(tmp_path)


def test_a_table_with_a_row_too_few_or_no_number_is_refused(tmp_path):
    path = tmp_path / "nats_size_cifar10.csv.gz"
    head = "c0,c1,c2,c3,c4,accuracy\n"
    path.write_bytes(gzip.compress((head + "8,8,8,8,8,90.0\n").encode()))
    with pytest.raises(InputError, match="expected 32768 different widths, got 1"):
        nats_size(tmp_path)
    path.write_bytes(gzip.compress((head + "8,8,8,8,8,good\n").encode()))
    with pytest.raises(InputError, match="damaged"):
        nats_size(tmp_path)


def test_objectives_without_data_are_named(data_root):
    with pytest.raises(InputError, match="no data on flops; expected params"):
        nats_size(data_root, costs=("flops",))
    with pytest.raises(InputError, match="no data on toaster; columns: .*raspi4"):
        nb201(data_root, costs=("toaster",))
    with pytest.raises(InputError, match="no data on 'mnist'; expected cifar10"):
        nb201(data_root, dataset="mnist")
