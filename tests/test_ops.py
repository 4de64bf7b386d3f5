"""Candidate ops: shapes, what they see, and what they cost."""

import pytest
import torch
from torch import Tensor, nn

from blocksearch import nas_bench_201
from blocksearch.ops import (
    DARTS_OPS,
    LIGHT_OPS,
    OPS,
    ChannelShuffle,
    build_op,
    factorized_reduce,
    op_cost,
)

CONVOLUTIONS_AND_POOLS_SEE_PX = {
    "skip_connect": 1,
    "max_pool_3x3": 3,
    "avg_pool_3x3": 3,
    "sep_conv_3x3": 5,
    "sep_conv_5x5": 9,
    "dil_conv_3x3": 5,
    "dil_conv_5x5": 9,
    "dws_conv_3x3": 3,
    "dws_conv_5x5": 5,
    "ghost_3x3": 3,
    "gshuffle_3x3": 3,
}


@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_the_channels_and_halves_any_side_rounding_up(name, searching):
    for stride in (1, 2):
        op = build_op(name, 8, stride, searching)
        for height, width in ((8, 8), (7, 33), (1, 2)):
            out = op(torch.randn(2, 8, height, width))
            assert out.shape == (2, 8, -(-height // stride), -(-width // stride))
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", OPS)
def test_the_memory_format_changes_no_result(name):
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for stride in (1, 2):
        op = build_op(name, 8, stride, searching=True).double()
        torch.testing.assert_close(op(x.to(memory_format=torch.channels_last)), op(x))


def test_every_op_of_the_sets_is_built_by_name():
    assert {*DARTS_OPS, *LIGHT_OPS, *nas_bench_201.OPS} == set(OPS)
    assert DARTS_OPS[0] == LIGHT_OPS[0] == "none"


def test_an_unknown_op_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="sep_conv_3x3.*got 'sep_conv_9x9'"):
        build_op("sep_conv_9x9", 8, 1, searching=False)


def test_none_gives_zeros_even_where_the_input_is_not_finite():
    x = torch.tensor([[[[float("nan"), float("inf")], [1.0, 2.0]]]])
    for stride, side in ((1, 2), (2, 1)):
        out = build_op("none", 1, stride, searching=True)(x)
        assert torch.equal(out, torch.zeros(1, 1, side, side))


@pytest.mark.parametrize(("name", "expected_px"), CONVOLUTIONS_AND_POOLS_SEE_PX.items())
def test_an_op_sees_as_far_as_its_kernels_reach(name, expected_px):
    torch.manual_seed(0)
    op = build_op(name, 8, 1, searching=False).eval()
    seen = torch.zeros(15, 15, dtype=torch.bool)
    for _ in range(20):  # a ReLU or a maximum hides some pixels from some gradients
        x = torch.rand(1, 8, 15, 15, requires_grad=True)
        op(x)[0, :, 7, 7].sum().backward()
        assert x.grad is not None
        seen |= (x.grad[0] != 0).any(dim=0)
    rows, columns = (seen.any(dim=d).nonzero().flatten() for d in (1, 0))
    for positions in (rows, columns):
        assert int(positions.max() - positions.min()) + 1 == expected_px
        assert int(positions.max() + positions.min()) == 14  # centred


def test_dilated_convolutions_leave_out_every_second_pixel():
    op = build_op("dil_conv_3x3", 4, 1, searching=False).eval()
    x = torch.rand(1, 4, 9, 9, requires_grad=True)
    op(x)[0, :, 4, 4].sum().backward()
    assert x.grad is not None
    assert (x.grad[0] != 0).any(dim=0).nonzero().tolist() == [
        [row, column] for row in (2, 4, 6) for column in (2, 4, 6)
    ]


def test_average_pooling_does_not_count_the_padding():
    ones = torch.ones(1, 2, 5, 5)
    assert torch.equal(build_op("avg_pool_3x3", 2, 1, searching=False)(ones), ones)


def test_max_pooling_of_negative_values_does_not_see_the_padding():
    x = torch.full((1, 2, 5, 5), -3.0)
    assert torch.equal(build_op("max_pool_3x3", 2, 1, searching=False)(x), x)


def test_a_skip_is_the_identity_and_has_no_parameters():
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(build_op("skip_connect", 2, 1, searching=True)(x), x)


def test_factorized_reduce_reads_both_pixel_grids():
    op = factorized_reduce(2, 4, searching=False).eval()
    x = torch.rand(1, 2, 5, 5, requires_grad=True)
    op(x).sum().backward()
    assert x.grad is not None
    seen = (x.grad[0] != 0).any(dim=0).nonzero().tolist()
    even, odd = range(0, 5, 2), range(1, 5, 2)
    assert seen == sorted([[r, c] for r in even for c in even] + [[r, c] for r in odd for c in odd])


def test_the_shuffle_sends_channels_of_every_group_to_every_group():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert ChannelShuffle(2)(x).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert ChannelShuffle(4)(x).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_gshuffle_lets_every_channel_reach_every_group():
    torch.manual_seed(0)
    op = build_op("gshuffle_3x3", 16, 1, searching=False)
    seen = torch.zeros(16, dtype=torch.bool)
    for _ in range(20):
        x = torch.randn(1, 16, 3, 3, requires_grad=True)
        op(x)[0, 0, 1, 1].backward()
        assert x.grad is not None
        seen |= (x.grad[0] != 0).flatten(1).any(dim=1)
    assert seen.all()


def test_ghost_refuses_an_odd_number_of_channels():
    with pytest.raises(ValueError, match="even number of channels, got 7"):
        build_op("ghost_3x3", 7, 1, searching=False)


@pytest.mark.parametrize("name", OPS)
def test_batch_norms_of_the_supernet_have_neither_parameters_nor_memory(name):
    for stride in (1, 2):
        op = build_op(name, 8, stride, searching=True)
        norms = [module for module in op.modules() if isinstance(module, nn.BatchNorm2d)]
        assert all(not list(norm.parameters()) and not list(norm.buffers()) for norm in norms)
        x = torch.randn(4, 8, 6, 6)
        torch.testing.assert_close(op.eval()(x), op.train()(x))


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
def test_pools_are_normalised_in_the_supernet_only(name):
    x = 5 + 3 * torch.randn(16, 4, 8, 8)
    searching: Tensor = build_op(name, 4, 1, searching=True)(x)
    found: Tensor = build_op(name, 4, 1, searching=False)(x)
    assert searching.mean().abs() < 1e-4
    assert searching.std() == pytest.approx(1.0, abs=1e-2)
    assert found.mean() > 4


def params_without_batch_norm(name: str, channels: int) -> int:
    convolutions = [
        module
        for module in build_op(name, channels, 1, searching=False).modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert all(conv.bias is None for conv in convolutions)
    return sum(conv.weight.numel() for conv in convolutions)


@pytest.mark.parametrize(
    ("name", "depthwise", "pointwise"),
    [  # coefficients of C and of C^2
        ("none", 0, 0),
        ("skip_connect", 0, 0),
        ("max_pool_3x3", 0, 0),
        ("avg_pool_3x3", 0, 0),
        ("dws_conv_3x3", 9, 1),
        ("dws_conv_5x5", 25, 1),
        ("dil_conv_3x3", 9, 1),
        ("dil_conv_5x5", 25, 1),
        ("sep_conv_3x3", 18, 2),
        ("sep_conv_5x5", 50, 2),
        ("ghost_3x3", 4.5, 0.5),
        ("gshuffle_3x3", 9, 0.5),
    ],
)
def test_the_parameters_of_an_op_are_those_of_the_table(name, depthwise, pointwise):
    for channels in (16, 24, 64):
        expected = depthwise * channels + pointwise * channels**2
        assert params_without_batch_norm(name, channels) == expected
        # at stride 1 every parameter is met once per pixel, those of BatchNorm are not counted
        assert op_cost(name, channels, 1, (8, 6)).flops == 48 * expected


@pytest.mark.parametrize("channels", [16, 32, 48, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_light_op_is_cheaper_than_a_separable_convolution(channels, stride):
    separable = op_cost("sep_conv_3x3", channels, stride, (16, 16))
    for name in LIGHT_OPS:
        cost = op_cost(name, channels, stride, (16, 16))
        assert cost.params < separable.params
        assert cost.flops < separable.flops


def test_the_cost_of_an_op_counts_its_batch_norms():
    assert op_cost("sep_conv_3x3", 16, 1, (8, 8)).params == 2 * (9 * 16 + 16**2 + 2 * 16)
    assert op_cost("skip_connect", 16, 2, (8, 8)).params == 16**2 + 2 * 16


def test_strided_ops_cost_what_their_smaller_output_takes():
    # sep_conv_3x3 at stride 2: everything runs on 4x4 points
    assert op_cost("sep_conv_3x3", 16, 2, (8, 8)).flops == 16 * 2 * (9 * 16 + 16**2)
    assert op_cost("sep_conv_3x3", 16, 2, (7, 7)).flops == 16 * 2 * (9 * 16 + 16**2)
