"""EG-DARTS: enhanced gradient. Zhang, Hao, Gao, Tang, Wei, 2021. https://arxiv.org/abs/2103.12529.

Block search by a relaxation whose architecture gradient is enhanced, towards accurate blocks of low
complexity. Of the paper (also IEEE TNNLS 2023, https://doi.org/10.1109/TNNLS.2023.3235479) we could
read the abstract only: **the equations here are our reconstruction**. The forward pass is that of
DARTS; the gradient on the alphas loses the factor p^gamma that lets ordinary gradients fade (see
`relaxation.EnhancedSoftmax`); a complexity term presses towards cheap ops. With gamma = 0
and the term off, the gradient is that of DARTS.

SGD is the default on the alphas because Adam divides the enhancement out again: with it, a larger
gamma is slower, not faster (measured in tests/test_enhanced_gradient.py).

Other readings of "enhanced gradient", kept as switches to compare: `unscaled_weight_gradient` (op
weights receive the gradient without the factor p), `one_hot` (forward of the strongest op alone,
straight through), and a falling temperature `tau` to `tau_end` (with gamma = 0).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

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
from blocksearch.relaxation import DERIVATIONS, Gates, enhanced_softmax, expected_cost
from blocksearch.supernet.forms import PLAIN
from evaluation.files.bounded import MAX_NUMBER
from evaluation.training.optimizers import Adam, Sgd


class EnhancedGradientConfig(StrategyConfig):
    """gamma, the complexity term, and the optimizer of the alphas."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    match_norm: bool = False
    tau: float = Field(default=1.0, gt=0, le=MAX_NUMBER)
    tau_end: float = Field(default=1.0, gt=0, le=MAX_NUMBER)
    complexity_weight: float = Field(default=0.0, ge=0, le=MAX_NUMBER)
    warmup: float = Field(default=0.3, ge=0, lt=1)
    alpha_optimizer: Literal["sgd", "adam"] = "sgd"
    alpha_learning_rate: float = Field(default=0.5, gt=0, le=MAX_NUMBER)
    alpha_momentum: float = Field(default=0.0, ge=0, lt=1)
    alpha_weight_decay: float = Field(default=0.0, ge=0, le=MAX_NUMBER)
    derivation: Literal["strongest", "sparse"] = "strongest"
    unscaled_weight_gradient: bool = False
    one_hot: bool = False


class EnhancedGradient:
    """Alternates one step on the weights with one enhanced step on the alphas."""

    Config: ClassVar[type[StrategyConfig]] = EnhancedGradientConfig

    def __init__(
        self, setup: SearchSetup, config: EnhancedGradientConfig, generator: torch.Generator
    ):
        self.supernet = setup.supernet(PLAIN)
        self.op_costs = setup.op_costs(self.supernet)
        self.config = config
        self.alphas = new_alphas(self.supernet, generator)
        optimizer = ALPHA_OPTIMIZERS[config.alpha_optimizer](self.alphas, config)
        self.alpha_step = AlphaStep(self.alphas, optimizer)
        self.weight_step = WeightStep(self.supernet, setup.weights)
        self.tau = torch.full((), config.tau, device=self.alphas.device)
        self.warm = False

    def schedule(self, progress: float) -> str:
        """Set the learning rate of the weights and the temperature; alphas rest in the warm-up."""
        self.weight_step.schedule(progress)
        tau = self.config.tau * (self.config.tau_end / self.config.tau) ** progress
        self.tau.fill_(tau)
        self.warm = progress >= self.config.warmup
        return "both" if self.warm else "weights"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Descend the training loss in the weights; after the warm-up, L_arch in the alphas."""
        with torch.no_grad():
            gates = self._gates(self._probabilities())
        scalars = {"train_loss": self.weight_step(gates, train)}
        if self.warm:
            images, labels = valid
            with frozen(self.supernet):
                p = self._probabilities()
                logits = self.supernet(images, self._gates(p))
                valid_loss = nn.functional.cross_entropy(logits, labels)
                complexity = expected_cost(p, self.op_costs)
                self.alpha_step(valid_loss + self.config.complexity_weight * complexity)
            scalars |= {"valid_loss": valid_loss.detach(), "complexity": complexity.detach()}
        return scalars

    def _probabilities(self) -> Tensor:
        return enhanced_softmax(
            self.alphas, tau=self.tau, gamma=self.config.gamma, match_norm=self.config.match_norm
        )

    def _gates(self, p: Tensor) -> Gates:
        if not self.config.one_hot:
            return Gates(p, scale_gradient=not self.config.unscaled_weight_gradient)
        chosen = nn.functional.one_hot(p.argmax(dim=-1), p.shape[-1]).to(p.dtype)
        return Gates(chosen + p - p.detach(), scale_gradient=True)

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O)."""
        return [self.alphas]

    def derive(self) -> list[Cells]:
        """Return one cell per kind by the configured derivation."""
        p = torch.softmax(self.alphas.detach(), dim=-1)
        derive = DERIVATIONS[self.config.derivation]
        kinds, space = self.supernet.kinds, self.supernet.space
        return [{kind: derive(p[k], space) for k, kind in enumerate(kinds)}]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, weights and both optimizers."""
        return {"alphas": self.alpha_step.state_dict(), "weights": self.weight_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alpha_step.load_state_dict(state["alphas"])
        self.weight_step.load_state_dict(state["weights"])


def _sgd(alphas: Tensor, config: EnhancedGradientConfig) -> Sgd:
    return Sgd(
        [alphas],
        config.alpha_learning_rate,
        momentum=config.alpha_momentum,
        weight_decay=config.alpha_weight_decay,
    )


def _adam(alphas: Tensor, config: EnhancedGradientConfig) -> Adam:
    return Adam(
        [alphas],
        config.alpha_learning_rate,
        betas=(config.alpha_momentum, 0.999),
        weight_decay=config.alpha_weight_decay,
    )


ALPHA_OPTIMIZERS: dict[str, Callable[[Tensor, EnhancedGradientConfig], Sgd | Adam]] = {
    "sgd": _sgd,
    "adam": _adam,
}
