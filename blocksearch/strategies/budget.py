"""Budget: a limit on an additive cost, kept in a search by dual ascent and in a cell exactly.

The constraint of DCA-NAS (`strategies/dca_nas.py`, which says what is reconstruction), for any cost
that adds up over ops: parameters, multiply-adds, the latency of an additive model.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blocksearch.engine import Cells
from blocksearch.relaxation import derive_strongest, one_hot_gates
from blocksearch.space import SearchSpace

Rule = tuple[NDArray[np.float64], float, float]  # row, and least and most of its product

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
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a second to import

    shape = tuple(log_probabilities.shape)
    values = log_probabilities.double().cpu().clamp(min=-1e4).numpy()  # -inf is no number to HiGHS
    rules = [LinearConstraint(*rule) for rule in _rules(shape, space)]
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


def _rules(shape: tuple[int, ...], space: SearchSpace) -> Iterator[Rule]:
    """What makes a choice of ops, numbers 0 and 1 of this shape (K, E, O), a cell per kind."""
    for kind in range(shape[0]):
        for edge in range(shape[1]):
            row = np.zeros(shape)
            row[kind, edge] = 1
            yield row.ravel(), 1 if space.dense else 0, 1
        useful = np.array([op != "none" for op in space.ops])
        if space.dense:
            row = np.zeros(shape)
            row[kind, :, useful] = 1
            yield row.ravel(), 1, np.inf
            continue
        targets = np.array([target for _, target in space.edges])
        for target in range(space.inputs, space.inputs + space.nodes):
            row = np.zeros(shape)
            row[kind, targets == target] = 1
            kept = min(space.edges_per_node, target)
            yield row.ravel(), kept, kept
