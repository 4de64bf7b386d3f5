"""The ops of found cells on a CPU: unit by unit on the loops of `kernels.c`, with the same result.

A unit is ReLU, a depthwise convolution or none, a 1x1 convolution and BatchNorm, as one autograd
function. What is not made of units, or cannot run on the kernels, runs as it is; so does every op
in evaluation mode, where BatchNorm uses its running statistics.
"""

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from blocksearch.kernels import compiled
from blocksearch.kernels.compiled import (
    UNIT,
    Shape,
    is_depthwise,
    is_pointwise,
    lanes_of,
    library,
    refuse_second_derivative,
)
from blocksearch.ops import ChannelShuffle, Op


class Unit(NamedTuple):
    """What a unit is made of: ReLU, a depthwise convolution or none, a 1x1 one, BatchNorm."""

    pointwise: nn.Conv2d
    norm: nn.BatchNorm2d
    depthwise: nn.Conv2d | None = None

    def fits(self, x: Tensor) -> bool:
        """Tell whether `run` can take the place of the modules."""
        uses_batch = self.norm.training or not self.norm.track_running_stats
        whole_vectors = self.pointwise.out_channels % 4 == 0
        usual = self.norm.momentum is not None and self.pointwise.weight.dtype == x.dtype
        return uses_batch and whole_vectors and usual and compiled.fits(x)

    def run(self, x: Tensor) -> Tensor:
        """Map (B, K, H, W) to (B, C, H', W') in channels_last, as the modules do in training."""
        norm, x = self.norm, x.contiguous(memory_format=torch.channels_last)
        depthwise = None if self.depthwise is None else self.depthwise.weight.contiguous()
        weights = self._dense_pointwise(), depthwise
        out, mean, rstd = _Unit.apply(x, *weights, norm.weight, norm.bias, self)
        if norm.training and norm.track_running_stats:
            self._remember(mean, rstd, out.numel() // len(mean))
        return cast(Tensor, out)

    def _dense_pointwise(self) -> Tensor:
        """The weight (C, K, 1, 1) of the 1x1 convolution, with zeros where groups do not meet.

        At these widths a few zeros cost less than a convolution per group.
        """
        conv = self.pointwise
        if conv.groups == 1:
            return conv.weight.contiguous()
        blocks = conv.weight.flatten(1).chunk(conv.groups)
        dense: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return dense[:, :, None, None]

    @torch.no_grad()
    def _remember(self, mean: Tensor, rstd: Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch with `count` values a channel."""
        norm = self.norm
        var = (rstd**-2 - norm.eps) * (count / (count - 1))
        cast(Tensor, norm.num_batches_tracked).add_(1)
        cast(Tensor, norm.running_mean).lerp_(mean, cast(float, norm.momentum))
        cast(Tensor, norm.running_var).lerp_(var, cast(float, norm.momentum))


class _Unit(torch.autograd.Function):
    """A unit as one function; weights (C, K, 1, 1), (K, 1, k, k) or None, and those of the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pointwise: Tensor,
        depthwise: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        unit: Unit,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, into, stride = *pointwise.shape[:2], 1
        if unit.depthwise is not None:
            stride = unit.depthwise.stride[0]
        batch, _, height, width = x.shape
        side = -(-height // stride), -(-width // stride)
        if batch * math.prod(side) == 1:
            raise ValueError(f"expected more than 1 value per channel, got {tuple(x.shape)}")
        ctx.unit, ctx.kernels = unit, library(x.dtype, lanes_of(math.gcd(into, channels)))
        ctx.sizes = batch, math.prod(side), into, channels, torch.get_num_threads()
        z, out = (x.new_empty(batch, *side, channels) for _ in range(2))
        mean, rstd = x.new_empty(2, channels).unbind()
        if depthwise is None:
            pointers = [tensor.data_ptr() for tensor in (x, pointwise, z, mean, rstd)]
            ctx.kernels.forward_pointwise(*pointers, *ctx.sizes, unit.norm.eps)
        else:
            described = _describe(x, pointwise, depthwise, z, mean, rstd, unit)
            shape = _unit_shape(x, unit)
            ctx.kernels.forward_units(described.ctypes.data, 1, shape, unit.norm.eps)
        ctx.save_for_backward(x, pointwise, depthwise, gamma, z, mean, rstd)
        scale = rstd if gamma is None else rstd * gamma
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        torch.addcmul(shift, z, scale, out=out)
        ctx.mark_non_differentiable(mean, rstd)
        return out.permute(0, 3, 1, 2), mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, pointwise, depthwise, gamma, z, mean, rstd = ctx.saved_tensors
        batch, pixels, _, channels, threads = ctx.sizes
        g = grad.permute(0, 2, 3, 1).contiguous()
        slope = torch.ones_like(mean) if gamma is None else gamma.contiguous()
        d_gamma, coef = torch.empty_like(mean), x.new_empty(3, channels)
        term = [np.array([tensor.data_ptr()], np.uint64) for tensor in (z, mean, rstd)]
        distance = np.array([channels])
        ctx.kernels.node_gradient(
            term[0].ctypes.data,
            distance.ctypes.data,
            term[1].ctypes.data,
            term[2].ctypes.data,
            slope.data_ptr(),
            1,
            *(tensor.data_ptr() for tensor in (g, d_gamma, coef)),
            batch,
            pixels,
            channels,
            threads,
        )
        weights_too = any(ctx.needs_input_grad[1:3])
        gx = torch.empty_like(x)
        g_pointwise = torch.zeros_like(pointwise) if weights_too else None
        g_depthwise = None
        if depthwise is None:
            pointers = [tensor.data_ptr() for tensor in (x, pointwise, z, g, coef, gx)]
            g_pointer = None if g_pointwise is None else g_pointwise.data_ptr()
            ctx.kernels.backward_pointwise(*pointers, g_pointer, *ctx.sizes)
        else:
            described = _describe(x, pointwise, depthwise, z, mean, rstd, ctx.unit)
            described["g"], described["ldg"] = g.data_ptr(), channels
            described["coef"], described["gx"] = coef.data_ptr(), gx.zero_().data_ptr()
            if g_pointwise is not None:
                g_depthwise = torch.zeros_like(depthwise)
                described["gpw"], described["gdw"] = g_pointwise.data_ptr(), g_depthwise.data_ptr()
            ctx.kernels.backward_units(described.ctypes.data, 1, _unit_shape(x, ctx.unit))
        d_beta = g.sum(dim=(0, 1, 2)) if ctx.needs_input_grad[4] else None
        return gx, g_pointwise, g_depthwise, None if gamma is None else d_gamma, d_beta, None


def _describe(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    unit: Unit,
) -> np.ndarray:
    described = np.zeros(1, UNIT)
    named = {"x": x, "pw": pointwise, "dw": depthwise, "z": z, "mean": mean, "rstd": rstd}
    for name, tensor in named.items():
        described[name] = tensor.data_ptr()
    described["ldx"] = x.shape[1]
    described["kernel"] = depthwise.shape[-1]
    described["dilation"] = cast(nn.Conv2d, unit.depthwise).dilation[0]
    return described


def _unit_shape(x: Tensor, unit: Unit) -> Shape:
    batch, channels, height, width = x.shape
    conv = cast(nn.Conv2d, unit.depthwise)
    pad = cast(int, conv.padding[0])
    return Shape(batch, height, width, channels, conv.stride[0], pad, torch.get_num_threads())


def steps_of(op: Op) -> list[Unit | ChannelShuffle] | None:
    """What an op does, one step after the other, in units; None if it is of another form."""
    if not op.relu or op.norm is None:
        return None
    layers = list(op.body) if isinstance(op.body, nn.Sequential) else [op.body]
    steps: list[Unit | ChannelShuffle] = []
    convolutions: list[nn.Conv2d] = []
    activated = True  # each unit begins with a ReLU; the op's own is the first
    for layer in [*layers, op.norm]:
        if isinstance(layer, nn.Conv2d) and activated:
            convolutions.append(layer)
        elif isinstance(layer, nn.BatchNorm2d) and _form_a_unit(convolutions):
            steps.append(Unit(convolutions[-1], layer, *convolutions[:-1]))
            convolutions, activated = [], False
        elif isinstance(layer, nn.ReLU) and not convolutions:
            activated = True
        elif isinstance(layer, ChannelShuffle) and not convolutions:
            steps.append(layer)
        else:
            return None
    return steps


def _form_a_unit(convolutions: list[nn.Conv2d]) -> bool:
    """Tell whether these are a 1x1 convolution, perhaps with a depthwise one before it."""
    if not convolutions:
        return False
    *before, last = convolutions
    if not is_pointwise(last) or len(before) > 1:
        return False
    return all(
        is_depthwise(conv) and conv.out_channels == last.in_channels == last.out_channels
        for conv in before
    )


def run_op(op: Op, x: Tensor) -> Tensor:
    """Compute `op(x)`, unit by unit where the kernels can, else as it is."""
    steps = steps_of(op)
    if steps is None or not all(step.fits(x) for step in steps if isinstance(step, Unit)):
        return cast(Tensor, op(x))
    for step in steps:
        x = step.run(x) if isinstance(step, Unit) else step(x)
    return x
