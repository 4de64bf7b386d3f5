"""Exact cost of any `nn.Module`.

The convention, stated here once: FLOPs are multiply-adds of convolutions and linear layers for one
image, forward; BatchNorm, pooling, activations and additions count nothing, as in the tables of
DARTS. `torch.utils.flop_counter` counts two for every multiply-add, so it gives exactly twice this.
Params are all trainable parameters.

A layer of 1-bit weights says so by an attribute `one_bit_weight = True` and keeps them in its
parameter `weight`: they are counted among the params and, once more, as `bit_params`. If it has
`one_bit_input = True` as well, its multiply-adds are counted as `bit_ops` instead of FLOPs.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.records import Cost


def count_params(model: nn.Module) -> int:
    """Return the number of trainable parameters, each shared one once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure_cost(model: nn.Module, *input_shapes: tuple[int, ...]) -> Cost:
    """Count params and multiply-adds of one forward pass, on the meta device: nothing is computed.

    What is 1-bit is counted apart, see above.

    Args:
        model: Any module; it is neither moved nor changed.
        input_shapes: Shape without the batch axis of each positional input, e.g. (3, 32, 32).
    """
    from torch.utils.flop_counter import FlopCounterMode  # workers do without, and without Triton

    shadow = copy.deepcopy(model).to("meta").eval()
    inputs: list[Tensor] = [torch.empty(1, *shape, device="meta") for shape in input_shapes]
    bit_ops = 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def enter(layer: nn.Module, args: Any) -> None:
            nonlocal bit_ops
            bit_ops -= counter.get_total_flops() // 2

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            nonlocal bit_ops
            bit_ops += counter.get_total_flops() // 2

        for layer in _of_one_bit_weights(shadow):
            if getattr(layer, "one_bit_input", False):
                layer.register_forward_pre_hook(enter)
                layer.register_forward_hook(leave)
        shadow(*inputs)
    return Cost(
        params=count_params(model),
        flops=counter.get_total_flops() // 2 - bit_ops,
        bit_ops=bit_ops,
        bit_params=sum(one.get_parameter("weight").numel() for one in _of_one_bit_weights(model)),
    )


def _of_one_bit_weights(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if getattr(layer, "one_bit_weight", False)]
