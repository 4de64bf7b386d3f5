"""Exact cost: closed forms, torch's own counter on the CPU, and published networks."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blocksearch.ops import OPS, build_op
from blocksearch.space import Cell, Edge
from evaluation.cost.counts import count_params, measure_cost
from evaluation.records import Cost
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.network import builder, predict_cost

# Liu, Simonyan, Yang 2019, genotypes.py of quark0/darts: (op, input) twice for each node.
DARTS = {
    "V1": (
        [
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 2),
        ],
        [
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
        ],
    ),
    "V2": (
        [
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("skip_connect", 0),
            ("dil_conv_3x3", 2),
        ],
        [
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ],
    ),
}
IMAGE = (3, 32, 32)


def darts(version, channels):
    """The network of 20 cells whose cells 6 and 13 halve the resolution, and its cells."""
    cells = {
        kind: Cell(
            tuple(
                (Edge(first[1], first[0]), Edge(second[1], second[0]))
                for first, second in zip(pairs[::2], pairs[1::2], strict=True)
            )
        )
        for kind, pairs in zip(("normal", "reduce"), DARTS[version], strict=True)
    }
    stages = tuple(Stage("normal", 6, channels * 2**i) for i in range(3))
    return NetworkSpec(stages, ("reduce", "reduce")), cells


def counted_on_cpu(model, *shapes):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*(torch.zeros(1, *shape) for shape in shapes))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        # 3 * 8 * 3 * 3 weights + 8 biases; a weight is used once per pixel of 10 x 14
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 14), Cost(216 + 8, 216 * 140)),
        # 12 filters over 8 / 4 channels; stride 2 leaves 5 x 7 pixels
        (
            nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False),
            (8, 10, 14),
            Cost(216, 216 * 35),
        ),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), (8, 10, 14), Cost(200, 28_000)),
        (nn.Conv2d(8, 8, 3, dilation=2, bias=False), (8, 10, 14), Cost(576, 576 * 60)),
        (nn.Linear(20, 7), (20,), Cost(147, 140)),
        (nn.BatchNorm2d(6), (6, 4, 4), Cost(12, 0)),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), (6, 4, 4), Cost(0, 0)),
    ],
)
def test_a_layer_costs_its_closed_form(layer, shape, expected):
    assert measure_cost(layer, shape) == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_flops_of_every_op_are_half_of_what_torch_counts_on_the_cpu(op, stride):
    model = build_op(op, 8, stride, searching=False)
    cost = measure_cost(model, (8, 9, 12))
    assert 2 * cost.flops == counted_on_cpu(model, (8, 9, 12))
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert ("conv" in op or op in ("ghost_3x3", "gshuffle_3x3")) <= (cost.flops > 0)


class Binary(nn.Conv2d):
    one_bit_weight = True
    one_bit_input = True


class BinaryWeights(nn.Conv2d):
    one_bit_weight = True
    one_bit_input = False


def test_1_bit_layers_are_counted_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Binary(4, 5, 1), BinaryWeights(5, 6, 1), nn.PReLU())
    pixels = 4 * 6
    assert measure_cost(model, (3, 6, 8)) == Cost(
        params=112 + 25 + 36 + 1,
        flops=(108 + 30) * pixels,
        bit_ops=20 * pixels,
        bit_params=20 + 30,  # without the biases
    )
    assert measure_cost(model[0], (3, 6, 8)) == Cost(112, 108 * pixels)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_frozen_params_are_left_out_and_shared_ones_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert count_params(model) == 32
    model[1].weight = model[0].weight
    assert count_params(model) == 16
    assert measure_cost(model, (4,)) == Cost(16, 32)  # the shared weight is used twice
    model[0].weight.requires_grad_(False)
    assert count_params(model) == 0


def test_measuring_changes_neither_the_model_nor_its_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    measure_cost(model, (3, 8, 8))
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_every_positional_input_gets_its_shape():
    assert measure_cost(nn.Bilinear(3, 5, 2, bias=False), (3,), (5,)).params == 30
    with pytest.raises(RuntimeError):
        measure_cost(nn.Bilinear(3, 5, 2), (3,), (4,))


DARTS_V2 = Cost(3_349_342, 528_359_040)


def test_darts_v2_is_predicted_to_have_the_published_size_to_the_last_parameter():
    assert predict_cost(*darts("V2", 36), IMAGE, 10) == DARTS_V2


@pytest.mark.slow
def test_darts_v2_has_the_published_size_to_the_last_parameter():
    assert measure_cost(builder(*darts("V2", 36), IMAGE, 10)(), IMAGE) == DARTS_V2


@pytest.mark.parametrize(
    ("version", "channels", "params_k", "flops_m"),
    [  # shared table of small DARTS networks with 20 cells, rounded as there
        ("V1", 16, 671, 108),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                ("V1", 36, 3169, 501),
                ("V1", 24, 1449, 231),
                ("V1", 20, 1023, 164),
                ("V1", 18, 838, 135),
                ("V2", 24, 1533, 244),
                ("V2", 20, 1083, 173),
                ("V2", 18, 887, 142),
                ("V2", 16, 711, 115),
            )
        ),
    ],
)
def test_smaller_darts_networks_have_the_sizes_of_the_table(version, channels, params_k, flops_m):
    cost = predict_cost(*darts(version, channels), IMAGE, 10)
    assert (round(cost.params / 1e3), round(cost.flops / 1e6)) == (params_k, flops_m)
