"""Networks of a genome: they run, and their predicted cost is exact to the integer."""

import copy
import itertools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blocksearch.kernels import compiled, found
from blocksearch.kernels.steps import Kind, plan_of
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS, ChannelShuffle, Op
from blocksearch.space import KINDS, NORMAL, REDUCTION, Cell, Edge, SearchSpace
from evaluation.cost.counts import measure_cost
from evaluation.pareto.front import Budgets
from netsearch.space.genome import GenomeSpace, NetworkSpec, Stage, stages_for
from netsearch.space.network import Network, builder, least_cells, predict_cost
from netsearch.space.networks import Networks
from netsearch.space.problem import NetworkProblem

NORMAL_NAMES, REDUCTION_NAMES = ("n0", "n1"), ("r0", "r1")


def library(ops, seed, nodes=2):
    generator = random.Random(seed)
    space = SearchSpace(ops, nodes=nodes)
    return {name: space.random_cell(generator) for name in NORMAL_NAMES + REDUCTION_NAMES}


def space_of(stages, depths=(1, 2), widths=(4, 8)):
    return GenomeSpace(stages, depths, widths, NORMAL_NAMES, REDUCTION_NAMES)


def genomes_of(space):
    return itertools.product(*(range(top + 1) for top in space.upper))


@pytest.mark.parametrize(
    "depths", [(2,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=["one depth", "two"]
)
def test_every_genome_in_bounds_builds_a_network_that_runs(depths):
    space, cells = space_of(2, depths), library(tuple(OPS), 0)
    images = torch.randn(2, 3, 8, 8)
    for genome in genomes_of(space):
        logits = builder(space.decode(genome), cells, (3, 8, 8), 5)()(images)
        assert logits.shape == (2, 5)
        assert bool(torch.isfinite(logits).all())


def test_a_network_has_the_depths_widths_and_resolutions_of_its_spec():
    cells = library(LIGHT_OPS, 0)
    spec = NetworkSpec((Stage("n0", 2, 4), Stage("n1", 1, 12), Stage("n0", 3, 8)), ("r0", "r1"))
    network = builder(spec, cells, (1, 28, 28), 10)()
    seen = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    network.eval()(torch.randn(1, 1, 28, 28))
    found = [(module.cell, *output.shape[1:3]) for module, output in seen]
    assert found == [  # channels are two nodes wide, 28 px halve to 14 and 7
        (cells["n0"], 8, 28),
        (cells["n0"], 8, 28),
        (cells["r0"], 24, 14),
        (cells["n1"], 24, 14),
        (cells["r1"], 16, 7),
        (cells["n0"], 16, 7),
        (cells["n0"], 16, 7),
        (cells["n0"], 16, 7),
    ]


@pytest.mark.parametrize(
    ("side", "count", "ops", "nodes"),
    [
        (8, 4, DARTS_OPS, 2),
        (8, 3, LIGHT_OPS, 3),
        (28, 2, LIGHT_OPS, 2),
        (33, 2, tuple(OPS), 2),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                (8, 60, DARTS_OPS, 2),
                (8, 60, LIGHT_OPS, 2),
                (8, 30, LIGHT_OPS, 3),
                (28, 15, DARTS_OPS, 1),
                (28, 15, LIGHT_OPS, 2),
                (33, 20, tuple(OPS), 2),
            )
        ),
    ],
)
def test_predicted_cost_equals_the_built_network_to_the_integer(side, count, ops, nodes):
    space = space_of(stages_for((side, side)), depths=(1, 2) if side == 8 else (1,))
    generator, cells = np.random.default_rng(side), library(ops, seed=side + nodes, nodes=nodes)
    shape = (1, side, side)
    for _ in range(count):
        spec = space.decode(space.random(generator))
        predicted = predict_cost(spec, cells, shape, 10)
        network = builder(spec, cells, shape, 10)().eval()
        assert predicted.params == sum(p.numel() for p in network.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape))
        assert 2 * predicted.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    "genome",
    [(0, 1) * 5 + (0,), *(pytest.param((g,) * 11, marks=pytest.mark.slow) for g in (0, 1))],
)
def test_predicted_cost_is_exact_for_images_that_are_not_square(genome):
    space, cells = space_of(3), library(LIGHT_OPS, 5)
    spec = space.decode(genome)
    network = builder(spec, cells, (3, 17, 30), 4)()
    assert predict_cost(spec, cells, (3, 17, 30), 4) == measure_cost(network, (3, 17, 30))


@pytest.mark.parametrize(
    ("ops", "seed"),
    [
        (DARTS_OPS, 0),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((DARTS_OPS, 1), (LIGHT_OPS, 2))),
    ],
)
def test_extreme_costs_equal_brute_force_over_the_whole_space(ops, seed):
    space, cells = space_of(2, depths=(1, 3), widths=(4, 20)), library(ops, seed)
    costs = [predict_cost(space.decode(g), cells, (3, 9, 9), 10) for g in genomes_of(space)]
    problem = NetworkProblem(Networks(space, cells, (3, 9, 9), 10), Budgets())
    assert len(costs) == space.size == 128
    for name in ("params", "flops", "bits"):
        counts = [cost.count(name) for cost in costs]
        assert problem.extremes(name) == (min(counts), max(counts))


@pytest.mark.parametrize(
    ("ops", "count"),
    [
        (("skip_connect", "dws_conv_3x3"), "params"),
        (("ghost_3x3", "gshuffle_3x3"), "flops"),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                (LIGHT_OPS, "params"),
                (LIGHT_OPS, "flops"),
                (("skip_connect", "dws_conv_3x3"), "flops"),
                (("ghost_3x3", "gshuffle_3x3"), "params"),
            )
        ),
    ],
)
def test_no_cell_of_a_space_is_cheaper_than_its_least_cells(ops, count):
    space = SearchSpace(ops, nodes=2, edges_per_node=1)
    least, generator = least_cells(space, count), random.Random(0)
    spec = NetworkSpec((Stage("normal", 1, 8), Stage("normal", 2, 8)), ("reduction",))
    bound = predict_cost(spec, least, (3, 8, 8), 10).count(count)
    for _ in range(12):
        cells = {name: space.random_cell(generator) for name in ("normal", REDUCTION)}
        assert bound < predict_cost(spec, cells, (3, 8, 8), 10).count(count)
        pruned = {name: Cell((cell.nodes[0], ()), cell.inputs) for name, cell in cells.items()}
        assert bound <= predict_cost(spec, pruned, (3, 8, 8), 10).count(count)
    for cell in least.values():
        space.check(cell)


def test_a_builder_carries_only_the_cells_that_its_network_uses():
    cells = library(LIGHT_OPS, 0)
    spec = NetworkSpec((Stage("n1", 1, 4), Stage("n1", 1, 4)), ("r0",))
    stack = builder(spec, cells, (3, 8, 8), 2)
    placed = [(one.cell, one.channels, one.reduction) for one in stack.cells]
    assert placed == [(cells["n1"], 4, False), (cells["r0"], 4, True), (cells["n1"], 4, False)]


def test_the_training_signal_reaches_every_parameter():
    space, cells = space_of(2), library(LIGHT_OPS, 3)
    network = builder(space.decode((1,) * 7), cells, (3, 8, 8), 5)()
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A cell need not read both of its inputs, and then the layer at the other one learns nothing.
    assert [name for name in silent if ".inputs." not in name] == []


@pytest.mark.parametrize(
    ("ops", "width"),
    [
        pytest.param(
            *(ops, width),
            id=f"{name}-{width}",
            marks=[pytest.mark.slow] * ((name, width) not in (("darts", 16), ("light", 12))),
        )
        for name, ops in (("darts", DARTS_OPS), ("light", LIGHT_OPS))
        for width in (4, 8, 12, 16)
    ],
)
def test_training_on_the_kernels_equals_training_in_pytorch(ops, width):
    generator = random.Random(width)
    space = SearchSpace(ops, nodes=4)
    for number in range(4):  # so that every op comes up
        cells = {kind: space.random_cell(generator) for kind in KINDS}
        spec = NetworkSpec((Stage(NORMAL, 2, width), Stage(NORMAL, 1, width + 4)), (REDUCTION,))
        torch.manual_seed(number)
        network = Network(spec, cells, (3, 9, 10), 7).double()
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        twin = copy.deepcopy(network)
        x, labels = torch.randn(5, 3, 9, 10, dtype=torch.float64), torch.arange(5)
        gradients = []
        for model, path in ((network, nullcontext()), (twin, compiled.plain_path())):
            with path:
                loss = nn.functional.cross_entropy(model(x), labels)
                gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)
        for one, other in zip(network.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(network.eval()(x), twin.eval()(x), rtol=1e-9, atol=1e-11)


def test_a_network_under_training_does_run_on_the_kernels(monkeypatch, needs_kernels):
    ran, run = [], found.found_cell
    monkeypatch.setattr(found, "found_cell", lambda *given: ran.append(given[0]) or run(*given))
    cell = Cell(((Edge(0, "dil_conv_5x5"), Edge(1, "gshuffle_3x3")),))
    spec = NetworkSpec((Stage(NORMAL, 1, 8),), ())
    network = Network(spec, {NORMAL: cell}, (3, 8, 8), 2)
    network(torch.randn(2, 3, 8, 8))
    (plan,) = ran
    assert [step.kind for step in plan.steps] == [Kind.UNIT] * 5  # inputs, one unit, two units
    network.eval()(torch.randn(2, 3, 8, 8))
    assert len(ran) == 1  # where running statistics are used instead


def point(**form):
    return conv(1, **{"padding": 0, **form})


def conv(kernel=1, groups=1, bias=False, **form):
    return nn.Conv2d(8, 8, kernel, groups=groups, bias=bias, **form)


def depthwise(kernel=3, **form):
    return conv(kernel, 8, **{"padding": 1, **form})


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ([point()], 1),
        ([depthwise(), point()], 1),
        ([depthwise(stride=2), point()], 1),
        ([point(), nn.BatchNorm2d(8), nn.ReLU(), point(groups=2)], 2),
        ([point(), nn.BatchNorm2d(8), point()], None),  # no ReLU between
        ([point(), nn.ReLU(), point()], None),
        ([point(), ChannelShuffle(2)], None),  # the shuffle before the BatchNorm
        ([point(bias=True)], None),
        ([point(padding=1)], None),
        ([depthwise(), point(padding=1)], None),
        ([conv(3, padding=1)], None),
        ([conv(3, groups=4, padding=1), point()], None),
        ([depthwise(9, padding=4), point()], None),
        ([depthwise(4), point()], None),
        ([depthwise(padding=0), point()], None),
        ([depthwise(padding_mode="reflect"), point()], None),
        ([depthwise((1, 7), padding=(0, 3)), point()], None),
        ([depthwise((7, 1), padding=(3, 0)), point()], None),
    ],
)
def test_an_op_is_taken_apart_only_where_its_units_compute_the_same(layers, count):
    torch.manual_seed(0)
    op = Op(nn.Sequential(*layers), nn.BatchNorm2d(8), relu=True)
    plan = plan_of(op, 8, 8)
    assert (len(plan.steps) if plan.is_known else None) == count
    x = torch.randn(3, 8, 9, 8)
    with compiled.plain_path():
        expected = copy.deepcopy(op)(x)
    y = found.found_cell(plan, [x]) if found.fits(plan, x) else op(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
