"""Form: how the cells of a supernet are built where a method asks for more than ops on edges."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocksearch.ops import relu_conv_bn
from blocksearch.relaxation import Gates
from blocksearch.space import SearchSpace


@dataclass(frozen=True)
class Form:
    """How a supernet is built.

    Attributes:
        partial: One of so many parts of the channels goes through the ops; the others go around
            them (`Gates.bypass`), and a shuffle mixes the two.
        bottleneck: A 1x1 convolution divides the channels by this before the ops of a state, and
            another brings them back behind the sum of a node.
        share_ops: All edges that leave a state share their ops: one of each per state.
        cell_kinds: Every cell is a kind of its own, so that each may be found different.
        one_bit: Convolutions have 1-bit weights and inputs.
    """

    partial: int = 1
    bottleneck: int = 1
    share_ops: bool = False
    cell_kinds: bool = False
    one_bit: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is not positive, or both are above 1.
        """
        if min(self.partial, self.bottleneck) < 1 or self.partial > 1 < self.bottleneck:
            raise ValueError(f"partial or bottleneck may be above 1, not both, got {self}")

    def op_channels(self, channels: int) -> int:
        """Return the channels that an op works on in a cell of width `channels`.

        Raises:
            ValueError: If the width cannot be divided so.
        """
        parts = self.partial * self.bottleneck
        if parts > 1 and channels % (2 * parts):
            raise ValueError(
                f"a cell of {channels} channels cannot be cut into {parts} parts, each of an even "
                "number of channels"
            )
        return channels // parts


PLAIN = Form()


class Whole(nn.Module):
    """All channels of a state go through the ops."""

    def enter(self, state: Tensor, source: int) -> Tensor:
        """Return what the ops that read state number `source`, (B, C, H, W), work on."""
        return state

    def leave(
        self, total: Tensor, states: list[Tensor], gates: Gates, kind: int, node: int
    ) -> Tensor:
        """Return the state that a node makes of the gated sum of its ops.

        Args:
            total: The sum.
            states: All states before the node.
            gates: Of all kinds.
            kind: Kind of the cell.
            node: Number of the node.
        """
        return total


class Partial(Whole):
    """One part of the channels goes through the ops, the others around them, then a shuffle.

    Xu et al., 2020, PC-DARTS, https://arxiv.org/abs/1907.05737.
    """

    def __init__(self, parts: int, space: SearchSpace, reduction: bool):
        super().__init__()
        self.parts = parts
        self.space = space
        self.reduction = reduction

    def enter(self, state: Tensor, source: int) -> Tensor:
        """Return the first part of the channels."""
        return state[:, : state.shape[1] // self.parts]

    def leave(
        self, total: Tensor, states: list[Tensor], gates: Gates, kind: int, node: int
    ) -> Tensor:
        """Put the rest of the channels, gated per edge, beside the sum, and shuffle.

        Raises:
            ValueError: If the gates lack `bypass`.
        """
        if gates.bypass is None:
            raise ValueError("a supernet of partial channels needs Gates.bypass")
        target = self.space.inputs + node
        terms = [
            gates.bypass[kind, e] * self._rest(states[source], source)
            for e, (source, to) in enumerate(self.space.edges)
            if to == target
        ]
        whole = torch.cat([total, torch.stack(terms).sum(dim=0)], dim=1)
        return nn.functional.channel_shuffle(whole, self.parts)

    def _rest(self, state: Tensor, source: int) -> Tensor:
        rest = state[:, state.shape[1] // self.parts :]
        if self.reduction and source < self.space.inputs:
            return nn.functional.max_pool2d(rest, 2, ceil_mode=True)
        return rest


class Bottleneck(Whole):
    """Ops work on few channels, between a 1x1 convolution per state and another per node."""

    def __init__(self, divisor: int, space: SearchSpace, channels: int):
        super().__init__()
        few = channels // divisor
        sources = space.inputs + space.nodes - 1
        self.narrow = nn.ModuleList(relu_conv_bn(channels, few, True) for _ in range(sources))
        self.widen = nn.ModuleList(relu_conv_bn(few, channels, True) for _ in range(space.nodes))

    def enter(self, state: Tensor, source: int) -> Tensor:
        """Return the few channels."""
        narrow: Tensor = self.narrow[source](state)
        return narrow

    def leave(
        self, total: Tensor, states: list[Tensor], gates: Gates, kind: int, node: int
    ) -> Tensor:
        """Bring the channels back."""
        wide: Tensor = self.widen[node](total)
        return wide


def passage_of(form: Form, space: SearchSpace, channels: int, *, reduction: bool) -> Whole:
    """Return what stands between the states of a cell and its ops."""
    if form.partial > 1:
        return Partial(form.partial, space, reduction)
    if form.bottleneck > 1:
        return Bottleneck(form.bottleneck, space, channels)
    return Whole()
