"""DCA-NAS: a device's budget as a constraint. Dutta, Kanvar, Agarwal, 2023.

https://arxiv.org/abs/2307.04443. The search minimises the validation loss under F(alpha) <= K',
where F is the cost of the network whose every edge runs each op with its probability. Dual ascent
finds the price of the constraint, so that nobody tunes a weight between loss and cost. Three things
make it cheap: all edges that leave a state share their ops, the ops work on few channels between
1x1 convolutions, and only the first cell of each kind is a mixture (the engine); the others run
the cell that the mixture stands for at that moment (transit cells, as in EnTranNAS).

The text of the paper is public, its formulas are not readable: **F, the two updates and their rates
are our reconstruction** from the text. So are the bottleneck's ratio and the choice of the engine
cells; the optimizer of the alphas is that of PC-DARTS, https://arxiv.org/abs/1907.05737. Descent
and ascent alone circle around the constraint and stop where the softmax saturates, over the budget
by up to a tenth (measured in tests/test_dca_nas.py); `damping`, ours too, ends that. It is zero on
the constraint and hence no trade-off either.

F sums over all edges of a cell, also over those that a derived cell leaves out, since every edge
runs during the search: where a cell keeps all its edges, F at one-hot probabilities is the exact
cost of the network; where it keeps two edges per node, F is an upper estimate. That gap is what
`lookup_graph.LookupGraph` measures, and `search_budget` closes. Beyond the paper, the derived
network keeps the budget whatever the gap: where the strongest cells are too dear, the most probable
cells that are not take their place, by an exact integer program.
"""

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from blocksearch.engine import (
    AdamConfig,
    AlphaStep,
    Batch,
    Cells,
    SearchSetup,
    StrategyConfig,
    WeightStep,
    frozen,
    new_alphas,
)
from blocksearch.relaxation import Gates, derive_strongest, one_hot_gates
from blocksearch.strategies.budget import Budget, most_probable_cells
from blocksearch.supernet.forms import Form
from blocksearch.supernet.supernet import Supernet
from evaluation.errors import InputError
from evaluation.files.bounded import MAX_COUNT, MAX_NUMBER

SETTLED_STEPS = 10  # a set of transit cells that stands so long is worth a capture


class Transit:
    """Which cells of a supernet are mixtures, and which only run the cell found so far.

    The first cell of each kind is a mixture (the engine), the others are transit cells.

    Attributes:
        any: Whether there are transit cells at all.
    """

    def __init__(self, supernet: Supernet, device: torch.device):
        kinds = [supernet.kind_of_cell[position] for position in supernet.searched]
        engine = [kind not in kinds[:row] for row, kind in enumerate(kinds)]
        self.any = not all(engine)
        self.space = supernet.space
        self.kinds = torch.tensor(kinds, device=device)
        self.engine = torch.tensor(engine, device=device)[:, None, None]
        shape = len(kinds), len(self.space.edges), len(self.space.ops)
        self.chosen = torch.zeros(shape, device=device)  # stays in its place for replayed steps
        self.active = torch.ones(shape, dtype=torch.bool)
        self.cells: Cells | None = None
        self.age = 0

    def follow(self, cells: Cells) -> Hashable:
        """Let the transit cells run `cells`; name them, or return None while they are new."""
        self.age += 1
        if cells != self.cells:
            self.cells, self.age = dict(cells), 0
            chosen = one_hot_gates(cells, self.space).weight[self.kinds.cpu()]
            self.chosen.copy_(chosen)
            self.active = self.engine.cpu() | (chosen > 0)
        return tuple(cells.values()) if self.age >= SETTLED_STEPS else None

    def gates(self, p: Tensor) -> Gates:
        """Return gates of every searched cell, (L, E, O), from probabilities (K, E, O)."""
        weight = torch.where(self.engine, p.index_select(0, self.kinds), self.chosen)
        return Gates(weight, self.active)


class DcaNasConfig(AdamConfig):
    """The budget, how the supernet is made light, and Adam on the alphas."""

    max_params: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    max_flops: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    search_budget: float = Field(default=1.0, gt=0, le=MAX_NUMBER)
    price_learning_rate: float = Field(default=0.05, gt=0, le=MAX_NUMBER)
    damping: float = Field(default=10.0, ge=0, le=MAX_NUMBER)
    bottleneck: int = Field(default=4, ge=1, le=64)
    transit: bool = True


class DcaNas:
    """Alternates Adam on the alphas, dual ascent on the prices, and SGD on the weights.

    Attributes:
        budgets: By what they count, `params` or `flops`; empty without a budget.
        fallback: Cells that keep every budget.
    """

    Config: ClassVar[type[StrategyConfig]] = DcaNasConfig

    def __init__(self, setup: SearchSetup, config: DcaNasConfig, generator: torch.Generator):
        self.supernet = setup.supernet(Form(share_ops=True, bottleneck=config.bottleneck))
        self.alphas = new_alphas(self.supernet, generator)
        adam = config.adam([self.alphas])
        self.alpha_step = AlphaStep(self.alphas, adam)
        self.weight_step = WeightStep(self.supernet, setup.weights)
        self.budgets = self._budgets(config)
        self.fallback = self._fallback()
        transit = Transit(self.supernet, self.alphas.device)
        self.transit = transit if config.transit and transit.any else None

    def _budgets(self, config: DcaNasConfig) -> dict[str, Budget]:
        limits = {"params": config.max_params, "flops": config.max_flops}
        budgets = {}
        for count, limit in limits.items():
            if limit is None:
                continue
            costs = self.supernet.op_costs(count)
            cells = self._cheapest(costs)
            whole = self.supernet.found(cells).cost().count(count)
            chosen = one_hot_gates(cells, self.supernet.space).weight
            budgets[count] = Budget(
                costs.to(self.alphas.device),
                whole - float((costs * chosen).sum()),
                limit,
                search_limit=config.search_budget * limit,
                rate=config.price_learning_rate,
                damping=config.damping,
            )
        return budgets

    def _cheapest(self, costs: Tensor) -> Cells:
        """The cells whose kept edges cost least."""
        distinct, rank = torch.unique(costs, return_inverse=True)
        strength = len(distinct) - rank  # small whole numbers, exact in every float
        return self._strongest(strength.double())

    def _strongest(self, p: Tensor) -> Cells:
        kinds, space = self.supernet.kinds, self.supernet.space
        return {kind: derive_strongest(p[k], space) for k, kind in enumerate(kinds)}

    def _fallback(self) -> Cells:
        """Cells that keep every budget, whatever the alphas."""
        if not self.budgets:
            return self._strongest(torch.zeros_like(self.alphas))
        for count, budget in self.budgets.items():
            cells = self._cheapest(budget.costs)
            if self._keeps(cells):
                return cells
            least = self.supernet.found(cells).cost().count(count)
            if least > budget.limit:
                raise InputError(
                    f"max_{count}: the smallest network here has {least} {count}, "
                    f"which is more than {budget.limit}"
                )
        affordable = self._affordable(torch.zeros_like(self.alphas))
        if affordable is None:
            raise InputError("max_params and max_flops: no network here keeps both")
        return affordable

    def _keeps(self, cells: Cells) -> bool:
        cost = self.supernet.found(cells).cost()
        return all(cost.count(count) <= one.limit for count, one in self.budgets.items())

    def _affordable(self, log_p: Tensor) -> Cells | None:
        kinds, space = self.supernet.kinds, self.supernet.space
        return most_probable_cells(log_p, list(self.budgets.values()), kinds, space)

    def schedule(self, progress: float) -> Hashable:
        """Set the learning rate of the weights and the transit cells; name the step by these.

        The strongest ops are read from the device here, the one synchronisation of a step. Transit
        cells that have just changed give a step without a name.
        """
        self.weight_step.schedule(progress)
        if self.transit is None:
            return "both"
        p = torch.softmax(self.alphas.detach(), dim=-1)
        return self.transit.follow(self._strongest(p.cpu()))

    def _gates(self, p: Tensor) -> Gates:
        return Gates(p) if self.transit is None else self.transit.gates(p)

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the Lagrangian in the alphas, ascend it in the prices, then train the weights."""
        images, labels = valid
        with frozen(self.supernet):
            p = torch.softmax(self.alphas, dim=-1)
            logits = self.supernet(images, self._gates(p))
            valid_loss = nn.functional.cross_entropy(logits, labels)
            loss = valid_loss
            for budget in self.budgets.values():
                loss = loss + budget.penalty(p)
            self.alpha_step(loss)
        p = torch.softmax(self.alphas.detach(), dim=-1)
        train_loss = self.weight_step(self._gates(p), train)
        scalars = {"train_loss": train_loss, "valid_loss": valid_loss.detach()}
        for count, budget in self.budgets.items():
            budget.ascend(p)
            scalars[f"expected_{count}"] = budget.expected(p)
            scalars[f"price_{count}"] = budget.price.clone()
        return scalars

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O)."""
        return [self.alphas]

    def derive(self) -> list[Cells]:
        """Return the strongest cells, or the most probable ones that keep every budget."""
        log_p = torch.log_softmax(self.alphas.detach().double(), dim=-1)
        cells = self._strongest(log_p.exp())
        if self._keeps(cells):
            return [cells]
        affordable = self._affordable(log_p)
        return [affordable or self.fallback]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, weights, both optimizers and the prices."""
        return {
            "alphas": self.alpha_step.state_dict(),
            "weights": self.weight_step.state_dict(),
            "prices": {count: budget.price.clone() for count, budget in self.budgets.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alpha_step.load_state_dict(state["alphas"])
        self.weight_step.load_state_dict(state["weights"])
        for count, price in state["prices"].items():
            self.budgets[count].price.copy_(price)
