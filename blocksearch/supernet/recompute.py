"""Cells of which autograd keeps the inputs alone: the backward pass computes their insides again.

For a supernet that does not fit into memory otherwise. A step holds the insides of one cell at a
time, and pays with one more forward pass. Both passes do the same operations on the same batch and
draw no random numbers, so BatchNorm sees the same statistics and gradients stay what they are, bit
for bit on a CPU; half a batch would change both.

`torch.utils.checkpoint` does not serve here: it drops what autograd saves, while a fused cell keeps
its insides itself; and it would recompute with other weights than those that `functional_call` lent
the forward pass. A second derivative comes out right as well, but its graph keeps every inside, so
that nothing is saved.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blocksearch.kernels import compiled
from blocksearch.relaxation import Gates


def recomputed(
    cell: nn.Module, s0: Tensor, s1: Tensor, gates: Gates | None = None, kind: int = 0
) -> Tensor:
    """Return what `cell(s0, s1, gates, kind)` does; its insides are not kept for the gradient.

    Args:
        cell: A mixed cell; one that takes no gates is called without both.
        s0: Output of the cell before the previous.
        s1: Output of the previous cell.
        gates: Of all kinds.
        kind: Which kind this cell is.
    """
    weights = dict(cell.named_parameters())
    learning = {} if gates is None else {k: v for k, v in vars(gates).items() if _is_float(v)}
    device = s1.device.type
    call = _Call(
        cell,
        gates,
        kind,
        (tuple(learning), tuple(weights)),
        is_plain=compiled.is_plain(),
        reduced=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    # The newer input first: it is the order in which autograd adds up what reaches the stem.
    tensors = s1, s0, *learning.values(), *weights.values()
    return cast(Tensor, _Recomputed.apply(call, *tensors))


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Call:
    """A call of a cell, but for the tensors that may ask for gradients: they are given each time.

    Attributes:
        cell: See `recomputed`.
        gates: See `recomputed`.
        kind: See `recomputed`.
        names: Of the gates' tensors and of the cell's weights, in the order in which they come.
        is_plain: Whether kernels are not to be used.
        reduced: Type to which autocast reduces, None without.
    """

    cell: nn.Module
    gates: Gates | None
    kind: int
    names: tuple[tuple[str, ...], tuple[str, ...]]
    is_plain: bool
    reduced: torch.dtype | None

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Call the cell with autograd recording, both times: it may choose other loops without."""
        s1, s0, *others = tensors
        learning: dict[str, Any] = dict(zip(self.names[0], others, strict=False))
        weights = dict(zip(self.names[1], others[len(learning) :], strict=True))
        chosen = () if self.gates is None else (replace(self.gates, **learning), self.kind)
        path = compiled.plain_path() if self.is_plain else nullcontext()
        enabled = self.reduced is not None
        with path, torch.autocast(s1.device.type, self.reduced, enabled), torch.enable_grad():
            # Shared ops bear several names, of which the first alone is to be lent.
            return cast(
                Tensor, functional_call(self.cell, weights, (s0, s1, *chosen), tie_weights=False)
            )


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return call([t.detach().requires_grad_(t.requires_grad) for t in tensors]).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # a cell that no later one reads learns nothing, weight decay included
            return (None,) * len(ctx.needs_input_grad)
        again = torch.is_grad_enabled()  # create_graph=True: this pass is to be derived itself
        needed = ctx.needs_input_grad[1:]
        # Views stay in the outer graph, yet a gradient by them stops at the cell.
        inputs = [
            t.view_as(t) if again else t.detach().requires_grad_(needs)
            for t, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]
        outputs = ctx.call(inputs)
        if not outputs.requires_grad:  # all of its ops are left out: it is a constant
            return (None,) * len(ctx.needs_input_grad)
        found = iter(
            torch.autograd.grad(outputs, wanted, grad, create_graph=again, allow_unused=True)
        )
        return None, *[next(found) if needs else None for needs in needed]
