"""PC-DARTS: partial channels. Xu et al., 2020. https://arxiv.org/abs/1907.05737.

One part of the channels goes through the ops of an edge, the others around them, so that a search
takes less memory and ops without weights have less of an advantage. Alphas that see a part of the
channels alone are unsteady, so every edge has a logit beta of its own: a node sums its edges
weighted by the softmax of their betas, and betas decide with the alphas which edges a found cell
keeps. Alphas and betas rest in the first part of the search. Defaults are those of the released
code, where that part is 15 of 50 epochs. What becomes of the channels is in `forms.Partial`.
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
from blocksearch.relaxation import Gates, derive_strongest
from blocksearch.supernet.forms import Form


class PcDartsConfig(AdamConfig):
    """The part of the channels, the rest of the logits, and Adam on them."""

    partial: int = Field(default=4, ge=1, le=64)
    warmup: float = Field(default=0.3, ge=0, lt=1)


class PcDarts:
    """Alternates one Adam step on alphas and betas with one SGD step on the weights.

    Attributes:
        alphas: Logits of the ops, (K, E, O).
        betas: Logits of the edges, (K, E).
    """

    Config: ClassVar[type[StrategyConfig]] = PcDartsConfig

    def __init__(self, setup: SearchSetup, config: PcDartsConfig, generator: torch.Generator):
        self.supernet = setup.supernet(Form(partial=config.partial))
        self.config = config
        self.alphas = new_alphas(self.supernet, generator)
        noise = torch.randn(self.alphas.shape[:-1], generator=generator)
        self.betas = (1e-3 * noise).to(self.alphas.device).requires_grad_()
        self.optimizer = config.adam(self.architecture())
        self.weight_step = WeightStep(self.supernet, setup.weights)
        self.warm = False

    def schedule(self, progress: float) -> str:
        """Set the learning rate of the weights; alphas and betas rest in the warm-up."""
        self.weight_step.schedule(progress)
        self.warm = progress >= self.config.warmup
        return "both" if self.warm else "weights"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """After the warm-up, descend L_val in alphas and betas; then L_train in the weights."""
        scalars = {}
        if self.warm:
            images, labels = valid
            with frozen(self.supernet):
                logits = self.supernet(images, self.gates())
                valid_loss = nn.functional.cross_entropy(logits, labels)
                slopes = torch.autograd.grad(valid_loss, self.architecture())
            self.alphas.grad, self.betas.grad = slopes
            self.optimizer.step()
            scalars["valid_loss"] = valid_loss.detach()
        with torch.no_grad():
            gates = self.gates()
        return {"train_loss": self.weight_step(gates, train)} | scalars

    def gates(self) -> Gates:
        """Return beta_e softmax(alpha_e) for the ops, beta_e for the channels around them."""
        edges = self.edge_weights()
        return Gates(edges[..., None] * torch.softmax(self.alphas, dim=-1), bypass=edges)

    def edge_weights(self) -> Tensor:
        """Return the softmax of the betas over the edges into each node, (K, E)."""
        space = self.supernet.space
        by_node = torch.split(self.betas, [space.inputs + n for n in range(space.nodes)], dim=-1)
        return torch.cat([torch.softmax(betas, dim=-1) for betas in by_node], dim=-1)

    def architecture(self) -> list[Tensor]:
        """Return the alphas, (K, E, O), and the betas, (K, E)."""
        return [self.alphas, self.betas]

    def derive(self) -> list[Cells]:
        """Keep the strongest edges of every node by the products of edge weight and probability.

        In a dense space, where every edge stays, the betas have no say.
        """
        with torch.no_grad():
            p = self.gates().weight
        kinds, space = self.supernet.kinds, self.supernet.space
        return [{kind: derive_strongest(p[k], space) for k, kind in enumerate(kinds)}]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, betas, weights and both optimizers."""
        return {
            "logits": [logits.detach().clone() for logits in self.architecture()],
            "optimizer": self.optimizer.state_dict(),
            "weights": self.weight_step.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for mine, given in zip(self.architecture(), state["logits"], strict=True):
            mine.data.copy_(given)
        self.optimizer.load_state_dict(state["optimizer"])
        self.weight_step.load_state_dict(state["weights"])
