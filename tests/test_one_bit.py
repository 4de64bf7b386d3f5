"""1-bit convolutions against +-1 references; the ops, cells and networks made of them."""

import copy
import random

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from blocksearch.kernels import compiled
from blocksearch.nas_bench_201 import SPACE
from blocksearch.one_bit import InputSign, OneBitConv2d, WeightSign, signs
from blocksearch.ops import DARTS_OPS, OPS, build_op, op_cost
from blocksearch.relaxation import Gates, one_hot_gates
from blocksearch.space import KINDS, Cell, Edge, SearchSpace
from blocksearch.supernet.cells import DiscreteCell
from blocksearch.supernet.forms import Form
from blocksearch.supernet.stack import PlacedCell, Stack
from blocksearch.supernet.supernet import Supernet
from evaluation.cost.counts import measure_cost
from evaluation.records import Cost

SPACE_OF_ALL = SearchSpace(tuple(OPS), nodes=2)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def one_bit_supernet(space=SPACE_OF_ALL):
    return Supernet(space, (3, 9, 8), 4, channels=8, cells=3, stages=2, form=Form(one_bit=True))


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_1_bit_convolution_is_a_convolution_of_signs_times_the_scale(groups, stride):
    conv = OneBitConv2d(8, 16, 3, stride, dilation=2, groups=groups)
    x = torch.randn(2, 8, 9, 9)
    x[0, 0] = 0.0  # counts as +1
    weight = torch.where(conv.weight >= 0, 1.0, -1.0)
    ones = torch.where(x >= 0, 1.0, -1.0)
    sums = nn.functional.conv2d(ones, weight, None, stride, 2, 2, groups)
    assert torch.equal(sums, sums.round())
    expected = conv.scale[:, None, None] * sums
    torch.testing.assert_close(conv(x), expected)
    conv.scale.data.neg_()  # a scale is positive
    torch.testing.assert_close(conv(x), expected)


def test_real_inputs_are_left_as_they_are_where_a_layer_says_so():
    conv = OneBitConv2d(4, 4, 1, one_bit_input=False)
    x = torch.randn(2, 4, 3, 3)
    weight = conv.scale[:, None, None, None] * signs(conv.weight)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, weight))


def test_the_scale_starts_where_the_reconstruction_error_is_smallest():
    conv = OneBitConv2d(6, 5, 3).double()
    (slope,) = torch.autograd.grad(conv.reconstruction_error(), [conv.scale])
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)
    least = conv.reconstruction_error()
    by_hand = (conv.weight - conv.scale[:, None, None, None] * conv.weight.sign()).norm() ** 2
    torch.testing.assert_close(least, by_hand)
    for channel in range(5):
        for shift in (0.01, -0.01):
            moved = copy.deepcopy(conv)
            moved.scale.data[channel] += shift
            assert moved.reconstruction_error() > least
    norm = (conv.scale[:, None, None, None] * conv.weight.sign()).norm() ** 2
    torch.testing.assert_close(conv.squared_norm(), norm)


def test_gradients_pass_signs_by_their_surrogates():
    x = torch.tensor([-1.5, -1.0, -0.75, -0.25, 0.0, 0.5, 0.999, 1.0, 2.0], requires_grad=True)
    upstream = torch.arange(1.0, 10.0)
    (by_input,) = torch.autograd.grad(InputSign.apply(x), [x], upstream)
    expected = upstream * torch.tensor([0.0, 0.0, 0.5, 1.5, 2.0, 1.0, 0.002, 0.0, 0.0])
    torch.testing.assert_close(by_input, expected, rtol=1e-4, atol=1e-6)
    (by_weight,) = torch.autograd.grad(WeightSign.apply(x), [x], upstream)
    assert by_weight.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_1_bit_form_of_its_shape(name, searching, stride):
    op = build_op(name, 8, stride, searching, one_bit=True)
    x = torch.randn(2, 8, 9, 6)
    assert op(x).shape == build_op(name, 8, stride, searching)(x).shape
    convs = [layer for layer in op.modules() if isinstance(layer, nn.Conv2d)]
    assert all(isinstance(conv, OneBitConv2d) for conv in convs)
    assert bool(convs) == (
        "conv" in name or "gh" in name or "gs" in name or (name == "skip_connect" and stride == 2)
    )
    for norm in (layer for layer in op.modules() if isinstance(layer, nn.BatchNorm2d)):
        assert (norm.affine, norm.track_running_stats) == (not searching, not searching)


def test_an_op_of_odd_channels_is_refused_by_name():
    with pytest.raises(ValueError, match="ghost_3x3"):
        build_op("ghost_3x3", 7, 1, True, one_bit=True)


def test_cost_of_a_1_bit_op_in_closed_form():
    # sep_conv_3x3: 2 x (depthwise 9 * 8 weights, real inputs; pointwise 64 weights, 1-bit inputs);
    # per block scales 2 * 8, PReLUs 2 * 8, three BatchNorms of 2 * 8 each
    pixels, binary = 6 * 5, 2 * (72 + 64)
    expected = Cost(binary + 2 * (16 + 16 + 48), 2 * 72 * pixels, None, 2 * 64 * pixels, binary)
    assert op_cost("sep_conv_3x3", 8, 1, (6, 5), one_bit=True) == expected
    assert expected.model_bits == binary + 32 * (expected.params - binary)
    conv3 = op_cost("nor_conv_3x3", 8, 1, (6, 5), one_bit=True)
    assert (conv3.flops, conv3.bit_ops, conv3.bit_params) == (0, 576 * pixels, 576)
    assert op_cost("sep_conv_3x3", 8, 1, (6, 5)).bit_ops == 0


def test_a_supernet_of_1_bit_ops_is_the_same_fused_and_plain(needs_kernels):
    supernet, x = one_bit_supernet().double(), torch.randn(4, 3, 9, 8).double()
    alphas = torch.randn(2, 5, len(OPS)).double().requires_grad_()
    weights = [alphas, *supernet.parameters()]

    def passed():
        logits = supernet(x, Gates(torch.softmax(alphas, dim=-1)))
        return logits, torch.autograd.grad(logits.square().sum(), weights)

    fused = passed()
    with compiled.plain_path():
        plain = passed()
    torch.testing.assert_close(fused, plain)
    assert all(grad.abs().sum() > 0 for grad in fused[1][1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_found_1_bit_cell_computes_what_the_supernet_computes(kind):
    space = SearchSpace(DARTS_OPS, nodes=2)
    supernet = Supernet(
        space, (3, 8, 8), 4, channels=8, cells=2, stages=2, form=Form(one_bit=True)
    ).double()
    nodes = (
        (Edge(0, "sep_conv_3x3"), Edge(1, "skip_connect")),
        (Edge(1, "dil_conv_5x5"), Edge(2, "max_pool_3x3")),
    )
    cells = dict.fromkeys(KINDS, Cell(nodes, one_bit=True))
    mixed = supernet.cells[KINDS.index(kind)]
    place = supernet.places[KINDS.index(kind)]
    found = DiscreteCell(
        cells[kind],
        place.in_channels,
        place.channels,
        reduction=place.reduction,
        halve_first=place.halve_first,
        searching=True,
    ).double()
    found.inputs.load_state_dict(mixed.inputs.state_dict())
    chosen = [
        (space.edges.index((e.source, 2 + n)), e.op) for n, es in enumerate(nodes) for e in es
    ]
    for mine, (edge, op) in zip(found.edges, chosen, strict=True):
        mine.load_state_dict(mixed.edges[edge][space.ops.index(op)].state_dict())
    s0, s1 = (
        torch.randn(2, c, *side).double()
        for c, side in zip(place.in_channels, place.sides, strict=True)
    )
    gates = one_hot_gates(cells, space)
    got = mixed(s0, s1, Gates(gates.weight.double(), gates.active), KINDS.index(kind))
    torch.testing.assert_close(got, found(s0, s1))


def test_op_costs_of_a_1_bit_supernet_are_those_of_1_bit_ops():
    supernet = one_bit_supernet()
    costs, place = supernet.op_costs(), supernet.places[0]
    o = supernet.space.ops.index("sep_conv_3x3")
    cells = [p for p, kind in zip(supernet.places, supernet.kind_of_cell, strict=True) if kind == 0]
    expected = sum(
        op_cost("sep_conv_3x3", p.channels, 1, p.sides[1], one_bit=True).params for p in cells
    )
    assert costs[0, 0, o] == expected != op_cost("sep_conv_3x3", place.channels, 1, (9, 8)).params


def random_stack(space, seed):
    draw = random.Random(seed)
    cells = [space.random_cell(draw) for _ in range(3)]
    one_bit = [Cell(c.nodes, c.inputs, c.output, one_bit=True) for c in cells]
    placed = [
        PlacedCell(one_bit[0], 8, False),
        PlacedCell(one_bit[1] if "reduction" in space.kinds else None, 16, True),
        PlacedCell(one_bit[2], 16, False),
    ]
    return Stack(tuple(placed), (3, 9, 8), 4)


@pytest.mark.parametrize("space", [SPACE_OF_ALL, SPACE], ids=["cells", "nas_bench_201"])
@pytest.mark.parametrize(
    "seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1))]
)
def test_a_1_bit_network_costs_what_is_predicted(space, seed):
    stack = random_stack(space, seed)
    network, cost = stack(), stack.cost()
    assert measure_cost(network, (3, 9, 8)) == cost
    weights = [m.weight for m in network.modules() if isinstance(m, OneBitConv2d)]
    assert cost.bit_params == sum(w.numel() for w in weights)
    assert cost.params == sum(p.numel() for p in network.parameters())
    real = Stack(
        tuple(
            PlacedCell(one.cell and Cell(one.cell.nodes, one.cell.inputs, one.cell.output), *rest)
            for one, *rest in ((one, one.channels, one.reduction) for one in stack.cells)
        ),
        stack.image_shape,
        stack.classes,
    ).cost()
    assert real.bit_ops == real.bit_params == 0
    assert cost.model_bits < real.model_bits


@pytest.mark.slow
def test_a_1_bit_network_learns_and_survives_safetensors(period_batch):
    cell = Cell(((Edge(0, "sep_conv_5x5"), Edge(1, "sep_conv_5x5")),), one_bit=True)
    stack = Stack((PlacedCell(cell, 8, False),) * 2, (1, 8, 8), 2)
    network = stack()
    adam = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for step in range(60):
        images, labels = period_batch(32, step)
        loss = nn.functional.cross_entropy(network(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    again = stack()
    again.load_state_dict(load(save(network.state_dict())))
    images, _ = period_batch(8, 999)
    assert torch.equal(again.eval()(images), network.eval()(images))
