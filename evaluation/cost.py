"""Exact cost of any `nn.Module`.

The convention, stated here once: FLOPs are multiply-adds of convolutions and linear layers for one
image, forward; BatchNorm, pooling, activations and additions count nothing, as in the tables of
DARTS. `torch.utils.flop_counter` counts two for every multiply-add, so it gives exactly twice this.
Params are all trainable parameters.
"""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evaluation.records import Cost


def count_params(model: nn.Module) -> int:
    """Return the number of trainable parameters, each shared one once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def measure_cost(model: nn.Module, *input_shapes: tuple[int, ...]) -> Cost:
    """Count params and multiply-adds of one forward pass, on the meta device: nothing is computed.

    Args:
        model: Any module; it is neither moved nor changed.
        input_shapes: Shape without the batch axis of each positional input, e.g. (3, 32, 32).
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    inputs: list[Tensor] = [torch.empty(1, *shape, device="meta") for shape in input_shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(*inputs)
    return Cost(params=count_params(model), flops=counter.get_total_flops() // 2)
