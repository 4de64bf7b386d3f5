"""The look-up graph, and the constraint against the latencies of real devices (NAS-Bench-201)."""

import sys
from pathlib import Path

import pytest

from evaluation.errors import InputError
from evaluation.workers.workers import Workers
from lookup_graph import LookupGraph

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from dca_devices import Device, read_table  # noqa: E402


def cost_of(search_budget: float) -> float:
    """A search's true cost: grows by whole steps, with one network dearer than its neighbours."""
    return 25.0 if search_budget == 20 else 10.0 * round(search_budget / 10)


@pytest.fixture
def graph() -> LookupGraph:
    return LookupGraph.measure(
        cost_of, [40, 10, 30, 20, 22, 14], dataset="cifar10", metric="params"
    )


def test_the_curve_rises_and_no_recorded_network_is_above_it(graph):
    assert graph.search_budgets == (10, 14, 20, 22, 30, 40)
    assert graph.costs == (10, 10, 25, 20, 30, 40)
    assert graph.curve == (10, 10, 25, 25, 30, 40)


@pytest.mark.parametrize(
    ("limit", "search_budget"), [(10, 10 + 4), (24, 14), (25, 22), (39, 30), (1000, 40)]
)
def test_a_device_gets_the_largest_search_budget_whose_curve_keeps_its_limit(
    graph, limit, search_budget
):
    assert graph.search_budget(limit) == search_budget


def test_a_limit_below_every_network_is_refused_with_the_smallest(graph):
    with pytest.raises(InputError, match="params: .* kept 9; the smallest search budget gave 10"):
        graph.search_budget(9)


def test_monotony_is_one_for_rising_costs_and_falls_with_disorder(graph):
    assert LookupGraph("d", "params", (1, 2, 3), (5, 6, 9)).monotony == pytest.approx(1)
    assert LookupGraph("d", "params", (1, 2, 3), (9, 6, 5)).monotony == pytest.approx(-1)
    assert 0.9 < graph.monotony < 1


def test_a_graph_survives_json(graph, tmp_path):
    graph.save(tmp_path / "graph.json")
    assert LookupGraph.load(tmp_path / "graph.json") == graph


@pytest.mark.parametrize(
    "text",
    ['{"dataset": "d"}', "[]", '{"dataset":"d","metric":"m","search_budgets":[2,1],"costs":[1,1]}'],
)
def test_a_file_with_something_else_is_named(tmp_path, text):
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"graph\.json: not a look-up graph"):
        LookupGraph.load(path)


@pytest.mark.slow
def test_searches_run_in_workers_and_give_the_same_graph(graph):
    parallel = LookupGraph.measure(
        cost_of, graph.search_budgets, dataset="cifar10", metric="params", workers=Workers(2)
    )
    assert parallel == graph


@pytest.fixture(scope="module")
def device(data_root):
    names = ["eyeriss", "fpga", "raspi4", "pixel3"]
    table = read_table(data_root, names)
    return {name: Device.fit(name, table) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eyeriss", "fpga"])
def test_where_latency_is_additive_derived_cells_keep_a_device_s_budget(device, name):
    assert device[name].runs([3])["met"] >= 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raspi4", "pixel3"])
def test_where_it_is_not_the_look_up_graph_keeps_it(device, name):
    graph = device[name].graph(points=20)
    assert graph.monotony >= 0.95
    assert device[name].runs([3], graph)["met"] >= 9
