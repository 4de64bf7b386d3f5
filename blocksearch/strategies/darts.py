"""DARTS, first order. Liu, Simonyan, Yang, 2019. https://arxiv.org/abs/1806.09055.

Every edge computes a softmax-weighted sum of its ops; alphas descend the validation loss, weights
the training loss, in turns. The first-order form takes the weights as they are for optimal ones.
Defaults are those of the released code.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
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
from blocksearch.forms import PLAIN
from blocksearch.relaxation import Gates, derive_strongest


class DartsConfig(StrategyConfig):
    """Adam on the alphas."""

    alpha_learning_rate: float = Field(default=3e-4, gt=0)
    alpha_weight_decay: float = Field(default=1e-3, ge=0)
    alpha_beta1: float = Field(default=0.5, ge=0, lt=1)
    alpha_beta2: float = Field(default=0.999, ge=0, lt=1)


class Darts:
    """Alternates one Adam step on the alphas with one SGD step on the weights."""

    Config: ClassVar[type[StrategyConfig]] = DartsConfig

    def __init__(self, setup: SearchSetup, config: DartsConfig, generator: torch.Generator):
        self.supernet = setup.supernet(PLAIN)
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

    def schedule(self, progress: float) -> str:
        """Set the learning rate of the weights; every step is of one kind."""
        self.weight_step.schedule(progress)
        return "both"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the validation loss in the alphas, then the training loss in the weights."""
        images, labels = valid
        with frozen(self.supernet):
            gates = Gates(torch.softmax(self.alphas, dim=-1))
            valid_loss = nn.functional.cross_entropy(self.supernet(images, gates), labels)
            self.alpha_step(valid_loss)
        gates = Gates(torch.softmax(self.alphas.detach(), dim=-1))
        train_loss = self.weight_step(gates, train)
        return {"train_loss": train_loss, "valid_loss": valid_loss.detach()}

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O)."""
        return [self.alphas]

    def derive(self) -> list[Cells]:
        """Keep the two strongest edges of every node, each with its strongest op but `none`."""
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
