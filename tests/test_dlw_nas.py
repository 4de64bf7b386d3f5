"""DLW-NAS: light ops, prices that make cells cheaper, gates that find a sparse topology."""

import copy
import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksearch import nas_bench_201
from blocksearch.engine import Batch, SearchSetup
from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.ops import LIGHT_OPS, op_cost
from blocksearch.relaxation import Gates, derive_strongest, one_hot_gates
from blocksearch.space import KINDS, NORMAL, REDUCTION, Cell, Edge, SearchSpace
from blocksearch.strategies.darts import Darts
from blocksearch.strategies.dlw_nas import DlwNas, ProximalStep, derive_open, relative_costs
from blocksearch.supernet.cells import DiscreteCell, MixedCell
from blocksearch.supernet.forms import PLAIN
from blocksearch.supernet.supernet import Supernet
from evaluation.cost.counts import measure_cost
from evaluation.files.run_folder import RunFolder
from netsearch.space.genome import GenomeSpace
from netsearch.space.network import Network, extreme_genomes, predict_cost

OPS = ("none", "skip_connect", "dws_conv_3x3", "sep_conv_3x3")
CONV = "dws_conv_3x3"


# the light ops


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 32, 48, 64])
def test_every_light_op_costs_less_than_the_separable_convolution_of_darts(channels, stride):
    heavy = op_cost("sep_conv_3x3", channels, stride, (16, 16))
    for op in LIGHT_OPS:
        light = op_cost(op, channels, stride, (16, 16))
        assert light.params < heavy.params, op
        assert light.flops < heavy.flops, op


# the proximal step


def test_the_proximal_step_minimises_a_square_plus_an_l1_term():
    # argmin of (b - c)^2 / 2 + mu |b| over b >= 0 is max(0, c - mu), the soft threshold
    centres = torch.tensor([-1.0, 0.0, 0.1, 0.3, 0.31, 1.0, 2.0])
    betas = torch.ones(7)
    step = ProximalStep(betas, rate=0.2, penalty=0.3)
    for _ in range(200):
        step(betas - centres)
        assert (betas >= 0).all()
    torch.testing.assert_close(betas, (centres - 0.3).clamp_min(0), rtol=1e-5, atol=1e-6)
    assert (betas[:3] == 0).all()


def test_one_proximal_step_shrinks_clips_and_reopens():
    betas = torch.tensor([1.0, 1.0, 0.05, 0.0, 0.0])
    ProximalStep(betas, rate=0.5, penalty=0.2)(torch.tensor([0.0, 1.0, 0.0, -0.1, -1.0]))
    torch.testing.assert_close(betas, torch.tensor([0.9, 0.4, 0.0, 0.0, 0.4]))


# the prices


class RewardingSupernet(nn.Module):
    """Logits [0, sum of reward * gate]: a known pull on every gate, or none for a reward of 0."""

    def __init__(self, real: Supernet, reward: Tensor):
        super().__init__()
        self.space, self.kinds = real.space, real.kinds
        self.op_costs, self.classifier = real.op_costs, real.classifier
        self.bias = nn.Parameter(torch.zeros(2))
        self.reward = reward

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        score = (gates.weight * self.reward).sum()
        return torch.stack([0 * score, score]).expand(len(x), 2) + self.bias


class Rest:
    """A weight step that learns nothing."""

    def schedule(self, progress: float) -> None:
        pass

    def __call__(self, gates: Gates, batch: Batch) -> Tensor:
        return torch.zeros(())


def strategy_on(supernet: object, setup: SearchSetup, **settings: object) -> DlwNas:
    setup = SearchSetup(lambda form: supernet, setup.weights)  # type: ignore[arg-type, return-value]
    config = DlwNas.Config(**{"warmup": 0.0, **settings})
    strategy = DlwNas(setup, config, torch.Generator().manual_seed(0))
    strategy.weight_step = Rest()  # type: ignore[assignment]
    return strategy


def rewarded(make_setup, reward: Tensor | float, **settings: object) -> DlwNas:
    setup = make_setup(OPS)
    real = setup.supernet(PLAIN)
    reward = torch.as_tensor(reward).expand(2, len(real.space.edges), len(OPS))
    supernet = RewardingSupernet(real, reward)
    defaults = {"params_weight": 0.0, "flops_weight": 0.0, "edge_penalty": 0.0}
    defaults |= {"alpha_learning_rate": 0.05, "alpha_weight_decay": 0.0}
    return strategy_on(supernet, setup, **{**defaults, **settings})


def descend(strategy: DlwNas, steps: int) -> dict[str, Tensor]:
    images, labels = torch.zeros(2, 1, 8, 8), torch.ones(2, dtype=torch.long)
    for step in range(steps):
        strategy.schedule(step / steps)
        scalars = strategy.step((images, labels), (images, labels))
    return scalars


def derived_cost(strategy: DlwNas, count: str) -> int:
    cells = strategy.derive()[0].values()
    ops = [edge.op for cell in cells for node in cell.nodes for edge in node]
    return sum(op_cost(op, 8, 1, (8, 8)).count(count) for op in ops)


def edges_of(strategy: DlwNas) -> int:
    return sum(len(node) for cell in strategy.derive()[0].values() for node in cell.nodes)


@pytest.mark.parametrize("count", ["params", "flops"])
def test_a_price_alone_makes_the_derived_cells_cheap_and_none_changes_nothing(make_setup, count):
    costs = []
    for price in (0.0, 0.05, 0.5, 5.0):
        strategy = rewarded(make_setup, 0.0, **{f"{count}_weight": price})
        with torch.no_grad():
            strategy.alphas[..., 3] += 0.5  # towards the dearest op
        before = strategy.alphas.detach().clone()
        descend(strategy, 30)
        costs.append(derived_cost(strategy, count))
        assert torch.equal(strategy.alphas, before) == (price == 0)
        assert (strategy.betas == 1).all()
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[1] and costs[-1] == 0


@pytest.mark.parametrize("count", ["params", "flops"])
def test_against_a_pull_to_dear_ops_the_derived_cost_falls_step_by_step_with_the_price(
    make_setup, count
):
    # Adam ignores the size of a lone price: it takes a force against it to tell prices apart.
    generator = torch.Generator().manual_seed(0)
    pull = torch.rand(2, 5, 1, generator=generator) * torch.tensor([0.0, 0.02, 0.06, 0.12])
    costs = []
    for price in (0.0, 0.1, 0.3, 1.0, 10.0):
        strategy = rewarded(make_setup, pull, **{f"{count}_weight": price})
        descend(strategy, 100)
        costs.append(derived_cost(strategy, count))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 4 and costs[-1] == 0


def test_a_higher_edge_penalty_leaves_fewer_edges_and_always_one(make_setup):
    generator = torch.Generator().manual_seed(0)
    pull = 0.1 * torch.rand(2, 5, 1, generator=generator) * torch.tensor([0.0, 1.0, 1.0, 1.0])
    left = []
    for penalty in (0.0, 0.02, 0.04, 0.5):
        strategy = rewarded(make_setup, pull, edge_penalty=penalty, edge_learning_rate=0.2)
        descend(strategy, 300)
        assert (strategy.betas >= 0).all()
        left.append(edges_of(strategy))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) >= 3 and left[0] == 8 and left[-1] == 2  # one edge per cell


@pytest.mark.parametrize("count", ["params", "flops"])
def test_each_price_pulls_along_its_own_cost(make_setup, count):
    strategy = rewarded(make_setup, 0.0, **{f"{count}_weight": 0.5})
    costs = relative_costs(strategy.supernet.op_costs(count).float())
    leaf = strategy.alphas.detach().clone().requires_grad_()
    (0.5 * (torch.softmax(leaf, dim=-1) * costs).sum()).backward()
    descend(strategy, 1)
    torch.testing.assert_close(strategy.alphas.grad, leaf.grad)


def test_both_prices_are_1_at_uniform_alphas_and_0_without_costs(make_setup):
    strategy = rewarded(make_setup, 0.0)
    with torch.no_grad():
        strategy.alphas.zero_()
    scalars = descend(strategy, 1)
    assert float(scalars["params"]) == pytest.approx(1.0, abs=1e-5)
    assert float(scalars["flops"]) == pytest.approx(1.0, abs=1e-5)
    assert (relative_costs(torch.zeros(1, 2, 3)) == 0).all()


def test_alphas_and_betas_rest_through_the_warm_up(make_setup, period_batch):
    strategy = DlwNas(make_setup(OPS), DlwNas.Config(), torch.Generator().manual_seed(0))
    before = strategy.alphas.detach().clone()
    for progress in (0.0, 0.299):
        assert strategy.schedule(progress) == "weights"
        assert set(strategy.step(period_batch(8, 0), period_batch(8, 1))) == {"train_loss"}
    assert torch.equal(strategy.alphas, before) and (strategy.betas == 1).all()
    assert strategy.schedule(0.3) == "both"
    strategy.step(period_batch(8, 0), period_batch(8, 1))
    assert (strategy.alphas != before).all() and (strategy.betas != 1).all()


# the planted teacher

PLANTED = SearchSpace(("none", CONV), nodes=4, kinds=(NORMAL,))


def sparse_cell(seed: int) -> Cell:
    """A random cell of 5 of the 14 edges."""
    generator = random.Random(seed)
    while True:
        chosen = set(generator.sample(PLANTED.edges, 5))
        cell = Cell(
            tuple(
                tuple(
                    Edge(s, CONV) for s, to in PLANTED.edges if to == target and (s, to) in chosen
                )
                for target in range(2, 6)
            )
        )
        try:
            PLANTED.check(cell)
        except ValueError:
            continue
        return cell


def taught(make_setup, strategy_class: type, seed: int, **settings: object) -> tuple[object, Cell]:
    """Search for the gates alone, on the weights of a teacher cell that labels images of noise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        supernet = Supernet(PLANTED, (3, 8, 8), 8, channels=4, cells=1, stages=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        supernet.classifier.weight.normal_(std=8.0, generator=generator)
        supernet.classifier.bias.zero_()
    teacher = sparse_cell(seed)
    gates = one_hot_gates({NORMAL: teacher}, PLANTED)
    setup = SearchSetup(lambda form: supernet, make_setup(OPS).weights)
    strategy = strategy_class(setup, strategy_class.Config(**settings), generator)
    strategy.weight_step = Rest()
    for step in range(250):
        images = torch.randn(32, 3, 8, 8, generator=generator)
        with torch.no_grad():
            labels = supernet(images, gates).argmax(dim=1)
        strategy.schedule(step / 250)
        strategy.step((images, labels), (images, labels))
    return strategy, teacher


def links(cell: Cell) -> set[tuple[int, int]]:
    return {(edge.source, 2 + n) for n, node in enumerate(cell.nodes) for edge in node}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_gates_recover_a_sparse_teacher_where_the_two_strongest_edges_cannot(make_setup, seed):
    # Measured, torch 2.15.0 on the CPU, seeds 0 to 9: of 5 edges 5 are recovered in nine runs and 4
    # in one; of the other 9 edges 6, 9, 8, 9, 7, 8, 9, 9, 8, 7 end at exactly 0, the rest at 0.04
    # or less, and the derived cell holds no wrong edge. The penalty has to beat the noise of the
    # gradient: with 0.1, 4 of 9 edges are at 0 in seed 0; with 0.2, seed 3 recovers 3 of 5.
    free = {"params_weight": 0.0, "flops_weight": 0.0, "warmup": 0.0}
    searched, teacher = taught(
        make_setup, DlwNas, seed, edge_penalty=0.15, edge_learning_rate=0.05, **free
    )
    truth = torch.tensor([edge in links(teacher) for edge in PLANTED.edges])
    assert int(truth.sum()) == 5
    betas = searched.betas.detach()[0]
    assert int((betas[truth] > 0).sum()) >= 4
    assert int((betas[~truth] == 0).sum()) >= 6
    kept = links(searched.derive()[0][NORMAL])
    assert len(kept) <= 5 and len(kept & links(teacher)) >= 4


@pytest.mark.slow
def test_softmax_gates_keep_eight_edges_whatever_the_teacher(make_setup):
    searched, teacher = taught(make_setup, Darts, 0, alpha_learning_rate=0.02)
    kept = links(searched.derive()[0][NORMAL])
    assert len(kept) == 8 and kept > links(teacher)


# the derivation


def one_hot(space: SearchSpace, ops: dict[tuple[int, int], str], other: str) -> Tensor:
    names = [ops.get(edge, other) for edge in space.edges]
    rows = [space.ops.index(name) for name in names]
    return nn.functional.one_hot(torch.tensor(rows), len(space.ops)).double()


def test_closed_edges_and_none_are_left_out_and_the_two_strongest_stay():
    space = SearchSpace(OPS, nodes=3)
    p = one_hot(space, {(0, 2): "sep_conv_3x3", (1, 2): "none"}, "skip_connect")
    betas = torch.ones(9)
    betas[2:5] = torch.tensor([0.0, 0.5, 0.0])  # (0, 3), (1, 3), (2, 3)
    betas[5:] = torch.tensor([0.2, 0.9, 0.1, 0.3])  # (0, 4), (1, 4), (2, 4), (3, 4)
    assert derive_open(p, betas, space).nodes == (
        (Edge(0, "sep_conv_3x3"),),
        (Edge(1, "skip_connect"),),
        (Edge(1, "skip_connect"), Edge(3, "skip_connect")),
    )


def test_the_strength_of_an_edge_is_its_gate_times_its_probability():
    space = SearchSpace(OPS, nodes=1, edges_per_node=1)
    p = torch.tensor([[0.1, 0.1, 0.1, 0.7], [0.1, 0.4, 0.3, 0.2]])
    assert derive_open(p, torch.tensor([1.0, 1.0]), space).nodes[0] == (Edge(0, "sep_conv_3x3"),)
    assert derive_open(p, torch.tensor([1.0, 2.0]), space).nodes[0] == (Edge(1, "skip_connect"),)


def test_edges_that_read_an_empty_node_fall_with_it_through_the_whole_chain():
    space = SearchSpace(OPS, nodes=4)
    betas = torch.zeros(14)
    for edge in [(2, 3), (3, 4), (0, 5), (4, 5)]:  # node 2 is empty, so 3 and 4 are too
        betas[space.edges.index(edge)] = 1.0
    cell = derive_open(one_hot(space, {}, CONV), betas, space)
    assert cell.nodes == ((), (), (), (Edge(0, CONV),))
    assert cell.outputs == (3,)
    space.check(cell)


def test_a_cell_that_would_be_empty_keeps_the_strongest_edge_from_an_input():
    space = SearchSpace(OPS, nodes=2)
    p = torch.full((5, 4), 0.1)
    p[:, 0] = 0.7  # none wins everywhere
    p[3, 2] = 0.15  # (1, 3)
    p[4, 3] = 0.2  # (2, 3), but not from an input
    for betas in (torch.ones(5), torch.zeros(5)):
        assert derive_open(p, betas, space).nodes == ((), (Edge(1, CONV),))
    betas = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    assert derive_open(p, betas, space).nodes == ((Edge(0, "skip_connect"),), ())


def test_in_the_dense_space_closed_edges_and_none_are_absent():
    space = nas_bench_201.SPACE
    p = one_hot(space, {(0, 2): "none"}, "nor_conv_3x3")
    betas = torch.ones(6)
    betas[space.edges.index((1, 3))] = 0.0
    cell = derive_open(p, betas, space)  # node 2 reads node 1, node 3 reads 0 and 2
    assert nas_bench_201.digits(cell) == "303303"
    table = nas_bench_201.cell_of("303303")
    assert table == cell


def test_in_the_dense_space_a_node_that_nothing_reads_goes_and_the_output_is_reached():
    space = nas_bench_201.SPACE
    p = one_hot(space, {}, "nor_conv_3x3")
    betas = torch.ones(6)
    betas[space.edges.index((1, 2))] = betas[space.edges.index((1, 3))] = 0.0
    assert nas_bench_201.digits(derive_open(p, betas, space)) == "030303"
    betas[3:] = 0.0
    assert nas_bench_201.digits(derive_open(p, betas, space)) == "000300"


# what a closed edge changes: nothing


def closed_gates(space: SearchSpace, kinds: int, seed: int) -> tuple[Gates, Gates]:
    """Gates of random alphas with half of the edges closed, and the same without those edges."""
    generator = torch.Generator().manual_seed(seed)
    shape = kinds, len(space.edges), len(space.ops)
    p = torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    betas = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    betas[betas < 0.5] = 0.0
    betas[:, :2] = 0.0  # node 0 is empty,
    weight = betas[..., None] * p
    removed = betas == 0
    for e, (source, _) in enumerate(space.edges):
        removed[:, e] |= source == space.inputs  # and edges that read it carry zero
    return Gates(weight), Gates(weight, (~removed)[..., None].expand(shape))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_removing_closed_edges_changes_no_logit(dtype, limit):
    space = SearchSpace(LIGHT_OPS, nodes=4)
    torch.manual_seed(0)
    supernet = Supernet(space, (3, 8, 8), 5, channels=8, cells=3, stages=3).to(dtype)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    for seed in range(3):
        whole, pruned = (
            Gates(gates.weight.to(dtype), gates.active) for gates in closed_gates(space, 2, seed)
        )
        assert (whole.weight != 0).any()
        with torch.no_grad():
            difference = (supernet(images, whole) - supernet(images, pruned)).abs().max()
        assert float(difference) < limit


@pytest.mark.parametrize("reduction", [False, True])
def test_a_derived_cell_computes_the_mixed_cell_without_its_empty_nodes(reduction):
    space = SearchSpace(LIGHT_OPS, nodes=4)
    torch.manual_seed(0)
    form = {"reduction": reduction, "halve_first": False}
    mixed = MixedCell(space, (24, 24), 8, **form).double()
    cell = derived(space, 1)
    twin = DiscreteCell(cell, (24, 24), 8, searching=True, **form).double()
    twin.inputs.load_state_dict(mixed.inputs.state_dict())
    places = [(e.source, 2 + n, e.op) for n, node in enumerate(cell.nodes) for e in node]
    for op, (source, target, name) in zip(twin.edges, places, strict=True):
        whole = mixed.edges[space.edges.index((source, target))][LIGHT_OPS.index(name)]
        op.load_state_dict(whole.state_dict())
    states = torch.randn(2, 4, 24, 8, 8, dtype=torch.float64)
    gates = one_hot_gates({NORMAL: cell}, space)
    with torch.no_grad():
        nodes = mixed(*states, Gates(gates.weight.double(), gates.active), 0).split(8, dim=1)
        out = twin(*states)
    assert twin.out_channels == out.shape[1] == 8 * len(cell.outputs) < 32
    expected = torch.cat([nodes[n] for n in cell.outputs], dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert all(not nodes[n].any() for n in range(4) if n not in cell.outputs)


# cells with empty nodes, everywhere downstream


def derived(space: SearchSpace, seed: int) -> Cell:
    """A cell of random alphas and betas, with at least one empty node."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(14, len(space.ops), generator=generator), dim=-1)
    betas = torch.rand(14, generator=generator)
    betas[betas < 0.5] = 0.0
    betas[[e for e, (_, to) in enumerate(space.edges) if to == 2 + seed % 4]] = 0.0
    return derive_open(p, betas, space)


def unpruned(space: SearchSpace, seed: int) -> Cell:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(14, len(space.ops), generator=generator), dim=-1)
    return derive_strongest(p, space)


def test_a_stack_of_pruned_cells_runs_on_fewer_channels_and_parameters():
    space = SearchSpace(LIGHT_OPS, nodes=4)
    supernet = Supernet(space, (3, 8, 8), 5, channels=8, cells=5, stages=3)
    for seed in range(2):
        sparse = supernet.found({kind: derived(space, seed) for kind in KINDS})
        whole = supernet.found({kind: unpruned(space, seed) for kind in KINDS})
        network = sparse()
        logits = network(torch.randn(4, 3, 8, 8))
        assert logits.shape == (4, 5) and bool(torch.isfinite(logits).all())
        assert network.classifier.in_features < whole().classifier.in_features
        assert sparse.cost() == measure_cost(network, (3, 8, 8))
        assert sparse.cost().params < whole.cost().params
        assert sparse.cost().flops < whole.cost().flops


@pytest.mark.slow
def test_cells_with_empty_nodes_pass_through_the_library_and_into_networks(tmp_path):
    space = SearchSpace(LIGHT_OPS, nodes=4)
    found = [
        FoundCell(derived(space, seed), kind, f"search-{seed}", 0.5)
        for seed in range(3)
        for kind in KINDS
    ]
    assert all(() in one.cell.nodes for one in found)
    library = BlockLibrary.from_found(found, (8, 8))
    library.save(RunFolder(tmp_path))
    assert BlockLibrary.load(RunFolder(tmp_path)).blocks == library.blocks
    for block in library.blocks:
        space.check(block.cell)
    names = library.names(NORMAL), library.names(REDUCTION)
    genomes, shape = GenomeSpace(2, (1, 2), (8, 16), *names), (3, 8, 8)
    generator = np.random.default_rng(0)
    costs = []
    for _ in range(12):
        spec = genomes.decode(genomes.random(generator))
        costs.append(predict_cost(spec, library.cells, shape, 5))
        network = Network(spec, library.cells, shape, 5)
        assert costs[-1] == measure_cost(network, shape)
        logits = network(torch.randn(2, 3, 8, 8))
        assert bool(torch.isfinite(logits).all())

    few = GenomeSpace(2, (1, 2), (8, 16), names[0][:2], names[1][:2])

    @functools.cache
    def cost_of(genome):
        return predict_cost(few.decode(genome), library.cells, shape, 5)

    every = [cost_of(one) for one in itertools.product(*(range(top + 1) for top in few.upper))]
    for count in ("params", "flops"):
        least, largest = extreme_genomes(few, lambda one, count=count: cost_of(one).count(count))
        assert cost_of(least).count(count) == min(cost.count(count) for cost in every)
        assert cost_of(largest).count(count) == max(cost.count(count) for cost in every)


# the search as a whole


@pytest.mark.parametrize("space", [SearchSpace(LIGHT_OPS, nodes=2), nas_bench_201.SPACE])
def test_it_searches_the_light_space_and_the_dense_one(make_setup, period_batch, space):
    strategy = DlwNas(
        make_setup(space),
        DlwNas.Config(edge_penalty=0.5, edge_learning_rate=0.5),
        torch.Generator().manual_seed(0),
    )
    for step in range(8):
        strategy.schedule(step / 8)
        scalars = strategy.step(period_batch(8, 2 * step), period_batch(8, 2 * step + 1))
        assert (strategy.betas >= 0).all()
    assert float(scalars["open_edges"]) == float((strategy.betas > 0).float().mean())
    (cells,) = strategy.derive()
    for cell in cells.values():
        space.check(cell)
        assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell
    stack = strategy.supernet.found(cells)
    assert stack.cost() == measure_cost(stack(), (1, 8, 8))


def test_a_checkpoint_carries_betas_and_the_momentum_of_the_alphas(make_setup, period_batch):
    def build() -> DlwNas:
        config = DlwNas.Config(warmup=0.0, edge_penalty=0.2, edge_learning_rate=0.5)
        return DlwNas(make_setup(OPS), config, torch.Generator().manual_seed(0))

    whole, resumed = build(), build()
    for step in range(3):
        whole.schedule(0.1 * step)
        whole.step(period_batch(8, 2 * step), period_batch(8, 2 * step + 1))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for strategy in (whole, resumed):
        strategy.schedule(0.6)
        strategy.step(period_batch(8, 6), period_batch(8, 7))
    assert (whole.betas != 1).all()
    for one, other in zip(whole.architecture(), resumed.architecture(), strict=True):
        assert torch.equal(one, other)
    assert whole.derive() == resumed.derive()


@pytest.mark.parametrize(
    ("name", "value"),
    [("edge_penalty", -0.1), ("edge_learning_rate", 0.0), ("params_weight", -1), ("warmup", 1.0)],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DlwNas.Config(**{name: value})
