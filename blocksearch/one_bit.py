"""1-bit operations: convolutions whose weights and inputs are +-1, and the ops made of them.

The convolution is that of DCP-NAS (Li et al., 2023, https://arxiv.org/abs/2306.15390): signs of the
inputs with signs of the weights, times a learned positive scale for each output channel. Two things
are those of the released code for retraining, https://github.com/YanjingLi0202/DCP-NAS: the order
of layers (BatchNorm, convolution, BatchNorm with eps 1e-3, PReLU), and that depthwise convolutions
and those that bring a state to another width or resolution have 1-bit weights but real inputs. With
1-bit inputs there as well, a search needs about twice as many steps for the same training loss
(measured on the task of tests/test_strategies.py). A shortcut leads around both convolutions of a
separable block, as in Bi-Real Net (Liu et al., 2018, https://arxiv.org/abs/1808.00278), where that
code has one around the block. The 1-bit forms of `ghost_3x3` and `gshuffle_3x3` are ours. Whatever
stands outside of cells stays real-valued.

Builders return the body of an op, which `blocksearch.ops` wraps; in the supernet (`searching`) its
BatchNorms are without parameters and running statistics, as all are there.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from blocksearch.convolution import GridConv2d

EPS = 1e-3  # of the BatchNorms behind convolutions, as in the released code


def signs(x: Tensor) -> Tensor:
    """Return +1 where x >= 0, else -1: never 0, as one bit cannot hold it."""
    return torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))


class InputSign(torch.autograd.Function):
    """Sign of inputs; its gradient is that of a piecewise quadratic: 2 - 2|x| below 1, else 0.

    As in Bi-Real Net. It can be derived twice, and in forward mode.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return `signs(x)`."""
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return signs(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Scale the gradient on the signs."""
        return grad * _slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """Scale a tangent in the same way."""
        return tangent * _slope(*ctx.saved_tensors)


def _slope(x: Tensor) -> Tensor:
    return (2 - 2 * x.abs()).clamp_min(0)


class WeightSign(torch.autograd.Function):
    """Sign of weights; its gradient passes where |w| <= 1 and is 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Return `signs(weight)`."""
        ctx.save_for_backward(weight)
        return signs(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Mask the gradient on the signs."""
        weight: Tensor = ctx.saved_tensors[0]
        return grad * (weight.abs() <= 1)


class OneBitConv2d(GridConv2d):
    """scale * conv(sign(x), sign(weight)), without a bias; padding is 0, neither sign.

    Attributes:
        scale: One number per output channel, of which the absolute value counts; it starts at
            mean |weight|, where the reconstruction error is smallest.
        one_bit_weight: Tells `evaluation.cost.counts` what kind of layer this is.
        one_bit_input: Whether the inputs become signs; else they are used as they are.
    """

    one_bit_weight = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        *,
        one_bit_input: bool = True,
    ):
        padding = dilation * (kernel - 1) // 2
        super().__init__(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False
        )
        self.one_bit_input = one_bit_input
        self.scale = nn.Parameter(self.weight.detach().abs().mean(dim=(1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        weight = self._scale() * cast(Tensor, WeightSign.apply(self.weight))
        if self.one_bit_input:
            x = cast(Tensor, InputSign.apply(x))
        y: Tensor = self._conv_forward(x, weight, None)
        return y

    def _scale(self) -> Tensor:
        return self.scale.abs()[:, None, None, None]

    def reconstruction_error(self) -> Tensor:
        """Return || weight - scale * sign(weight) ||^2, a scalar."""
        return (self.weight - self._scale() * signs(self.weight)).square().sum()

    def squared_norm(self) -> Tensor:
        """Return || scale * sign(weight) ||^2, a scalar."""
        return self.scale.square().sum() * self.weight[0].numel()


def _norm(channels: int, searching: bool, eps: float = EPS) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(
        channels, eps=eps, affine=not searching, track_running_stats=not searching
    )


class OneBitUnit(nn.Sequential):
    """BatchNorm, 1-bit convolution, BatchNorm, PReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        one_bit_input: bool = True,
        searching: bool,
    ):
        super().__init__(
            _norm(in_channels, searching, eps=1e-5),
            OneBitConv2d(
                in_channels, out_channels, kernel, stride, 1, groups, one_bit_input=one_bit_input
            ),
            _norm(out_channels, searching),
            nn.PReLU(out_channels),
        )


class OneBitSeparable(nn.Module):
    """A depthwise and a pointwise 1-bit convolution, each with a shortcut where it fits."""

    def __init__(self, channels: int, stride: int, searching: bool, kernel: int, dilation: int):
        super().__init__()
        self.depthwise = nn.Sequential(
            _norm(channels, searching),
            OneBitConv2d(
                channels, channels, kernel, stride, dilation, channels, one_bit_input=False
            ),
            _norm(channels, searching),
        )
        self.pointwise = nn.Sequential(
            OneBitConv2d(channels, channels, 1), _norm(channels, searching)
        )
        self.first, self.second = nn.PReLU(channels), nn.PReLU(channels)
        self.strided = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride)."""
        y = self.depthwise(x)
        y = self.first(y if self.strided else x + y)
        return cast(Tensor, self.second(y + self.pointwise(y)))


class OneBitReduce(nn.Module):
    """Halve the resolution: 1x1 convolutions, 1-bit but for their inputs, on two shifted grids."""

    def __init__(self, in_channels: int, out_channels: int, searching: bool):
        super().__init__()
        half = out_channels // 2
        self.norm = _norm(in_channels, searching, eps=1e-5)
        self.even = OneBitConv2d(in_channels, half, 1, stride=2, one_bit_input=False)
        self.odd = OneBitConv2d(in_channels, out_channels - half, 1, stride=2, one_bit_input=False)
        self.last = nn.Sequential(_norm(out_channels, searching), nn.PReLU(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.norm(x)
        # An odd side lacks its last odd pixel: pad, so that both grids have ceil(H / 2) points.
        padded = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        both = torch.cat([self.even(x), self.odd(padded[:, :, 1:, 1:])], dim=1)
        return cast(Tensor, self.last(both))


class OneBitGhost(nn.Module):
    """Half of the channels from a 1-bit 1x1 unit, the other half a 1-bit 3x3 depthwise of it."""

    def __init__(self, channels: int, stride: int, searching: bool):
        super().__init__()
        if channels % 2:
            raise ValueError(f"ghost_3x3 needs an even number of channels, got {channels}")
        half = channels // 2
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.primary = OneBitUnit(channels, half, 1, searching=searching)
        self.cheap = OneBitUnit(
            half, half, 3, groups=half, one_bit_input=False, searching=searching
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride)."""
        primary = self.primary(self.pool(x))
        return torch.cat([primary, self.cheap(primary)], dim=1)


BodyBuilder = Callable[[int, int, bool], nn.Module]  # channels, stride, searching


def _separable(kernel: int, dilation: int = 1, blocks: int = 1) -> BodyBuilder:
    def build(channels: int, stride: int, searching: bool) -> nn.Module:
        return nn.Sequential(
            *(
                OneBitSeparable(channels, 1 if block else stride, searching, kernel, dilation)
                for block in range(blocks)
            )
        )

    return build


def _convolution(kernel: int) -> BodyBuilder:
    def build(channels: int, stride: int, searching: bool) -> nn.Module:
        return OneBitUnit(channels, channels, kernel, stride, searching=searching)

    return build


def _gshuffle(channels: int, stride: int, searching: bool) -> nn.Module:
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1, each a unit."""
    groups = math.gcd(channels, 4)
    return nn.Sequential(
        OneBitUnit(channels, channels, 1, groups=groups, searching=searching),
        nn.ChannelShuffle(groups),
        OneBitUnit(
            channels,
            channels,
            3,
            stride,
            groups=channels,
            one_bit_input=False,
            searching=searching,
        ),
        OneBitUnit(channels, channels, 1, groups=groups, searching=searching),
    )


BODIES: dict[str, BodyBuilder] = {
    "sep_conv_3x3": _separable(3, blocks=2),
    "sep_conv_5x5": _separable(5, blocks=2),
    "dil_conv_3x3": _separable(3, dilation=2),
    "dil_conv_5x5": _separable(5, dilation=2),
    "dws_conv_3x3": _separable(3),
    "dws_conv_5x5": _separable(5),
    "ghost_3x3": OneBitGhost,
    "gshuffle_3x3": _gshuffle,
    "nor_conv_1x1": _convolution(1),
    "nor_conv_3x3": _convolution(3),
}
