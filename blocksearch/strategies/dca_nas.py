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

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from blocksearch.engine import (
    AlphaStep,
    Batch,
    Cells,
    SearchSetup,
    StrategyConfig,
    WeightStep,
    frozen,
    new_alphas,
)
from blocksearch.forms import Form
from blocksearch.relaxation import Gates, derive_strongest, one_hot_gates
from blocksearch.space import SearchSpace
from blocksearch.supernet import Supernet
from evaluation.errors import InputError

SETTLED_STEPS = 10  # a set of transit cells that stands so long is worth a capture
ROUNDING = (0.0, 1e-6, 1e-4)  # by how much a limit shrinks if the solver's tolerance broke it


class Budget:
    """A limit on an additive cost, and the price of going over it in the search.

    Parameters, multiply-adds or the latency of an additive model: what a network costs is a fixed
    part plus the costs of its ops.

    Attributes:
        costs: Cost of each op on each edge, over all cells of a kind, (K, E, O) float64.
        fixed: What every network costs besides.
        limit: Most that a derived network may cost, K_d.
        search_limit: Most that the relaxed network should cost in the search, K'.
        rate: Step size eta of the dual ascent.
        damping: By how much the price in force exceeds lambda, per unit of F / K' - 1.
        price: Lagrange multiplier lambda >= 0 of F / K' - 1, a float64 scalar.

    Raises:
        ValueError: If K' is not positive.
    """

    def __init__(
        self,
        costs: Tensor,
        fixed: float,
        limit: float,
        *,
        search_limit: float | None = None,
        rate: float = 0.05,
        damping: float = 10.0,
    ):
        self.costs = costs.double()
        self.fixed = fixed
        self.limit = limit
        self.search_limit = limit if search_limit is None else search_limit
        if self.search_limit <= 0:
            raise ValueError(f"a budget must be positive, got {self.search_limit}")
        self.rate = rate
        self.damping = damping
        self.price = torch.zeros((), dtype=torch.float64, device=costs.device)

    def expected(self, probabilities: Tensor) -> Tensor:
        """Return F, a float64 scalar: the exact cost where probabilities (K, E, O) are one-hot."""
        return self.fixed + (probabilities.double() * self.costs).sum()

    def excess(self, probabilities: Tensor) -> Tensor:
        """Return F / K' - 1, positive where the constraint is broken."""
        return self.expected(probabilities) / self.search_limit - 1

    def penalty(self, probabilities: Tensor) -> Tensor:
        """Return what the Lagrangian adds to the loss: the price in force times F / K' - 1."""
        excess = self.excess(probabilities)
        in_force = (self.price + self.damping * excess.detach()).clamp(min=0)
        return in_force * excess

    @torch.no_grad()
    def ascend(self, probabilities: Tensor) -> None:
        """Raise lambda while F is over K', else lower it, to zero at the least."""
        self.price.add_(self.rate * self.excess(probabilities)).clamp_(min=0)

    def cost(self, cells: Cells, space: SearchSpace) -> float:
        """Return what the network of derived cells, one per kind, costs."""
        return float(self.expected(one_hot_gates(cells, space).weight.to(self.costs.device)))


def most_probable_cells(
    log_probabilities: Tensor, budgets: Sequence[Budget], kinds: Sequence[str], space: SearchSpace
) -> Cells | None:
    """Return the cells with the largest sum of log probabilities within every budget.

    An integer program, solved to its optimum: one op at most on an edge, and as many edges into a
    node as the derivation of DARTS keeps; in a dense space one op on every edge, not all `none`.
    Without budgets the result is that of `derive_strongest`.

    Args:
        log_probabilities: (K, E, O).
        budgets: Limits of the network that the cells make; their costs may be negative.
        kinds: Names of the K kinds.
        space: The space whose edges and ops the axes are.

    Returns:
        One cell per kind; None if no cells keep the budgets.
    """
    shape = tuple(log_probabilities.shape)
    values = log_probabilities.double().cpu().clamp(min=-1e4).numpy()  # -inf is no number to HiGHS
    rules = list(_rules(shape, space))
    allowed = np.ones(shape)
    if "none" in space.ops and not space.dense:
        allowed[:, :, space.ops.index("none")] = 0
    for margin in ROUNDING:
        limits = [
            LinearConstraint(
                budget.costs.cpu().numpy().ravel(), ub=budget.limit * (1 - margin) - budget.fixed
            )
            for budget in budgets
        ]
        solution = milp(
            -values.ravel(),
            integrality=np.ones(values.size),
            bounds=Bounds(0, allowed.ravel()),
            constraints=[*rules, *limits],
            options={"mip_rel_gap": 0},
        )
        if solution.x is None:
            return None
        chosen = torch.from_numpy(solution.x.round().reshape(shape))
        cells = {kind: derive_strongest(chosen[k], space) for k, kind in enumerate(kinds)}
        if all(budget.cost(cells, space) <= budget.limit for budget in budgets):
            return cells
    return None


def _rules(shape: tuple[int, ...], space: SearchSpace) -> Iterator[LinearConstraint]:
    """What makes a choice of ops, as numbers 0 and 1 of this shape (K, E, O), a cell per kind."""
    for kind in range(shape[0]):
        for edge in range(shape[1]):
            row = np.zeros(shape)
            row[kind, edge] = 1
            yield LinearConstraint(row.ravel(), lb=1 if space.dense else 0, ub=1)
        useful = np.array([op != "none" for op in space.ops])
        if space.dense:
            row = np.zeros(shape)
            row[kind, :, useful] = 1
            yield LinearConstraint(row.ravel(), lb=1)
            continue
        targets = np.array([target for _, target in space.edges])
        for target in range(space.inputs, space.inputs + space.nodes):
            row = np.zeros(shape)
            row[kind, targets == target] = 1
            kept = min(space.edges_per_node, target)
            yield LinearConstraint(row.ravel(), lb=kept, ub=kept)


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


class DcaNasConfig(StrategyConfig):
    """The budget, how the supernet is made light, and Adam on the alphas."""

    max_params: int | None = Field(default=None, ge=1)
    max_flops: int | None = Field(default=None, ge=1)
    search_budget: float = Field(default=1.0, gt=0)
    price_learning_rate: float = Field(default=0.05, gt=0)
    damping: float = Field(default=10.0, ge=0)
    bottleneck: int = Field(default=4, ge=1)
    transit: bool = True
    alpha_learning_rate: float = Field(default=6e-4, gt=0)
    alpha_weight_decay: float = Field(default=1e-3, ge=0)
    alpha_beta1: float = Field(default=0.5, ge=0, lt=1)
    alpha_beta2: float = Field(default=0.999, ge=0, lt=1)


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
        adam = torch.optim.Adam(
            [self.alphas],
            lr=config.alpha_learning_rate,
            betas=(config.alpha_beta1, config.alpha_beta2),
            weight_decay=config.alpha_weight_decay,
            fused=True,
            capturable=True,
        )
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
        return self.transit.follow(self._strongest(self.alphas.detach().cpu()))

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
