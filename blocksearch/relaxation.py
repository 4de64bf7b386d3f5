"""Gates, and the maps alphas -> gates (a relaxation) and probabilities -> Cell (a derivation)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocksearch.space import Cell, Edge, SearchSpace


@dataclass(frozen=True)
class Gates:
    """What a strategy hands to the supernet.

    Attributes:
        weight: Multiplier of every op's output, (K, E, O).
        active: Which ops run at all, (K, E, O) bool on the CPU; None runs every op.
        bypass: Multiplier of an edge's channels that go around its ops, (K, E); asked for by a
            supernet whose ops work on a part of the channels only.
        channels: Width masks: multipliers of G equal groups of an edge's channels, (K, E, G), in
            the order of the channels; a cell's width must be a multiple of G. None leaves all
            channels as they are.
        scale_gradient: Whether the gradient into an op is scaled by its gate, as the chain rule
            asks; False passes it on unscaled (by `weight`; masks scale it always).
    """

    weight: Tensor
    active: Tensor | None = None
    channels: Tensor | None = None
    bypass: Tensor | None = None
    scale_gradient: bool = True

    def multipliers(
        self, kind: int, edges: Tensor, choices: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return what multiplies the outputs of some ops, and the gradients into them.

        Args:
            kind: The cell kind.
            edges: Edge of each op, (T,).
            choices: Which op it is, (T,).
            width: Channels C of the cell.

        Returns:
            Two tensors (T, C).
        """
        weight = self.weight[kind, edges, choices][:, None].expand(-1, width)
        mask = torch.ones_like(weight)
        if self.channels is not None:
            mask = self._per_channel(self.channels[kind, edges], width)
            weight = weight * mask
        return weight, weight if self.scale_gradient else mask

    @staticmethod
    def _per_channel(masks: Tensor, width: int) -> Tensor:
        groups = masks.shape[-1]
        if width % groups:
            raise ValueError(f"the width must be a multiple of the {groups} masks, got {width}")
        return masks.repeat_interleave(width // groups, dim=-1)

    def add(self, total: Tensor | None, output: Tensor, kind: int, edge: int, op: int) -> Tensor:
        """Return `total` plus the gated output (B, C, H, W) of one op; None is a total of zero."""
        weight = self.weight[kind, edge, op]
        mask = None
        if self.channels is not None:
            mask = self._per_channel(self.channels[kind, edge], output.shape[1])[:, None, None]
        if not self.scale_gradient:
            # value of weight * output, gradient of output
            output = weight * output.detach() + output - output.detach()
            weight = torch.ones_like(weight)
        if mask is not None:
            weight = weight * mask
        return weight * output if total is None else torch.addcmul(total, weight, output)


class EnhancedSoftmax(torch.autograd.Function):
    """Softmax over the last axis whose gradient does not fade with the probability.

    Our reconstruction of the "enhanced gradient" of EG-DARTS (Zhang et al. 2021,
    https://arxiv.org/abs/2103.12529), of which we could read the abstract only. With
    u = dL/dp and ubar = sum_j p_j u_j, the ordinary gradient p_k (u_k - ubar) / tau becomes
    p_k^(1 - gamma) (u_k - ubar) / tau. gamma = 0 is the ordinary softmax; gamma = 1 is the natural
    gradient of the categorical distribution, up to a constant that softmax ignores.
    """

    @staticmethod
    def forward(
        ctx: Any, alphas: Tensor, tau: float | Tensor, gamma: float, match_norm: bool
    ) -> Tensor:
        """Return softmax(alphas / tau)."""
        p = torch.softmax(alphas / tau, dim=-1)
        ctx.save_for_backward(p)
        ctx.tau, ctx.gamma, ctx.match_norm = tau, gamma, match_norm
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the enhanced gradient on the alphas."""
        (p,) = ctx.saved_tensors
        u = grads[0]
        centred = (u - (p * u).sum(dim=-1, keepdim=True)) / ctx.tau
        enhanced = p.pow(1.0 - ctx.gamma) * centred
        if ctx.match_norm:
            vanilla = (p * centred).norm(dim=-1, keepdim=True)
            enhanced = enhanced * vanilla / (enhanced.norm(dim=-1, keepdim=True) + 1e-12)
        return enhanced, None, None, None


def enhanced_softmax(
    alphas: Tensor, *, tau: float | Tensor = 1.0, gamma: float = 1.0, match_norm: bool = False
) -> Tensor:
    """Return op probabilities softmax(alphas / tau) with the enhanced gradient.

    Args:
        alphas: Architecture logits, (..., O).
        tau: Temperature, > 0; a tensor where it changes while a GPU replays steps.
        gamma: 0 for the ordinary gradient, 1 for the natural one, anything between.
        match_norm: Scale each edge's gradient to the norm of the ordinary one.

    Raises:
        ValueError: If tau or gamma is out of range.
    """
    # A look at a tensor would make the GPU wait.
    if (not isinstance(tau, Tensor) and tau <= 0) or not 0 <= gamma <= 1:
        raise ValueError(f"tau must be > 0 and gamma in [0, 1], got {tau} and {gamma}")
    probabilities: Tensor = EnhancedSoftmax.apply(alphas, tau, gamma, match_norm)
    return probabilities


def expected_cost(probabilities: Tensor, op_costs: Tensor) -> Tensor:
    """Return the expected cost of a cell as a share of its dearest choice, in [0, 1].

    sum_e sum_k p_ek c_ek / sum_e max_k c_ek, where the sums over e run over all cell kinds too.

    Args:
        probabilities: (K, E, O), each edge summing to 1.
        op_costs: Cost of each op on each edge, (K, E, O), >= 0.
    """
    return (probabilities * op_costs).sum() / op_costs.amax(dim=-1).sum().clamp_min(1e-12)


def derive_strongest(probabilities: Tensor, space: SearchSpace) -> Cell:
    """Return the cell that keeps, per node, its strongest edges (the DARTS rule).

    In a dense space every edge keeps its most probable op, which may be `none`.

    The strength of an edge is the largest probability among its ops other than `none`; a node keeps
    the `edges_per_node` strongest, each with that op. Ties go to the earlier edge and op.

    Args:
        probabilities: Of one cell kind, (E, O).
        space: The space whose edges and ops the axes are.
    """
    if space.dense:
        return derive_dense(probabilities, space)
    allowed = _without_none(probabilities, space)
    strength, choice = allowed.max(dim=-1)
    nodes = []
    for incoming in _edges_by_node(space):
        kept = sorted(incoming, key=lambda e: -float(strength[e]))[: space.edges_per_node]
        nodes.append(_edges(sorted(kept), choice, space))
    return space.cell(nodes)


def derive_dense(probabilities: Tensor, space: SearchSpace) -> Cell:
    """Return the cell with the most probable op on every edge, `none` among the choices.

    Where that would leave no edge at all, the single most probable op other than `none` stays.

    Args:
        probabilities: Of one cell kind, (E, O).
        space: A dense space.
    """
    choice = probabilities.detach().float().cpu().argmax(dim=-1)
    if all(space.ops[int(op)] == "none" for op in choice):
        edge, op = divmod(int(_without_none(probabilities, space).argmax()), len(space.ops))
        choice[edge] = op
    return space.cell(
        tuple(edge for edge in _edges(incoming, choice, space) if edge.op != "none")
        for incoming in _edges_by_node(space)
    )


def derive_sparse(probabilities: Tensor, space: SearchSpace) -> Cell:
    """Return a lighter cell: an edge stays only where it beats `none` and uniform chance.

    Of the `edges_per_node` strongest edges of a node, those remain whose best op is not `none` and
    has a probability above 1 / O; the strongest always remains. In a dense space an edge
    is left out by its own choice of `none`.
    """
    if space.dense:
        return derive_dense(probabilities, space)
    allowed = _without_none(probabilities, space)
    strength, choice = allowed.max(dim=-1)
    chance = 1.0 / len(space.ops)
    nodes = []
    for incoming in _edges_by_node(space):
        kept = sorted(incoming, key=lambda e: -float(strength[e]))[: space.edges_per_node]
        convincing = [
            e
            for e in kept[1:]
            if float(strength[e]) > chance and strength[e] >= probabilities[e].max()
        ]
        nodes.append(_edges(sorted([kept[0], *convincing]), choice, space))
    return space.cell(nodes)


DERIVATIONS = {"strongest": derive_strongest, "sparse": derive_sparse}


def one_hot_gates(cells: dict[str, Cell], space: SearchSpace) -> Gates:
    """Return the gates that make the supernet compute exactly these cells, one per kind."""
    weight = torch.zeros(len(cells), len(space.edges), len(space.ops))
    for kind, cell in enumerate(cells.values()):
        space.check(cell)
        for index, node in enumerate(cell.nodes):
            for edge in node:
                position = space.edges.index((edge.source, space.inputs + index))
                weight[kind, position, space.ops.index(edge.op)] = 1.0
    return Gates(weight, weight > 0, bypass=weight.amax(dim=-1))


def _without_none(probabilities: Tensor, space: SearchSpace) -> Tensor:
    allowed = probabilities.detach().float().cpu().clone()
    if "none" in space.ops:
        allowed[:, space.ops.index("none")] = -torch.inf
    return allowed


def _edges_by_node(space: SearchSpace) -> list[list[int]]:
    """Positions in `space.edges` of the edges into each node."""
    return [
        [e for e, (_, target) in enumerate(space.edges) if target == space.inputs + node]
        for node in range(space.nodes)
    ]


def _edges(positions: list[int], choice: Tensor, space: SearchSpace) -> tuple[Edge, ...]:
    return tuple(Edge(space.edges[e][0], space.ops[int(choice[e])]) for e in positions)
