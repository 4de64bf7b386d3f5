"""DARTS, first and second order. Liu, Simonyan, Yang, 2019. https://arxiv.org/abs/1806.09055.

Every edge computes a softmax-weighted sum of its ops; alphas descend the validation loss, weights
the training loss, in turns. The first-order form takes the weights as they are for optimal ones.
The second-order form moves them first by one step of SGD on the training loss, which depends on
the alphas too: it descends L_val(w'(alpha), alpha), where
w' = w - xi (grad_w L_train(w, alpha) + momentum * buffer + weight_decay * w) and xi is the learning
rate of the weights. Defaults, and momentum and decay in w', are those of the released code, which
computes the second derivative by finite differences (`finite_difference`); `second` is exact.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

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
from blocksearch.kernels import compiled
from blocksearch.relaxation import Gates, derive_strongest
from blocksearch.supernet.forms import PLAIN
from evaluation.files.bounded import MAX_NUMBER

Weights = dict[str, Tensor]  # of a supernet, by their names in it
SHIFT = 0.01  # length of w+ - w, as in the paper


class DartsConfig(AdamConfig):
    """The order of the gradient on the alphas, and Adam on them.

    `finite_difference` is the second order as the paper computes it.
    """

    order: Literal["first", "second", "finite_difference"] = "first"
    alpha_learning_rate: float = Field(default=3e-4, gt=0, le=MAX_NUMBER)


class Darts:
    """Alternates one Adam step on the alphas with one SGD step on the weights."""

    Config: ClassVar[type[StrategyConfig]] = DartsConfig

    def __init__(self, setup: SearchSetup, config: DartsConfig, generator: torch.Generator):
        self.supernet = setup.supernet(PLAIN)
        self.alphas = new_alphas(self.supernet, generator)
        adam = config.adam([self.alphas])
        self.alpha_step = AlphaStep(self.alphas, adam)
        self.weight_step = WeightStep(self.supernet, setup.weights)
        self.alpha_gradient = {
            "first": self.first_order,
            "second": self.second_order,
            "finite_difference": self.finite_difference,
        }[config.order]

    def schedule(self, progress: float) -> str:
        """Set the learning rate of the weights; every step is of one kind."""
        self.weight_step.schedule(progress)
        return "both"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the validation loss in the alphas, then the training loss in the weights."""
        self.alphas.grad, valid_loss = self.alpha_gradient(train, valid)
        self.alpha_step.optimizer.step()
        gates = Gates(torch.softmax(self.alphas.detach(), dim=-1))
        train_loss = self.weight_step(gates, train)
        return {"train_loss": train_loss, "valid_loss": valid_loss}

    def first_order(self, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
        """Return the gradient of L_val(w, alpha) on the alphas, (K, E, O), and L_val."""
        with frozen(self.supernet):
            loss = self._loss(valid)
            return self._slope(loss), loss.detach()

    def second_order(self, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
        """Return the gradient of L_val(w'(alpha), alpha) on the alphas, (K, E, O), and L_val.

        By autograd through the step to w', whose whole graph it keeps.
        """
        with compiled.plain_path():
            loss = self._loss(valid, self._virtual_step(train, differentiable=True))
            return self._slope(loss), loss.detach()

    def finite_difference(self, train: Batch, valid: Batch) -> tuple[Tensor, Tensor]:
        """Return what `second_order` does, nearly, with the graph of one loss at a time.

        With v = grad_w' L_val and e = 0.01 / |v|, the second derivative times v is
        (grad_alpha L_train(w + e v, alpha) - grad_alpha L_train(w - e v, alpha)) / 2 e.
        """
        moved = {name: w.requires_grad_() for name, w in self._virtual_step(train).items()}
        loss = self._loss(valid, moved)
        slope, *direction = torch.autograd.grad(loss, [self.alphas, *moved.values()])
        epsilon = SHIFT / nn.utils.get_total_norm(direction).clamp_min(1e-12)

        def slope_at(shift: Tensor) -> Tensor:
            pairs = zip(self.supernet.named_parameters(), direction, strict=True)
            shifted = {name: weight.detach() + shift * v for (name, weight), v in pairs}
            return self._slope(self._loss(train, shifted))

        mixed = (slope_at(epsilon) - slope_at(-epsilon)) / (2 * epsilon)
        return slope - self.weight_step.rate * mixed, loss.detach()

    def _virtual_step(self, train: Batch, *, differentiable: bool = False) -> Weights:
        """Return w', which depends on the alphas if `differentiable`."""
        weights = dict(self.supernet.named_parameters())
        slopes = torch.autograd.grad(
            self._loss(train), list(weights.values()), create_graph=differentiable
        )
        config, state = self.weight_step.config, self.weight_step.optimizer.state
        moved = {}
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            change = slope + config.weight_decay * weight.detach()
            buffer = state.get(weight, {}).get("momentum_buffer")  # None without momentum
            if buffer is not None:
                change = change + config.momentum * buffer
            moved[name] = weight.detach() - self.weight_step.rate * change
        return moved

    def _loss(self, batch: Batch, weights: Weights | None = None) -> Tensor:
        """Return the cross-entropy under the alphas, with other weights than the supernet's own."""
        images, labels = batch
        gates = Gates(torch.softmax(self.alphas, dim=-1))
        logits = functional_call(self.supernet, weights or {}, (images, gates))
        return nn.functional.cross_entropy(logits, labels)

    def _slope(self, loss: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(loss, [self.alphas])
        return slope

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O)."""
        return [self.alphas]

    def derive(self) -> list[Cells]:
        """Keep the strongest edges of every node, each with its strongest op but `none`."""
        p = torch.softmax(self.alphas.detach(), dim=-1)
        kinds, space = self.supernet.kinds, self.supernet.space
        return [{kind: derive_strongest(p[k], space) for k, kind in enumerate(kinds)}]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, weights and both optimizers."""
        return {"alphas": self.alpha_step.state_dict(), "weights": self.weight_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alpha_step.load_state_dict(state["alphas"])
        self.weight_step.load_state_dict(state["weights"])
