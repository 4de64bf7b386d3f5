"""Measured milliseconds, and the additive table of a network's parts."""

import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from blocksearch.ops import LIGHT_OPS
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.supernet.stack import PlacedCell, Stack
from evaluation.cost.latency import clock_of, measure_ms
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from netsearch.space.genome import GenomeSpace, NetworkSpec, Stage
from netsearch.space.latency_table import LatencyTable, parts
from netsearch.space.network import builder
from netsearch.space.networks import Networks

SHAPE, CLASSES = (3, 16, 16), 10
SPACE = GenomeSpace(2, depths=(1, 2, 4), widths=(4, 16, 32), normal=("n0", "n1"), reduction=("r0",))


@pytest.fixture(scope="module")
def cells():
    generator, space = random.Random(0), SearchSpace(LIGHT_OPS, nodes=2)
    return {name: space.random_cell(generator) for name in ("n0", "n1", "r0")}


@pytest.fixture(scope="module")
def table(cells):
    return LatencyTable.measure(Networks(SPACE, cells, SHAPE, CLASSES), "cpu")


def stack_of(genome, cells, space=SPACE):
    return builder(space.decode(genome), cells, SHAPE, CLASSES)


def convolutions(channels):
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)]
    return nn.Sequential(*layers)


class Recorder(nn.Module):
    """Notes how it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.calls = []

    def __deepcopy__(self, memo):
        copied = Recorder()
        copied.calls = self.calls
        return copied

    def forward(self, *inputs):
        state = (torch.get_num_threads(), self.training, torch.is_inference_mode_enabled())
        last = inputs[0].is_contiguous(memory_format=torch.channels_last)
        self.calls.append((state, [tuple(x.shape) for x in inputs], last))
        return inputs[0]


def test_a_wide_stack_takes_longer_than_a_narrow_one():
    narrow, wide = (measure_ms(convolutions(c), (c, 16, 16)).median_ms for c in (8, 128))
    assert wide > 2 * narrow > 0


def test_a_pass_is_of_one_image_in_inference_mode_with_the_threads_asked_for():
    module, threads = Recorder(), torch.get_num_threads()
    measure_ms(module, (3, 8, 8), (5,), threads=threads + 1, repeats=3, warmup=2, min_total_s=0)
    assert module.calls == [((threads + 1, False, True), [(1, 3, 8, 8), (1, 5)], True)] * 5
    assert torch.get_num_threads() == threads


def test_a_short_module_is_timed_until_the_least_total_time():
    module = Recorder()
    began = time.perf_counter()
    measure_ms(module, (3, 8, 8), repeats=1, warmup=0, min_total_s=0.05)
    assert time.perf_counter() - began >= 0.05
    assert len(module.calls) > 20


def test_the_module_is_neither_moved_nor_changed():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure_ms(module, (3, 8, 8), repeats=2)
    assert all(one.training for one in module.modules())
    assert module[0].weight.is_contiguous()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_threads_are_restored_after_a_failure():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_ms(nn.Conv2d(3, 8, 3), (4, 8, 8), threads=threads + 1)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"threads": 0}])
def test_nothing_is_measured_with_no_pass_or_no_thread(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        measure_ms(nn.ReLU(), (3, 8, 8), **wrong)


def test_median_and_interquartile_range_are_those_of_the_passes(monkeypatch):
    # passes of 1, 2, 3, 4 and 100 ms: quartiles 2, 3 and 4
    ticks = iter(np.cumsum([0, 1, 0, 2, 0, 3, 0, 4, 0, 100]) / 1000)
    monkeypatch.setattr("evaluation.cost.latency.clock_of", lambda device, threads: ticks.__next__)
    found = measure_ms(nn.ReLU(), (3, 8, 8), repeats=5)
    assert found.median_ms == pytest.approx(3)
    assert found.spread_ms == pytest.approx(2)


def test_only_one_thread_of_a_cpu_is_timed_by_its_own_clock(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    assert clock_of(torch.device("cpu"), 1) is time.thread_time
    assert clock_of(torch.device("cpu"), 2) is time.perf_counter
    assert clock_of(torch.device("cuda"), 1) is time.perf_counter
    monkeypatch.setattr("sys.platform", "win32")
    assert clock_of(torch.device("cpu"), 1) is time.perf_counter


def test_a_table_has_every_part_of_every_network_and_none_besides(cells, table):
    genomes = np.ndindex(*(SPACE.upper + 1))
    needed = {name for genome in genomes for name, _ in parts(stack_of(genome, cells))}
    assert set(table.parts_ms) == needed
    # 3 widths x (2 normal at 16 px; 2 first and 2 later normal and 1 reduction to 8 px; stem; end)
    assert len(needed) == 3 * (2 + 2 + 2 + 1 + 1 + 1)
    assert all(0 < ms < math.inf for ms in table.parts_ms.values())


def test_equal_blocks_under_two_names_are_measured_once(cells):
    twins = {**cells, "n1": cells["n0"]}
    assert parts_of((0,) * 7, twins) == parts_of((0, 0, 0, 0, 1, 1, 0), twins)


def parts_of(genome, cells):
    return [name for name, _ in parts(stack_of(genome, cells))]


def test_the_parts_of_a_network_chain_up_to_the_network(cells):
    """Built at one width, so that each part's inputs are as in the network."""
    same = replace(cells["n0"], nodes=(*cells["n0"].nodes, (Edge(0, "skip_connect"),)))
    blocks = dict.fromkeys(("n0", "n1", "r0"), same)  # three nodes, as wide as the stem
    stack = stack_of((1, 1, 1, 1, 0, 0, 0), blocks)
    built = [part.build() for _, part in parts(stack)]
    params = sum(p.numel() for module in built for p in module.parameters())
    assert params == stack.cost().params
    images = torch.randn(2, *SHAPE)
    states = [built[0](images)] * 2
    for module in built[1:-1]:
        states = [states[1], module(*states)]
    assert built[-1](states[1]).shape == (2, CLASSES)


def test_the_latency_of_a_network_is_the_sum_of_its_entries(cells, table):
    genome = (1, 2, 0, 1, 0, 1, 0)  # 2 cells n0 of width 4, then 4 cells n1 of width 16
    n0, n1, r0 = (cells[name].id for name in ("n0", "n1", "r0"))
    last = 16 * len(cells["n1"].outputs)
    names = [
        "stem 3->12 at 16x16",
        f"normal {n0} C=4 at 16x16",
        f"normal {n0} C=4 at 16x16",
        f"reduction {r0} C=16 at 16x16",
        f"normal {n1} C=16 at 8x8 after a reduction",
        *[f"normal {n1} C=16 at 8x8"] * 3,
        f"classifier {last}->10 at 8x8",
    ]
    powers = {name: 2.0**i for i, name in enumerate(dict.fromkeys(names))}
    exact = replace(table, parts_ms=powers)
    assert exact.of(stack_of(genome, cells)) == sum(powers[name] for name in names)
    assert table.of(stack_of(genome, cells)) == math.fsum(table.parts_ms[name] for name in names)


def test_the_extremes_are_those_of_the_whole_space(cells, table):
    generator = random.Random(0)  # no order in the widths: a wider cell may be a faster one
    disordered = replace(table, parts_ms={n: generator.uniform(1, 9) for n in table.parts_ms})
    for one in (table, disordered):
        every = [one.of(stack_of(g, cells)) for g in np.ndindex(*(SPACE.upper + 1))]
        found = [
            one.of(stack_of(g, cells))
            for g in one.extreme_genomes(Networks(SPACE, cells, SHAPE, CLASSES))
        ]
        assert found == pytest.approx([min(every), max(every)])


def test_a_table_comes_back_from_its_file(table, tmp_path):
    path = tmp_path / "latency.json"
    table.save(RunFolder(tmp_path))
    assert LatencyTable.load(RunFolder(tmp_path)) == table
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    facts = json.loads(path.read_text())["facts"]
    assert (facts["threads"], facts["batch"], facts["torch"]) == (1, 1, torch.__version__)
    assert facts["device"].endswith("CPU")


@pytest.mark.parametrize(
    "change",
    [
        {"parts_ms": {"stem": "fast"}},
        {"parts_ms": {"stem": -1.0}},
        {"parts_ms": {"stem": math.nan}},
        {"parts_ms": {}},
        {"parts_ms": [1.0]},
        {"image_shape": [3, 8]},
        {"image_shape": None},
        {"classes": "many"},
        {"facts": None},
    ],
)
def test_a_damaged_table_is_refused_by_name(table, tmp_path, change):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({**table.to_json(), **change}))
    with pytest.raises(InputError, match=r"latency\.json: damaged: not a latency table"):
        LatencyTable.load(RunFolder(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_table_is_refused_by_name(tmp_path, content):
    path = tmp_path / "latency.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"latency\.json"):
        LatencyTable.load(RunFolder(tmp_path))


def test_a_network_of_other_cells_widths_or_images_is_refused_and_the_part_named(cells, table):
    stranger = Cell(((Edge(1, "skip_connect"),),))
    spec = NetworkSpec((Stage("n0", 1, 4), Stage("n0", 1, 4)), ("r0",))
    with pytest.raises(InputError, match=f"no 'normal {stranger.id} C=4 at 16x16'"):
        table.of(builder(spec, {**cells, "n0": stranger}, SHAPE, CLASSES))
    wide = replace(spec, stages=(Stage("n0", 1, 4), Stage("n0", 1, 8)))
    with pytest.raises(InputError, match=f"no 'reduction {cells['r0'].id} C=8 at 16x16'"):
        table.of(builder(wide, cells, SHAPE, CLASSES))
    with pytest.raises(InputError, match=r"images \(3, 16, 16\) of 10 classes.*\(1, 8, 8\) and 7"):
        table.of(builder(spec, cells, (1, 8, 8), 7))
    residual = Stack((PlacedCell(None, 4, reduction=True),), SHAPE, CLASSES)
    with pytest.raises(InputError, match="no 'reduction residual C=4 at 16x16'"):
        table.of(residual)


def whole_networks_ms(stacks, rounds):
    """The least of several medians each, as in the table."""
    times = [
        [measure_ms(stack(), SHAPE, repeats=7).median_ms for stack in stacks] for _ in range(rounds)
    ]
    return np.min(times, axis=0)


@pytest.mark.slow
def test_the_sum_ranks_networks_as_measuring_them_whole_does(cells, table):
    generator = np.random.default_rng(0)
    genomes = [SPACE.genes.random_of_size(size, generator) for size in np.linspace(0, 1, 15)]
    stacks = [stack_of(genome, cells) for genome in genomes]
    predicted = np.array([table.of(stack) for stack in stacks])
    measured = whole_networks_ms(stacks, rounds=3)
    error = np.abs(predicted / measured - 1).mean()
    rank = spearmanr(predicted, measured).statistic
    print(f"rank correlation {rank:.3f}, mean relative error {error:.3f}")
    assert rank > 0.8
    assert error < 0.5  # parts run with warmer caches than a network does
