"""MixedCell (searching) and DiscreteCell (found), side by side because they must agree."""

from typing import Any

import torch
from torch import Tensor, nn

from blocksearch.ops import FactorizedReduce, Zero, batch_norm, build_op
from blocksearch.relaxation import Gates
from blocksearch.space import Cell, SearchSpace


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, BatchNorm: brings a cell's input to the cell's width."""

    def __init__(self, in_channels: int, out_channels: int, searching: bool):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            batch_norm(out_channels, searching),
        )


class CellInputs(nn.Module):
    """Bring the outputs of the two previous cells to one width and one resolution.

    `halve_first` says that the older one has twice the resolution, as after a reduction cell.
    """

    def __init__(
        self, in_channels: tuple[int, int], channels: int, *, halve_first: bool, searching: bool
    ):
        super().__init__()
        first = FactorizedReduce if halve_first else ReLUConvBN
        self.first = first(in_channels[0], channels, searching)
        self.second = ReLUConvBN(in_channels[1], channels, searching)

    def forward(self, s0: Tensor, s1: Tensor) -> list[Tensor]:
        """Map the two outputs to two states (B, C, H, W)."""
        return [self.first(s0), self.second(s1)]


class MixedCell(nn.Module):
    """A cell of the supernet: every op on every edge, each multiplied by its gate."""

    def __init__(
        self,
        space: SearchSpace,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        halve_first: bool,
    ):
        super().__init__()
        self.space = space
        self.inputs = CellInputs(in_channels, channels, halve_first=halve_first, searching=True)
        self.edges = nn.ModuleList(
            nn.ModuleList(
                build_op(op, channels, _stride(source, space.inputs, reduction), searching=True)
                for op in space.ops
            )
            for source, _ in space.edges
        )
        self.zero = Zero(_stride(0, space.inputs, reduction))
        self.out_channels = space.nodes * channels

    def forward(self, s0: Tensor, s1: Tensor, gates: Gates, kind: int) -> Tensor:
        """Compute the relaxed cell.

        Args:
            s0: Output of the cell before the previous, (B, C0, H0, W0).
            s1: Output of the previous cell, (B, C1, H, W).
            gates: Of all kinds; ops that are not active do not run and count as zero.
            kind: Which kind this cell is.

        Returns:
            (B, N * C, H', W'), all nodes concatenated.
        """
        states = self.inputs(s0, s1)
        weight = gates.weight[kind]
        active = None if gates.active is None else gates.active[kind].tolist()
        e = 0
        for node in range(self.space.nodes):
            outputs = []
            for source in range(self.space.inputs + node):
                ops: Any = self.edges[e]
                for o, op in enumerate(ops):
                    if not isinstance(op, Zero) and (active is None or active[e][o]):
                        outputs.append(gates.apply(weight[e, o], op(states[source])))
                e += 1
            states.append(_sum(outputs) if outputs else self.zero(states[0]))
        return torch.cat(states[self.space.inputs :], dim=1)


class DiscreteCell(nn.Module):
    """A found cell: one op on each of its edges.

    With `searching=True` its BatchNorms are the supernet's, so that the two can be compared.
    """

    def __init__(
        self,
        cell: Cell,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        halve_first: bool,
        searching: bool = False,
    ):
        super().__init__()
        self.cell = cell
        self.inputs = CellInputs(
            in_channels, channels, halve_first=halve_first, searching=searching
        )
        self.edges = nn.ModuleList(
            build_op(edge.op, channels, _stride(edge.source, cell.inputs, reduction), searching)
            for node in cell.nodes
            for edge in node
        )
        self.out_channels = len(cell.nodes) * channels

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Map (B, C0, H0, W0) and (B, C1, H, W) to (B, N * C, H', W'), all nodes concatenated."""
        states = self.inputs(s0, s1)
        ops = iter(self.edges)
        for node in self.cell.nodes:
            states.append(_sum([next(ops)(states[edge.source]) for edge in node]))
        return torch.cat(states[self.cell.inputs :], dim=1)


def _stride(source: int, inputs: int, reduction: bool) -> int:
    """Reduction cells halve the resolution on the edges that leave their inputs."""
    return 2 if reduction and source < inputs else 1


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
