"""SGD and Adam: the fused steps of `torch.optim`, without its classes.

The first optimizer of a process imports `torch._dynamo`: 2.3 CPU seconds for every worker that
trains. The functions that the classes call do not, and compute the same.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer:
    """Updates weights from their gradients; those that have none rest.

    Attributes:
        weights: What it updates.
        rate: The learning rate; where it is a tensor, a captured step sees it move.
        state: Of every weight that has had a gradient, by name; zeros at first.
    """

    def __init__(self, weights: Iterable[Tensor], rate: Tensor | float):
        self.weights, self.rate = list(weights), rate
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for weight in self.weights:
            weight.grad = None

    def learning(self, *names: str) -> tuple[list[Tensor], ...]:
        """The weights that have a gradient, their gradients, and the state of each by name."""
        chosen = [weight for weight in self.weights if weight.grad is not None]
        for weight in chosen:
            for name in names:
                if name not in self.state[weight]:
                    self.state[weight][name] = self.start(name, weight)
        states = [[self.state[weight][name] for weight in chosen] for name in names]
        return chosen, [weight.grad for weight in chosen if weight.grad is not None], *states

    def start(self, name: str, weight: Tensor) -> Tensor:
        """What the state of a weight begins with."""
        return torch.zeros_like(weight, memory_format=torch.preserve_format)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the order of the weights."""
        return {"state": [dict(self.state[weight]) for weight in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a tensor that is there already is filled."""
        for weight, values in zip(self.weights, state["state"], strict=True):
            for name, value in values.items():
                if name in self.state[weight]:
                    self.state[weight][name].copy_(value)
                else:
                    self.state[weight][name] = value.to(weight.device, copy=True)


class Sgd(Optimizer):
    """SGD with momentum, which may be Nesterov's, and weight decay."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        rate: Tensor | float,
        *,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
    ):
        super().__init__(weights, rate)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights."""
        weights, gradients, *rest = self.learning(*(("momentum_buffer",) * bool(self.momentum)))
        if not weights:
            return
        momenta: list[Tensor | None] = [*rest[0]] if rest else [None] * len(weights)
        sgd(
            weights,
            gradients,
            momenta,
            fused=True,
            foreach=False,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.rate,
            dampening=0.0,
            nesterov=self.nesterov and self.momentum > 0,
            maximize=False,
        )


class Adam(Optimizer):
    """Adam, with weight decay as L2."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        rate: Tensor | float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        super().__init__(weights, rate)
        self.betas, self.weight_decay = betas, weight_decay

    def start(self, name: str, weight: Tensor) -> Tensor:
        """Zeros; the step is a number of its own."""
        if name == "step":
            return torch.zeros((), dtype=torch.float32, device=weight.device)
        return super().start(name, weight)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights."""
        weights, gradients, means, squares, steps = self.learning("exp_avg", "exp_avg_sq", "step")
        if not weights:
            return
        adam(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            foreach=False,
            capturable=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
