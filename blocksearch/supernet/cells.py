"""MixedCell (searching) and DiscreteCell (found), side by side because they must agree."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from blocksearch.kernels import compiled, found, fused
from blocksearch.kernels.plan import CellPlan, Term
from blocksearch.kernels.steps import FoundPlan, plan_of
from blocksearch.ops import Zero, build_op, factorized_reduce, relu_conv_bn
from blocksearch.relaxation import Gates
from blocksearch.space import Cell, SearchSpace
from blocksearch.supernet.forms import PLAIN, Form, Whole, passage_of


class CellInputs(nn.Module):
    """Bring the outputs of the two previous cells to one width and one resolution.

    `halve_first` says that the older one has twice the resolution, as after a reduction cell. A
    cell with a single input reads the newer one as it is.
    """

    def __init__(
        self,
        in_channels: tuple[int, int],
        channels: int,
        *,
        halve_first: bool,
        searching: bool,
        inputs: int = 2,
        one_bit: bool = False,
    ):
        super().__init__()
        self.single = inputs == 1
        self.in_channels = in_channels[1:] if self.single else in_channels
        self.channels, self.strides = channels, (2 if halve_first else 1, 1)
        if self.single:
            if in_channels[1] != channels:
                raise ValueError(f"expected an input of {channels} channels, got {in_channels[1]}")
            return
        first = factorized_reduce if halve_first else relu_conv_bn
        self.first = first(in_channels[0], channels, searching, one_bit)
        self.second = relu_conv_bn(in_channels[1], channels, searching, one_bit)

    def forward(self, s0: Tensor, s1: Tensor) -> list[Tensor]:
        """Map the two outputs to the cell's input states (B, C, H, W)."""
        if self.single:
            return [s1]
        pairs = (self.first, s0, 0), (self.second, s1, 1)
        return [
            found.found_cell(self._plans[k], [s]) if found.fits(self._plans[k], s) else op(s)
            for op, s, k in pairs
        ]

    @functools.cached_property
    def _plans(self) -> list[FoundPlan]:
        parts = zip((self.first, self.second), self.in_channels, self.strides, strict=True)
        return [plan_of(op, width, self.channels, stride) for op, width, stride in parts]

    def lead_into(self, plan: FoundPlan) -> list[int]:
        """Add to a plan what this does, and return the cell's input states."""
        if self.single:
            return [0]
        states = [plan.state(), plan.state()]
        for source, op in enumerate((self.first, self.second)):
            plan.add(op, source, states[source], self.strides[source])
        return states


class MixedCell(nn.Module):
    """A cell of the supernet: every op on every edge, each multiplied by its gate.

    `fused.mixed_cell` computes the same where it can, much faster.
    """

    def __init__(
        self,
        space: SearchSpace,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        halve_first: bool,
        form: Form = PLAIN,
    ):
        super().__init__()
        self.space = space
        self.reduction = reduction
        self.form = form
        self.channels = channels
        self.inputs = CellInputs(
            in_channels,
            channels,
            halve_first=halve_first,
            searching=True,
            inputs=space.inputs,
            one_bit=form.one_bit,
        )
        width = form.op_channels(channels) if form != PLAIN else channels

        def ops(source: int) -> nn.ModuleList:
            stride = _stride(source, space.inputs, reduction)
            return nn.ModuleList(
                build_op(op, width, stride, searching=True, one_bit=form.one_bit, own=space.own)
                for op in space.ops
            )

        states = space.inputs + space.nodes
        shared = [ops(source) for source in range(states - 1)] if form.share_ops else None
        self.edges = nn.ModuleList(
            shared[source] if shared else ops(source) for source, _ in space.edges
        )
        self.passage = passage_of(form, space, channels, reduction=reduction)
        self.zero = Zero(_stride(0, space.inputs, reduction))
        self.out_channels = (space.nodes if space.output == "concat" else 1) * channels
        self._last_plan: tuple[object, CellPlan] | None = None

    def forward(self, s0: Tensor, s1: Tensor, gates: Gates, kind: int) -> Tensor:
        """Compute the relaxed cell.

        Args:
            s0: Output of the cell before the previous, (B, C0, H0, W0).
            s1: Output of the previous cell, (B, C1, H, W).
            gates: Of all kinds; ops that are not active do not run and count as zero.
            kind: Which kind this cell is.

        Returns:
            (B, N * C, H', W'), all nodes concatenated, or (B, C, H', W'), the last of them.
        """
        states = self.inputs(s0, s1)
        active = self._active(gates, kind)
        simple = type(self.passage) is Whole and not self.form.share_ops
        if active and simple and self.channels % 4 == 0 and compiled.fits(states[0]):
            nodes = self._fused(states, gates, kind, active)
        else:
            nodes = self._plain(states, gates, kind, active)
        return nodes if self.space.output == "concat" else nodes[:, -self.channels :]

    def _active(self, gates: Gates, kind: int) -> list[tuple[int, int]]:
        """The (edge, op) that run, grouped by node."""
        chosen = None if gates.active is None else gates.active[kind].tolist()
        return [
            (e, o)
            for e, ops in enumerate(self.edges)
            for o, op in enumerate(cast(nn.ModuleList, ops))
            if not isinstance(op, Zero) and (chosen is None or chosen[e][o])
        ]

    def _plain(
        self, states: list[Tensor], gates: Gates, kind: int, active: list[tuple[int, int]]
    ) -> Tensor:
        """State by state: one ReLU for all ops that leave it, and equal ops once."""
        inputs, last = self.space.inputs, self.space.inputs + self.space.nodes - 1
        entered: list[Tensor] = []
        sums: list[Tensor | None] = [None] * self.space.nodes
        for source in range(last + 1):
            if source >= inputs:
                node = source - inputs
                total = sums[node]
                total = self.zero(entered[0]) if total is None else total
                states.append(self.passage.leave(total, states, gates, kind, node))
            if source < last:
                entered.append(self.passage.enter(states[source], source))
            leaving = [(e, o) for e, o in active if self.space.edges[e][0] == source]
            activated = torch.relu(entered[source]) if leaving else None
            shared: dict[int, Tensor] = {}
            for e, o in leaving:
                op: Any = self.edges[e][o]  # type: ignore[index]
                y = shared.get(o)
                if y is None:
                    y = op.normalise(op.body(activated if op.relu else entered[source]))
                    if self.form.share_ops or next(op.parameters(), None) is None:
                        shared[o] = y
                n = self.space.edges[e][1] - inputs
                sums[n] = gates.add(sums[n], y, kind, e, o)
        return torch.cat(states[inputs:], dim=1)

    def _fused(
        self, states: list[Tensor], gates: Gates, kind: int, active: list[tuple[int, int]]
    ) -> Tensor:
        edges, choices = (torch.tensor(index) for index in zip(*active, strict=True))
        weight, slope = gates.multipliers(kind, edges, choices, states[0].shape[1])
        return fused.mixed_cell(self._plan(tuple(active)), states, weight, slope)

    def _plan(self, active: tuple[tuple[int, int], ...]) -> CellPlan:
        """The plan of the last set of active ops is kept: most searches have but one."""
        ops: list[Any] = [self.edges[e][o] for e, o in active]  # type: ignore[index]
        key = active, ops
        if self._last_plan is None or self._last_plan[0] != key:
            inputs = self.space.inputs
            places = [self.space.edges[e] for e, _ in active]
            terms = [
                Term(source, target - inputs, op)
                for (source, target), op in zip(places, ops, strict=True)
            ]
            stride = 2 if self.reduction else 1
            self._last_plan = key, CellPlan(terms, inputs, self.space.nodes, stride)
        return self._last_plan[1]


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
            in_channels,
            channels,
            halve_first=halve_first,
            searching=searching,
            inputs=cell.inputs,
            one_bit=cell.one_bit,
        )
        self.edges = nn.ModuleList(
            build_op(
                edge.op,
                channels,
                _stride(edge.source, cell.inputs, reduction),
                searching,
                cell.one_bit,
                cell.own,
            )
            for node in cell.nodes
            for edge in node
        )
        self.zero = Zero(_stride(0, cell.inputs, reduction))
        self.channels, self.reduction = channels, reduction
        self.out_channels = len(cell.outputs) * channels

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Map (B, C0, H0, W0) and (B, C1, H, W) to the concatenated nodes, or to the last one."""
        if found.fits(self._plan, s1):
            return found.found_cell(self._plan, [s1] if self.inputs.single else [s0, s1])
        return self._plain(s0, s1)

    def _plain(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = self.inputs(s0, s1)
        ops: Any = iter(self.edges)
        for node in self.cell.nodes:
            arriving = [next(ops)(states[edge.source]) for edge in node]
            states.append(_sum(arriving) if arriving else self.zero(states[0]))
        kept = [states[self.cell.inputs + node] for node in self.cell.outputs]
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

    @functools.cached_property
    def _plan(self) -> FoundPlan:
        plan = FoundPlan(self.inputs.in_channels, self.channels)
        states = self.inputs.lead_into(plan)
        nodes = [plan.state() for _ in self.cell.nodes]
        states += nodes
        ops = iter(self.edges)
        for node, target in zip(self.cell.nodes, nodes, strict=True):
            for edge in node:
                stride = _stride(edge.source, self.cell.inputs, self.reduction)
                plan.add(next(ops), states[edge.source], target, stride)
            if not node:
                stride = _stride(0, self.cell.inputs, self.reduction)
                plan.add(self.zero, states[0], target, stride)
        plan.finish(nodes, [nodes[output] for output in self.cell.outputs])
        return plan


def _stride(source: int, inputs: int, reduction: bool) -> int:
    """Reduction cells halve the resolution on the edges that leave their inputs."""
    return 2 if reduction and source < inputs else 1


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
