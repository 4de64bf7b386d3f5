"""NAS-Bench-201: the space, its cells as digits and strings, and the tables."""

import csv
import gzip
import random

import pytest
import torch

from blocksearch.nas_bench_201 import (
    CELLS,
    OPS,
    SPACE,
    Table,
    arch_string,
    benchmark_network,
    cell_of,
    digits,
)
from blocksearch.relaxation import Gates, derive_strongest, one_hot_gates
from blocksearch.space import NORMAL, Cell
from blocksearch.supernet.supernet import Supernet
from evaluation.cost.counts import measure_cost
from evaluation.errors import InputError


@pytest.fixture(scope="module")
def rows(data_root):
    with gzip.open(data_root / "nb201_accuracy.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def test_digits_and_strings_are_those_of_the_official_table(rows):
    assert len(rows) == CELLS == 15_625
    for row in random.Random(0).sample(rows[1:], 500):
        cell = cell_of(row["ops"])
        if cell.nodes != ((), (), ()):
            assert digits(cell) == row["ops"]
            assert arch_string(cell) == row["arch"]


def test_the_table_gives_fractions_and_milliseconds_of_the_published_best_cell(data_root, rows):
    table = Table.read(data_root, ["c10_test_200", "raspi4"])
    best = table.best("c10_test_200")
    assert best == rows[6111]["ops"]
    assert table[cell_of(best)]["c10_test_200"] == pytest.approx(0.943733, abs=1e-6)
    assert 1 < table[cell_of(best)]["raspi4"] < 100


def test_a_missing_table_or_column_is_named(data_root, tmp_path):
    with pytest.raises(InputError, match=r"nb201_accuracy\.csv\.gz: no such table"):
        Table.read(tmp_path, [])
    with pytest.raises(InputError, match="no column 'abacus'"):
        Table.read(data_root, ["abacus"])


@pytest.mark.parametrize("code", ["01234", "0123450", "012345", "01234x"])
def test_other_digits_are_refused(code):
    with pytest.raises(ValueError, match="6 digits"):
        cell_of(code)


def test_every_edge_keeps_its_best_op_and_none_may_win():
    p = torch.full((6, 5), 0.1)
    for edge, op in enumerate((3, 0, 1, 4, 2, 0)):
        p[edge, op] = 0.6
    cell = derive_strongest(p, SPACE)
    assert digits(cell) == "301420"
    SPACE.check(cell)


def test_a_cell_is_never_derived_without_edges():
    p = torch.zeros(6, 5)
    p[:, 0], p[4, 2] = 0.9, 0.1
    assert digits(derive_strongest(p, SPACE)) == "000020"


def test_random_cells_use_every_op_on_every_edge_equally_often():
    generator = random.Random(1)
    drawn = [digits(SPACE.random_cell(generator)) for _ in range(3000)]
    for edge in range(6):
        for op in range(5):
            assert sum(code[edge] == str(op) for code in drawn) == pytest.approx(600, rel=0.2)


def textbook_cell(weights, x, code):
    """The cell by definition: a node is the sum of ops of earlier ones; the last is handed on."""
    states = [x]
    chosen = iter(zip(code, weights, strict=True))
    for node in range(3):
        total = torch.zeros_like(x)
        for source in range(node + 1):
            digit, ops = next(chosen)
            op, state = OPS[int(digit)], states[source]
            if op == "skip_connect":
                total = total + state
            elif op == "avg_pool_3x3":
                pooled = torch.nn.functional.avg_pool2d(state, 3, 1, 1, count_include_pad=False)
                total = total + normalised(pooled)
            elif op != "none":
                kernel = ops[OPS.index(op)].body.weight
                conv = torch.nn.functional.conv2d(torch.relu(state), kernel, padding="same")
                total = total + normalised(conv)
        states.append(total)
    return states[-1]


def normalised(z):
    return torch.nn.functional.batch_norm(z, None, None, training=True)


def make_supernet(cells=5, channels=4, side=8):
    torch.manual_seed(0)
    return Supernet(SPACE, (3, side, side), 10, channels=channels, cells=cells, stages=3).double()


@pytest.mark.parametrize("seed", range(4))
def test_one_hot_gates_make_the_supernet_the_network_of_the_definition(seed):
    net = make_supernet()
    cell = SPACE.random_cell(random.Random(seed))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    gates = one_hot_gates({NORMAL: cell}, SPACE)
    got = net(x, Gates(gates.weight.double(), gates.active))
    state = net.stem(x)
    for kind, module in zip(net.kind_of_cell, net.cells, strict=True):
        if kind is None:
            state = module(state, state)
        else:
            state = textbook_cell(module.edges, state, digits(cell))
    expected = net.classifier(torch.relu(normalised(state)).mean(dim=(2, 3)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_the_layout_is_that_of_the_benchmark():
    net = make_supernet(cells=17, channels=16, side=32)
    assert [p for p, kind in enumerate(net.kind_of_cell) if kind is None] == [5, 11]
    assert [place.channels for place in net.places] == [16] * 5 + [32] * 6 + [64] * 6
    assert net.kinds == (NORMAL,)


def test_costs_of_found_cells_are_those_of_the_built_network():
    net = make_supernet(cells=5, channels=8)
    for seed in range(5):
        cell = SPACE.random_cell(random.Random(seed))
        stack = net.found({NORMAL: cell})
        network = stack()
        assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
        assert stack.cost() == measure_cost(network, (3, 8, 8))


def test_the_size_of_the_largest_cell_is_the_benchmarks():
    # As we remember it, 1.531 M params where all edges are 3x3 convolutions (C = 16, N = 5).
    largest = cell_of("333333")
    network = benchmark_network(largest)
    assert network.cost().params == pytest.approx(1.53e6, rel=1e-2)
    net = make_supernet(cells=17, channels=16, side=32)
    assert net.found({NORMAL: largest}) == network


def test_an_edgeless_cell_is_refused():
    with pytest.raises(ValueError, match="expected edges"):
        SPACE.check(Cell(((), (), ()), 1, "last"))
