"""DLW-NAS: light-weight cells. Li, Mao, Zhang, Wang, Zhong, 2022.

https://doi.org/10.1007/s12559-022-10046-y. Light ops (the op set `light` of `blocksearch.ops`), an
objective that charges for parameters and multiply-adds, and a sparse topology instead of the two
edges per node of DARTS. Of the paper we could read the abstract, the start of the introduction and
the references only: **the equations here are our reconstruction**.

Every edge e has a gate beta_e >= 0 beside its op logits alpha_e, and hands on

    beta_e * sum_k softmax(alpha_e)_k o_k(x).

Alphas descend CE(valid) + params_weight * C_P + flops_weight * C_F by Adam, where C_P and C_F are
the expected parameters and multiply-adds over all edges, each divided by its value at uniform
alphas. Betas descend CE(valid) + edge_penalty * sum_e beta_e by proximal steps, which reach zero
exactly, after DSO-NAS (Zhang et al., 2018, https://arxiv.org/abs/1811.01567). Adam's settings and
the warm-up, in which both rest, are those of PC-DARTS; prices and gate settings are our own choice.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from blocksearch.engine import (
    AdamConfig,
    Batch,
    Cells,
    SearchSetup,
    StrategyConfig,
    WeightStep,
    frozen,
    new_alphas,
)
from blocksearch.relaxation import Gates
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.supernet.forms import PLAIN
from evaluation.files.bounded import MAX_NUMBER


class DlwNasConfig(AdamConfig):
    """Prices of parameters, multiply-adds and edges; Adam on the alphas, plain steps on betas."""

    # From 0.05 on, a price outweighs the accuracy before the weights know what an op is worth.
    params_weight: float = Field(default=0.02, ge=0, le=MAX_NUMBER)
    flops_weight: float = Field(default=0.02, ge=0, le=MAX_NUMBER)
    edge_penalty: float = Field(default=0.01, ge=0, le=MAX_NUMBER)
    edge_learning_rate: float = Field(default=0.05, gt=0, le=MAX_NUMBER)
    warmup: float = Field(default=0.3, ge=0, lt=1)


class ProximalStep:
    """beta <- max(0, beta - rate * (gradient + penalty)): descent on a loss plus an L1 term."""

    def __init__(self, betas: Tensor, rate: float, penalty: float):
        self.betas = betas
        self.rate = rate
        self.penalty = penalty

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> None:
        """Update the betas, all >= 0, in place.

        Args:
            gradient: Of the loss without the penalty, shaped as the betas.
        """
        self.betas.sub_(self.rate * (gradient + self.penalty)).clamp_(min=0)


class DlwNas:
    """Alternates one step on the weights with one on op logits and edge gates."""

    Config: ClassVar[type[StrategyConfig]] = DlwNasConfig

    def __init__(self, setup: SearchSetup, config: DlwNasConfig, generator: torch.Generator):
        self.supernet = setup.supernet(PLAIN)
        self.config = config
        self.params, self.flops = (
            relative_costs(setup.op_costs(self.supernet, count)) for count in ("params", "flops")
        )
        self.alphas = new_alphas(self.supernet, generator)
        self.betas = torch.ones_like(self.alphas[..., 0]).requires_grad_()
        self.adam = config.adam([self.alphas])
        self.edge_step = ProximalStep(self.betas, config.edge_learning_rate, config.edge_penalty)
        self.weight_step = WeightStep(self.supernet, setup.weights)
        self.warm = False

    def schedule(self, progress: float) -> str:
        """Set the learning rate of the weights; alphas and betas rest in the warm-up."""
        self.weight_step.schedule(progress)
        self.warm = progress >= self.config.warmup
        return "both" if self.warm else "weights"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the training loss in the weights; after the warm-up, the rest in the others."""
        with torch.no_grad():
            gates = self._gates(torch.softmax(self.alphas, dim=-1))
        scalars = {"train_loss": self.weight_step(gates, train)}
        return scalars | self._architecture_step(valid) if self.warm else scalars

    def _architecture_step(self, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        with frozen(self.supernet):
            p = torch.softmax(self.alphas, dim=-1)
            valid_loss = nn.functional.cross_entropy(self.supernet(images, self._gates(p)), labels)
            params, flops = (p * self.params).sum(), (p * self.flops).sum()
            price = self.config.params_weight * params + self.config.flops_weight * flops
            self.alphas.grad, slope = torch.autograd.grad(
                valid_loss + price, [self.alphas, self.betas]
            )
        self.adam.step()
        self.edge_step(slope)
        return {
            "valid_loss": valid_loss.detach(),
            "params": params.detach(),
            "flops": flops.detach(),
            "open_edges": (self.betas.detach() > 0).float().mean(),
        }

    def _gates(self, p: Tensor) -> Gates:
        return Gates(self.betas[..., None] * p)

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O), and the betas, (K, E)."""
        return [self.alphas, self.betas]

    def derive(self) -> list[Cells]:
        """Return one cell per kind, of the edges that are open: see `derive_open`."""
        p, kinds = torch.softmax(self.alphas.detach(), dim=-1), self.supernet.kinds
        space = self.supernet.space
        return [{kind: derive_open(p[k], self.betas[k], space) for k, kind in enumerate(kinds)}]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, betas, weights and both optimizers."""
        return {
            "alphas": self.alphas.detach().clone(),
            "betas": self.betas.detach().clone(),
            "adam": self.adam.state_dict(),
            "weights": self.weight_step.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alphas.data.copy_(state["alphas"])
        self.betas.data.copy_(state["betas"])
        self.adam.load_state_dict(state["adam"])
        self.weight_step.load_state_dict(state["weights"])


def relative_costs(op_costs: Tensor) -> Tensor:
    """Return costs (K, E, O) scaled so that their expectation under uniform p is 1."""
    return op_costs / op_costs.mean(dim=-1).sum().clamp_min(1e-12)


def derive_open(probabilities: Tensor, betas: Tensor, space: SearchSpace) -> Cell:
    """Return the cell of the open edges, zero to `edges_per_node` for every node.

    An edge is open where beta > 0, its most probable op is not `none`, and the state that it reads
    is not an empty node. The strongest by beta * p stay; ties go to the earlier edge and op. A node
    that no edge enters is empty; one that nothing reads is emptied. Where nothing would reach the
    cell's output, the strongest edge from an input stays.

    Our sketch of the method asked for an edge into every node and then removed unused nodes. As
    a cell that concatenates its nodes uses all of them, only a node without an edge can be unused
    there: so nodes may be without, and it is the cell as a whole that must keep one.

    Args:
        probabilities: Of one cell kind, (E, O).
        betas: Of the same, (E,), >= 0.
        space: The space whose edges and ops the axes are.
    """
    p, betas = probabilities.detach().float().cpu(), betas.detach().float().cpu()
    best, choice = p.max(dim=-1)
    strength = betas * best
    ops = [space.ops[int(op)] for op in choice]
    nodes: list[tuple[Edge, ...]] = []
    for target in range(space.inputs, space.inputs + space.nodes):
        is_open = [
            e
            for e, (source, to) in enumerate(space.edges)
            if to == target and betas[e] > 0 and ops[e] != "none"
            if source < space.inputs or nodes[source - space.inputs]
        ]
        kept = sorted(is_open, key=lambda e: -float(strength[e]))[: space.edges_per_node]
        nodes.append(tuple(Edge(space.edges[e][0], ops[e]) for e in sorted(kept)))
    first_output = 0 if space.output == "concat" else space.nodes - 1
    if not any(nodes[first_output:]):
        nodes = _one_edge(p, betas, space, first_output)
    if space.output == "last":
        nodes = _that_lead_to_the_last(nodes, space.inputs)
    return space.cell(nodes)


def _one_edge(
    p: Tensor, betas: Tensor, space: SearchSpace, first_output: int
) -> list[tuple[Edge, ...]]:
    """The strongest edge from an input to the output, `none` aside; of closed ones, by p alone."""
    useful = [o for o, op in enumerate(space.ops) if op != "none"]
    best, choice = p[:, useful].max(dim=-1)
    direct = [
        e
        for e, (source, target) in enumerate(space.edges)
        if source < space.inputs and target >= space.inputs + first_output
    ]
    e = max(direct, key=lambda e: (float(betas[e] * best[e]), float(best[e])))
    source, target = space.edges[e]
    edge = Edge(source, space.ops[useful[int(choice[e])]])
    return [(edge,) if space.inputs + node == target else () for node in range(space.nodes)]


def _that_lead_to_the_last(nodes: list[tuple[Edge, ...]], inputs: int) -> list[tuple[Edge, ...]]:
    used = {inputs + len(nodes) - 1}
    kept = list(nodes)
    for state in range(inputs + len(nodes) - 1, inputs - 1, -1):
        if state in used:
            used |= {edge.source for edge in kept[state - inputs]}
        else:
            kept[state - inputs] = ()
    return kept
