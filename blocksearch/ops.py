"""Candidate operations: name -> builder(channels, stride, searching).

Every op keeps the number of channels and divides the resolution by its stride (1 or 2). The DARTS
set follows Liu, Simonyan, Yang (2019), https://arxiv.org/abs/1806.09055. The light set
(`dws_*`, `ghost_3x3`, `gshuffle_3x3`) is our reconstruction of the light-weight space of DLW-NAS
(Li et al. 2022, https://doi.org/10.1007/s12559-022-10046-y), whose text we could not read; it draws
on GhostNet and ShuffleNet.
"""

import functools
import math
from typing import cast

import torch
from torch import Tensor, nn

from blocksearch.convolution import GridConv2d
from blocksearch.one_bit import BODIES, OneBitReduce, OneBitUnit
from blocksearch.space import OpBuilder, OwnOps
from evaluation.cost.counts import measure_cost
from evaluation.errors import require
from evaluation.records import Cost

SHUFFLE_GROUPS = 4


def batch_norm(channels: int, searching: bool) -> nn.BatchNorm2d:
    """BatchNorm; in the supernet without parameters, and always on the batch's own statistics.

    Running statistics would mix those of many different gates.
    """
    return nn.BatchNorm2d(channels, affine=not searching, track_running_stats=not searching)


class Zero(nn.Module):
    """The op `none`: zeros, at the resolution that the stride asks for."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros (B, C, H / stride, W / stride), also where x is not finite."""
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Op(nn.Module):
    """A layer in its common form: ReLU, body, BatchNorm, where the first and the last may lack.

    The parts have names of their own because a mixed cell shares ReLUs between ops and folds the
    BatchNorms into the gated sum.
    """

    def __init__(self, body: nn.Module, norm: nn.BatchNorm2d | None = None, *, relu: bool):
        super().__init__()
        self.relu = relu
        self.body = body
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        return self.normalise(self.body(torch.relu(x) if self.relu else x))

    def normalise(self, z: Tensor) -> Tensor:
        """Apply the BatchNorm, if there is one, to the output of the body."""
        return z if self.norm is None else cast(Tensor, self.norm(z))


class Separable(nn.Sequential):
    """Depthwise and pointwise convolutions in one or two units, with BatchNorm, ReLU between."""

    def __init__(
        self,
        channels: int,
        stride: int,
        searching: bool,
        *,
        kernel: int,
        dilation: int = 1,
        units: int = 1,
    ):
        layers: list[nn.Module] = []
        for unit in range(units):
            if unit:
                layers += [batch_norm(channels, searching), nn.ReLU()]
            layers += [
                nn.Conv2d(
                    channels,
                    channels,
                    kernel,
                    stride if unit == 0 else 1,
                    dilation * (kernel - 1) // 2,
                    dilation,
                    groups=channels,
                    bias=False,
                ),
                nn.Conv2d(channels, channels, 1, bias=False),
            ]
        super().__init__(*layers)

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """Depthwise, pointwise, of each unit in turn."""
        return [layer for layer in self if isinstance(layer, nn.Conv2d)]


class TwoGrids(nn.Module):
    """Halve the resolution: two 1x1 convolutions on pixel grids shifted by one, concatenated."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.even = GridConv2d(in_channels, half, 1, stride=2, bias=False)
        self.odd = GridConv2d(in_channels, out_channels - half, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        # An odd side lacks its last odd pixel: pad, so that both grids have ceil(H / 2) points.
        padded = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return torch.cat([self.even(x), self.odd(padded[:, :, 1:, 1:])], dim=1)


def factorized_reduce(
    in_channels: int, out_channels: int, searching: bool, one_bit: bool = False
) -> Op:
    """ReLU, `TwoGrids`, BatchNorm: the skip connection that halves the resolution."""
    if one_bit:
        return Op(OneBitReduce(in_channels, out_channels, searching), relu=False)
    body = TwoGrids(in_channels, out_channels)
    return Op(body, batch_norm(out_channels, searching), relu=True)


def relu_conv_bn(in_channels: int, out_channels: int, searching: bool, one_bit: bool = False) -> Op:
    """ReLU, 1x1 convolution, BatchNorm; where `one_bit`, a unit of 1-bit weights."""
    if one_bit:
        unit = OneBitUnit(in_channels, out_channels, 1, one_bit_input=False, searching=searching)
        return Op(unit, relu=False)
    body = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return Op(body, batch_norm(out_channels, searching), relu=True)


class ResidualReduction(nn.Module):
    """Halve the resolution between cells that do not: the residual block of NAS-Bench-201.

    Two units of ReLU, 3x3 convolution, BatchNorm; beside them an average pool and a 1x1
    convolution. From our memory of Dong and Yang (2020), https://arxiv.org/abs/2001.00326.
    """

    def __init__(self, in_channels: int, out_channels: int, searching: bool):
        super().__init__()
        self.body = nn.Sequential(
            *_convolution_unit(in_channels, out_channels, 3, 2, searching),
            *_convolution_unit(out_channels, out_channels, 3, 1, searching),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Map (B, C, H, W), the newer of two states, to (B, C', ceil(H / 2), ceil(W / 2))."""
        return cast(Tensor, self.body(s1) + self.shortcut(s1))


def _convolution_unit(
    in_channels: int, out_channels: int, kernel: int, stride: int, searching: bool
) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
        batch_norm(out_channels, searching),
    ]


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups, so that the next grouped layer mixes them."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Permute the channels of (B, C, H, W)."""
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Ghost(nn.Module):
    """Half of the channels from a 1x1 convolution, the other half a cheap 3x3 depthwise of it."""

    def __init__(self, channels: int, stride: int, searching: bool):
        super().__init__()
        if channels % 2:
            raise ValueError(f"ghost_3x3 needs an even number of channels, got {channels}")
        half = channels // 2
        self.primary = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity(),
            nn.Conv2d(channels, half, 1, bias=False),
            batch_norm(half, searching),
            nn.ReLU(),
        )
        self.cheap = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride)."""
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)


def _skip_connect(channels: int, stride: int, searching: bool) -> nn.Module:
    if stride == 1:
        return Op(nn.Identity(), relu=False)
    return factorized_reduce(channels, channels, searching)


def _max_pool(channels: int, stride: int, searching: bool) -> nn.Module:
    return _pool(nn.MaxPool2d(3, stride, padding=1), channels, searching)


def _avg_pool(channels: int, stride: int, searching: bool) -> nn.Module:
    pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    return _pool(pool, channels, searching)


def _pool(pool: nn.Module, channels: int, searching: bool) -> nn.Module:
    """A pool, followed by a BatchNorm in the supernet only, as DARTS does."""
    return Op(pool, batch_norm(channels, searching) if searching else None, relu=False)


def _separable(kernel: int, dilation: int = 1, units: int = 1) -> OpBuilder:
    def build(channels: int, stride: int, searching: bool) -> nn.Module:
        body = Separable(channels, stride, searching, kernel=kernel, dilation=dilation, units=units)
        return Op(body, batch_norm(channels, searching), relu=True)

    return build


def _ghost(channels: int, stride: int, searching: bool) -> nn.Module:
    body = Ghost(channels, stride, searching)
    return Op(body, batch_norm(channels, searching), relu=True)


def _gshuffle(channels: int, stride: int, searching: bool) -> nn.Module:
    """Grouped 1x1, BatchNorm, ReLU, shuffle, 3x3 depthwise, grouped 1x1."""
    groups = math.gcd(channels, SHUFFLE_GROUPS)
    body = nn.Sequential(
        nn.Conv2d(channels, channels, 1, groups=groups, bias=False),
        batch_norm(channels, searching),
        nn.ReLU(),
        ChannelShuffle(groups),
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, groups=groups, bias=False),
    )
    return Op(body, batch_norm(channels, searching), relu=True)


def _convolution(kernel: int) -> OpBuilder:
    def build(channels: int, stride: int, searching: bool) -> nn.Module:
        body = GridConv2d(channels, channels, kernel, stride, kernel // 2, bias=False)
        return Op(body, batch_norm(channels, searching), relu=True)

    return build


OPS: dict[str, OpBuilder] = {
    "none": lambda channels, stride, searching: Zero(stride),
    "skip_connect": _skip_connect,
    "max_pool_3x3": _max_pool,
    "avg_pool_3x3": _avg_pool,
    "sep_conv_3x3": _separable(3, units=2),
    "sep_conv_5x5": _separable(5, units=2),
    "dil_conv_3x3": _separable(3, dilation=2),
    "dil_conv_5x5": _separable(5, dilation=2),
    "dws_conv_3x3": _separable(3),
    "dws_conv_5x5": _separable(5),
    "ghost_3x3": _ghost,
    "gshuffle_3x3": _gshuffle,
    "nor_conv_1x1": _convolution(1),
    "nor_conv_3x3": _convolution(3),
}

DARTS_OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
LIGHT_OPS = (
    "none",
    "skip_connect",
    "max_pool_3x3",
    "avg_pool_3x3",
    "dws_conv_3x3",
    "dws_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "ghost_3x3",
    "gshuffle_3x3",
)


@functools.cache
def op_cost(
    name: str,
    channels: int,
    stride: int,
    side: tuple[int, int],
    one_bit: bool = False,
    own: OwnOps = (),
) -> Cost:
    """Return the cost of an op in a found network, for an input of (channels, *side)."""
    with torch.device("meta"):
        op = build_op(name, channels, stride, searching=False, one_bit=one_bit, own=own)
    return measure_cost(op, (channels, *side))


def build_op(
    name: str,
    channels: int,
    stride: int,
    searching: bool,
    one_bit: bool = False,
    own: OwnOps = (),
) -> nn.Module:
    """Build the op `name` for `channels` channels.

    Args:
        name: A key of `OPS`, or one of `own`.
        channels: Channels in and out.
        stride: 1 or 2.
        searching: True in the supernet: see `batch_norm`, and pools are followed by one.
        one_bit: Its 1-bit form, see `blocksearch.one_bit`; ops without a convolution have none.
        own: A user's own.

    Raises:
        ValueError: If the name is unknown.
        InputError: If a 1-bit form of one's own op is asked for.
    """
    if mine := dict(own).get(name):
        require(not one_bit, f"op {name}: an own op has no 1-bit form")
        module: nn.Module = mine(channels, stride, searching)
        return in_common_form(module)
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)} or an own one, got {name!r}")
    if one_bit and name in BODIES:
        return Op(BODIES[name](channels, stride, searching), relu=False)
    if one_bit and name == "skip_connect" and stride == 2:
        return factorized_reduce(channels, channels, searching, one_bit)
    built: nn.Module = OPS[name](channels, stride, searching)
    return built


def in_common_form(module: nn.Module) -> nn.Module:
    """Return a module of any kind as an op of a mixed cell."""
    return module if isinstance(module, Op | Zero) else Op(module, relu=False)
