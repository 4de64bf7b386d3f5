"""DCP-NAS: a 1-bit child network searched under a real-valued parent.

Li et al., 2023, https://arxiv.org/abs/2306.15390. Parent and child are two supernets of one space
that hand their alphas to each other. In every step the parent learns first, as in DARTS; then the
child, whose convolutions are 1-bit, inherits the alphas and descends

    -G + lambda * D + mu * L_R,

where G = -KL(parent || child) of the class probabilities, D = || dG/dalpha - g ||^2 with the
parent's tangent direction g (the gradient of its log-likelihood by the same alphas), and L_R is the
reconstruction error of the 1-bit weights. The alphas descend the first two terms, the weights the
first and the last; then the parent inherits the child's alphas. "Decoupled optimisation" adds
eta * psi * alpha_before to an alpha after its step, with a learned psi >= 0, where the weights of
its op are large.

We read the objective in the authors' book (Binary Neural Networks, ch. 4.4). Our reconstruction
are: the exact form of G and D, what psi starts from and how fast it, the alphas and the child
learn, that weights are large above the median of their edge, and that L_R is a mean over weights: a
sum overrules the rest (measured: the training loss of the child then stays where it is).
"""

import warnings
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import forward_ad

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
from blocksearch.one_bit import OneBitConv2d
from blocksearch.relaxation import Gates, derive_strongest
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet
from evaluation.files.bounded import MAX_NUMBER
from evaluation.training.loop import cosine
from evaluation.training.optimizers import Adam

Hessian = Literal["exact", "fisher"]


class DcpNasConfig(AdamConfig):
    """Weights of the two extra terms, the decoupled update, and Adam on the alphas.

    Attributes:
        tangent_weight: lambda.
        reconstruction_weight: mu.
        hessian: `exact` derives G twice; `fisher` puts gradients of single images in its place.
        decoupled: Whether alphas are pulled by eta * psi * alpha_before.
        child_learning_rate: Of Adam on the child's weights; the parent's learn by SGD.
        pull: eta.
        psi_start: What every psi starts from.
        psi_learning_rate: Of psi.
    """

    tangent_weight: float = Field(default=5e-3, ge=0, le=MAX_NUMBER)
    reconstruction_weight: float = Field(default=0.2, ge=0, le=MAX_NUMBER)
    hessian: Hessian = "exact"
    decoupled: bool = True
    child_learning_rate: float = Field(default=1e-2, gt=0, le=MAX_NUMBER)
    pull: float = Field(default=1e-2, ge=0, le=MAX_NUMBER)
    psi_start: float = Field(default=1e-3, ge=0, le=MAX_NUMBER)
    psi_learning_rate: float = Field(default=1e-3, ge=0, le=MAX_NUMBER)


def log_probabilities(supernet: Supernet, alphas: Tensor, images: Tensor) -> Tensor:
    """Return the log class probabilities (B, classes) of a supernet under softmax gates."""
    gates = Gates(torch.softmax(alphas, dim=-1))
    return nn.functional.log_softmax(supernet(images, gates), dim=-1)


def likelihoods(parent: Tensor, child: Tensor) -> Tensor:
    """Return -KL(parent || child) of each image, (B,), from log probabilities (B, classes)."""
    return (parent.exp() * (child - parent)).sum(dim=-1)


def tangent_direction(supernet: Supernet, alphas: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the gradient of the mean log-likelihood by the alphas, and the log probabilities."""
    images, labels = batch
    with frozen(supernet):
        outputs = log_probabilities(supernet, alphas, images)
        (gradient,) = torch.autograd.grad(-nn.functional.nll_loss(outputs, labels), [alphas])
    return gradient, outputs.detach()


def alpha_gradient(
    child: Supernet,
    alphas: Tensor,
    images: Tensor,
    parent: Tensor,
    tangent: Tensor,
    config: DcpNasConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of -G + lambda * D by the child's alphas, and G and D.

    That of D is 2 H (dG/dalpha - g), with H = d2G/dalpha2 or the mean over the images of minus the
    outer product of their gradients. The exact one goes through signs by the derivative of the
    slope that stands for theirs, and like any lacks what kinks (ReLU, max pool) would add.

    Args:
        child: The supernet.
        alphas: (K, E, O), which ask for gradients.
        images: (B, C, H, W).
        parent: The parent's log probabilities of them, (B, classes).
        tangent: g, (K, E, O).
        config: lambda, and which H.
    """
    exact = config.hessian == "exact"
    with compiled.plain_path(), frozen(child):
        each = likelihoods(parent, log_probabilities(child, alphas, images))
        g = each.mean()
        (gradient,) = torch.autograd.grad(g, [alphas], retain_graph=True, create_graph=exact)
        difference = gradient - tangent
        distance = difference.square().sum()
        if exact:
            (curved,) = torch.autograd.grad(distance, [alphas])
        else:
            along = _directional(child, alphas, images, parent, difference)
            (curved,) = torch.autograd.grad(-2 * (each * along).mean(), [alphas])
    total = config.tangent_weight * curved - gradient.detach()
    return total, g.detach(), distance.detach()


@torch.no_grad()
def _directional(
    child: Supernet, alphas: Tensor, images: Tensor, parent: Tensor, direction: Tensor
) -> Tensor:
    """The derivative of each image's likelihood in a direction of the alphas, (B,)."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        # torch warns of its own torch.jit.script at the first use of this mode.
        warnings.simplefilter("ignore", FutureWarning)
        moving = forward_ad.make_dual(alphas.detach(), direction)  # type: ignore[no-untyped-call]
        each = likelihoods(parent, log_probabilities(child, moving, images))
        along: Tensor = forward_ad.unpack_dual(each).tangent  # type: ignore[no-untyped-call]
    return along


def reconstruction_error(supernet: Supernet) -> Tensor:
    """Return L_R: the mean of (w - scale * sign(w))^2 over all 1-bit weights."""
    layers = [layer for layer in supernet.modules() if isinstance(layer, OneBitConv2d)]
    total = torch.stack([layer.reconstruction_error() for layer in layers]).sum()
    return total / sum(layer.weight.numel() for layer in layers)


class OpNorms:
    """Squared norms of the weights of every op of a supernet, where 1-bit: of scale * sign."""

    def __init__(self, supernet: Supernet):
        space = supernet.space
        self.shape = len(supernet.kinds), len(space.edges), len(space.ops)
        places: list[int] = []
        self.layers: list[nn.Conv2d] = []
        for kind, cell in zip(supernet.kind_of_cell, supernet.cells, strict=True):
            if kind is None:
                continue
            ops = [op for edge in cast(Any, cell).edges for op in edge]
            for place, op in enumerate(ops, start=kind * len(ops)):
                layers = [layer for layer in op.modules() if isinstance(layer, nn.Conv2d)]
                places += [place] * len(layers)
                self.layers += layers
        self.places = torch.tensor(
            places, dtype=torch.long, device=supernet.classifier.weight.device
        )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return them, summed over the cells of a kind, (K, E, O)."""
        zero = torch.zeros(self.shape, device=self.places.device)
        if not self.layers:
            return zero
        norms = torch.stack([_squared_norm(layer) for layer in self.layers])
        return zero.to(norms.dtype).flatten().index_add(0, self.places, norms).view(self.shape)


def _squared_norm(layer: nn.Conv2d) -> Tensor:
    if isinstance(layer, OneBitConv2d):
        return layer.squared_norm()
    return layer.weight.square().sum()


class Decoupled:
    """The decoupled update of some alphas: alpha + eta * psi * alpha_before, with a learned psi.

    Attributes:
        psi: (K, E, O), >= 0.
        pulled: Derivative of the alphas by psi: eta * alpha_before, and 0 where ops are not large.
    """

    def __init__(self, alphas: Tensor, config: DcpNasConfig):
        self.config = config
        self.psi = torch.full_like(alphas, config.psi_start, requires_grad=False)
        self.pulled = torch.zeros_like(self.psi)

    @torch.no_grad()
    def __call__(self, alphas: Tensor, before: Tensor, norms: Tensor) -> None:
        """Pull the alphas of ops whose norm is above the median of their edge.

        Args:
            alphas: After their step, (K, E, O); changed in place.
            before: Before it.
            norms: Of the weights of the ops.
        """
        large = norms > norms.median(dim=-1, keepdim=True).values
        self.pulled.copy_(self.config.pull * before * large)
        alphas.addcmul_(self.psi, self.pulled)

    @torch.no_grad()
    def learn(self, gradient: Tensor) -> None:
        """Descend in psi a loss whose gradient by the pulled alphas is `gradient`."""
        step = self.config.psi_learning_rate * gradient * self.pulled
        self.psi.copy_((self.psi - step).abs())


class Architecture:
    """The alphas of the parent or of the child, and how they learn."""

    def __init__(self, supernet: Supernet, alphas: Tensor, config: DcpNasConfig):
        self.alphas = alphas
        self.alpha_step = AlphaStep(alphas, config.adam([alphas]))
        self.norms = OpNorms(supernet)
        self.decoupled = Decoupled(alphas, config) if config.decoupled else None

    @torch.no_grad()
    def inherit(self, other: "Architecture") -> None:
        """Take over the alphas of the other."""
        self.alphas.copy_(other.alphas)

    def step(self, loss: Tensor) -> None:
        """Descend `loss` in the alphas, then pull them."""
        before = self.alphas.detach().clone()
        self.alpha_step(loss)
        if self.decoupled is not None:
            self.decoupled(self.alphas, before, self.norms())

    def learn_psi(self, gradient: Tensor) -> None:
        """Take into account the gradient of the loss by the alphas of now."""
        if self.decoupled is not None:
            self.decoupled.learn(gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return the alphas, their optimizer, and what the decoupled update knows."""
        state = {"alphas": self.alpha_step.state_dict()}
        if self.decoupled is not None:
            state["decoupled"] = {"psi": self.decoupled.psi, "pulled": self.decoupled.pulled}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alpha_step.load_state_dict(state["alphas"])
        if self.decoupled is not None:
            self.decoupled.psi.copy_(state["decoupled"]["psi"])
            self.decoupled.pulled.copy_(state["decoupled"]["pulled"])


class ChildStep:
    """The weight half of the child's step: Adam with a cosine to 0, on any loss."""

    def __init__(self, supernet: Supernet, learning_rate: float, grad_clip: float):
        self.supernet = supernet
        self.learning_rate = learning_rate
        self.grad_clip = grad_clip
        self.rate = torch.tensor(learning_rate, device=supernet.classifier.weight.device)
        self.optimizer = Adam(supernet.parameters(), self.rate)

    def schedule(self, progress: float) -> None:
        """Set the learning rate for `progress` in [0, 1)."""
        self.rate.fill_(self.learning_rate * cosine(progress))

    def __call__(self, loss: Tensor) -> None:
        """Descend a loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.supernet.parameters(), self.grad_clip)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the optimizer's state."""
        return {"supernet": self.supernet.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.supernet.load_state_dict(state["supernet"])
        self.optimizer.load_state_dict(state["optimizer"])


class DcpNas:
    """A parent and a child in turns.

    Attributes:
        supernet: That of the child: 1-bit.
        parent_supernet: The same, real-valued.
        child: The child's alphas and how they learn.
        parent: The parent's.
    """

    Config: ClassVar[type[StrategyConfig]] = DcpNasConfig

    def __init__(self, setup: SearchSetup, config: DcpNasConfig, generator: torch.Generator):
        self.config = config
        self.supernet = setup.supernet(Form(one_bit=True))
        self.parent_supernet = setup.supernet(PLAIN)
        alphas = new_alphas(self.supernet, generator)
        copied = alphas.detach().clone().requires_grad_()
        self.parent = Architecture(self.parent_supernet, alphas, config)
        self.child = Architecture(self.supernet, copied, config)
        self.parent_step = WeightStep(self.parent_supernet, setup.weights)
        clip = setup.weights.grad_clip
        self.child_step = ChildStep(self.supernet, config.child_learning_rate, clip)

    def schedule(self, progress: float) -> str:
        """Set the learning rates of the weights; every step is of one kind."""
        self.parent_step.schedule(progress)
        self.child_step.schedule(progress)
        return "both"

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Let the parent learn, then the child from it; `train_loss` is the child's own."""
        parent_loss = self.step_parent(train, valid)
        tangent, teacher = tangent_direction(self.parent_supernet, self.parent.alphas, valid)
        self.parent.learn_psi(-tangent)
        self.child.inherit(self.parent)
        gradient, likelihood, distance = alpha_gradient(
            self.supernet, self.child.alphas, valid[0], teacher, tangent, self.config
        )
        # These alphas came by way of the parent's step; nearer ones would cost another pass.
        self.child.learn_psi(gradient)
        self.child.step((self.child.alphas * gradient).sum())
        loss, train_loss = self.child_loss(train)
        self.child_step(loss)
        self.parent.inherit(self.child)
        return {
            "train_loss": train_loss.detach(),
            "parent_train_loss": parent_loss,
            "valid_divergence": -likelihood,
            "tangent_distance": distance,
        }

    def step_parent(self, train: Batch, valid: Batch) -> Tensor:
        """Descend the training loss in the parent's weights, the validation loss in its alphas."""
        gates = Gates(torch.softmax(self.parent.alphas.detach(), dim=-1))
        train_loss = self.parent_step(gates, train)
        with frozen(self.parent_supernet):
            outputs = log_probabilities(self.parent_supernet, self.parent.alphas, valid[0])
            self.parent.step(nn.functional.nll_loss(outputs, valid[1]))
        return train_loss

    def child_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return -G + mu * L_R, which the child's weights descend, and the child's cross-entropy.

        D is left out: the method derives it by the alphas alone.
        """
        images, labels = batch
        alphas = self.child.alphas.detach()
        with torch.no_grad():
            teacher = log_probabilities(self.parent_supernet, alphas, images)
        outputs = log_probabilities(self.supernet, alphas, images)
        loss = -likelihoods(teacher, outputs).mean()
        if self.config.reconstruction_weight > 0:
            loss = loss + self.config.reconstruction_weight * reconstruction_error(self.supernet)
        return loss, nn.functional.nll_loss(outputs, labels)

    def architecture(self) -> list[Tensor]:
        """Return the alphas of the child and of the parent, (K, E, O), equal after each step."""
        return [self.child.alphas, self.parent.alphas]

    def derive(self) -> list[Cells]:
        """Keep the strongest edges, each with its strongest op, in 1-bit form."""
        p = torch.softmax(self.child.alphas.detach(), dim=-1)
        kinds, space = self.supernet.kinds, self.supernet.space
        cells = {kind: derive_strongest(p[k], space) for k, kind in enumerate(kinds)}
        return [{kind: replace(cell, one_bit=True) for kind, cell in cells.items()}]

    def state_dict(self) -> dict[str, Any]:
        """Return alphas, weights and optimizers of both networks."""
        return {name: part.state_dict() for name, part in self._parts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, part in self._parts():
            part.load_state_dict(state[name])

    def _parts(self) -> list[tuple[str, Architecture | WeightStep | ChildStep]]:
        weights = ("parent_weights", self.parent_step), ("child_weights", self.child_step)
        return [("parent", self.parent), ("child", self.child), *weights]
