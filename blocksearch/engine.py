"""The strategy protocol, what a strategy is built with, and the search loop with checkpoints."""

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from blocksearch.relaxation import Gates, one_hot_gates
from blocksearch.space import Cell
from blocksearch.supernet.forms import Form
from blocksearch.supernet.supernet import Supernet
from evaluation.data.batches import batches, cycle
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.files.bounded import MAX_NUMBER
from evaluation.training.checkpoint import Checkpoint, Position, Stateful
from evaluation.training.cuda_graphs import CapturedStep, graphs_for
from evaluation.training.loop import EVALUATION_BATCH, TrainingError, cosine, epoch_generator
from evaluation.training.optimizers import Adam, Sgd

Batch = tuple[Tensor, Tensor]
Cells = dict[str, Cell]  # one cell per kind


class StrategyConfig(BaseModel):
    """Base of every strategy's own hyper-parameters: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AdamConfig(StrategyConfig):
    """Base of those whose logits learn by Adam; the defaults are PC-DARTS's."""

    alpha_learning_rate: float = Field(default=6e-4, gt=0, le=MAX_NUMBER)
    alpha_weight_decay: float = Field(default=1e-3, ge=0, le=MAX_NUMBER)
    alpha_beta1: float = Field(default=0.5, ge=0, lt=1)
    alpha_beta2: float = Field(default=0.999, ge=0, lt=1)

    def adam(self, logits: list[Tensor]) -> Adam:
        """Return Adam on architecture logits."""
        return Adam(
            logits,
            self.alpha_learning_rate,
            betas=(self.alpha_beta1, self.alpha_beta2),
            weight_decay=self.alpha_weight_decay,
        )


class WeightConfig(BaseModel):
    """How the supernet's weights learn: SGD with momentum and a cosine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(gt=0, le=MAX_NUMBER)
    learning_rate_end: float = Field(ge=0, le=MAX_NUMBER)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, le=MAX_NUMBER)
    grad_clip: float = Field(gt=0, le=MAX_NUMBER)


@dataclass(frozen=True)
class SearchSetup:
    """What every strategy works on.

    Attributes:
        supernet: Form -> a supernet of that form on the device of the data, with seeded weights. A
            strategy asks for the one that it searches in.
        weights: How the supernet's weights learn.
        complexity_cost: What a complexity term counts, `params` or `flops`.
    """

    supernet: Callable[[Form], Supernet]
    weights: WeightConfig
    complexity_cost: str = "params"

    def op_costs(self, supernet: Supernet, count: str | None = None) -> Tensor:
        """Return the cost of each op on each edge, (K, E, O), on the supernet's device.

        Args:
            supernet: A supernet.
            count: `params` or `flops`; None is `complexity_cost`.
        """
        costs = supernet.op_costs(count or self.complexity_cost)
        return costs.float().to(supernet.classifier.weight.device)


def new_alphas(supernet: Supernet, generator: torch.Generator) -> Tensor:
    """Return fresh logits (K, E, O) near 0, so that every op starts with an equal chance."""
    space = supernet.space
    shape = len(supernet.kinds), len(space.edges), len(space.ops)
    noise = torch.randn(shape, generator=generator)
    return (1e-3 * noise).to(supernet.classifier.weight.device).requires_grad_()


class Strategy(Protocol):
    """One published block-search method: owns one update step and a derivation.

    Built as `Strategy(setup, config, generator)`; all its randomness comes from `generator`, a CPU
    generator, whose state it must carry in its `state_dict` if it draws after construction. The
    constructor raises an `InputError` where it cannot search the space or keep a budget.

    Attributes:
        supernet: The one in which it searches; the cells that it derives run on its weights.
    """

    Config: ClassVar[type[StrategyConfig]]
    supernet: Supernet

    def __init__(self, setup: SearchSetup, config: Any, generator: torch.Generator) -> None: ...

    def schedule(self, progress: float) -> Hashable:
        """Set what changes from step to step, such as learning rates; name the step to come.

        Steps of one name do the same operations in the same order, whatever their numbers, so that
        a GPU can replay them; None says that the step to come is like no other. What is set here is
        a tensor where a replayed step reads it.

        Args:
            progress: Part of the search that is done, in [0, 1).
        """

    def step(self, train: Batch, valid: Batch) -> dict[str, Tensor]:
        """Update weights and alphas once; return scalars to log, `train_loss` among them.

        They stay tensors, so that a step on a GPU needs no synchronisation.

        Args:
            train: Images (B, C, H, W) and labels (B,) from which weights learn.
            valid: The same, from which alphas learn.
        """

    def architecture(self) -> list[Tensor]:
        """Return every tensor of architecture logits; each must learn."""

    def derive(self) -> list[Cells]:
        """Return the cells found so far, best first; deterministic, changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint must carry."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


class WeightStep:
    """The weight half of a bilevel step: cross-entropy on a training batch, SGD on the weights."""

    def __init__(self, supernet: Supernet, config: WeightConfig):
        self.supernet = supernet
        self.config = config
        self.rate = torch.tensor(config.learning_rate, device=next(supernet.parameters()).device)
        self.optimizer = Sgd(
            supernet.parameters(),
            self.rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    def schedule(self, progress: float) -> None:
        """Set the learning rate for `progress` in [0, 1)."""
        low, high = self.config.learning_rate_end, self.config.learning_rate
        self.rate.fill_(low + (high - low) * cosine(progress))

    def __call__(self, gates: Gates, batch: Batch) -> Tensor:
        """Update the weights under fixed gates and return the loss before the update."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.supernet(images, gates), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.supernet.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the optimizer's state."""
        return {"supernet": self.supernet.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.supernet.load_state_dict(state["supernet"])
        self.optimizer.load_state_dict(state["optimizer"])


class AlphaStep:
    """The architecture half of a bilevel step: one step of an optimizer on the alphas alone."""

    def __init__(self, alphas: Tensor, optimizer: Sgd | Adam):
        self.alphas = alphas
        self.optimizer = optimizer

    def __call__(self, loss: Tensor) -> None:
        """Descend `loss`; no other tensor receives a gradient."""
        (self.alphas.grad,) = torch.autograd.grad(loss, [self.alphas])
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the alphas and the optimizer's state."""
        return {"alphas": self.alphas.detach().clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.alphas.data.copy_(state["alphas"])
        self.optimizer.load_state_dict(state["optimizer"])


@contextmanager
def frozen(supernet: Supernet) -> Iterator[None]:
    """Let no weight ask for a gradient: the architecture's half of a step needs none of them."""
    weights = [weight for weight in supernet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_()


def search(
    strategy: Strategy,
    train: Split,
    valid: Split,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    augment: AugmentConfig,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, scalars: None,
) -> list[Cells]:
    """Run a strategy for some epochs over `train` and return the cells that it derives.

    Every step sees one batch of `train` and a fresh one of `valid`. The checkpoint is written after
    every epoch and whenever it is due; a search that finds it goes on from it and ends as if it had
    not stopped.

    Raises:
        InputError: If the checkpoint is damaged or of another search.
        TrainingError: If a logged scalar or a logit is not finite any more.
    """
    position = Position()
    parts: dict[str, Stateful] = {"strategy": strategy, "position": position}
    if checkpoint:
        checkpoint.restore(parts)
    graphs = graphs_for(train.images.device)  # one for all kinds of steps: they share its memory
    captured: dict[Hashable, CapturedStep] = {}

    def one_step(x: Tensor, y: Tensor, valid_x: Tensor, valid_y: Tensor) -> dict[str, Tensor]:
        return strategy.step((x, y), (valid_x, valid_y))

    steps = max(1, len(train) // batch_size)
    while position.epoch < epochs:
        epoch, start = position.epoch, position.step
        orders = [epoch_generator(seed, epoch, stream) for stream in (0, 1)]
        train_stream = batches(train, batch_size, orders[0], augment, start=start)
        valid_stream = cycle(valid, batch_size, orders[1], augment, start=start)
        for batch, valid_batch in zip(train_stream, valid_stream, strict=False):
            kind = strategy.schedule((epoch + position.step / steps) / epochs)
            if kind not in captured:
                captured[kind] = CapturedStep(one_step, None if kind is None else graphs)
            position.end_step(captured[kind](*batch, *valid_batch))
            if checkpoint and checkpoint.due():
                checkpoint.save(parts)
        means = position.end_epoch()
        if not all(math.isfinite(value) for value in means.values()):
            raise TrainingError(f"the search diverged in epoch {position.epoch}: {means}")
        if checkpoint:
            checkpoint.save(parts)
        on_epoch(position.epoch, means)
    if not all(bool(torch.isfinite(logits).all()) for logits in strategy.architecture()):
        raise TrainingError("the search diverged in its last step")
    return strategy.derive()


@torch.no_grad()
def shared_weight_accuracy(supernet: Supernet, cells: Cells, split: Split) -> float:
    """Return the accuracy in [0, 1] of discrete cells that run on the supernet's weights.

    Weights trained under soft gates rate a one-hot network poorly; it is a score to compare cells
    of one search, not an estimate of what a retrained network reaches.
    """
    gates = one_hot_gates(cells, supernet.space)
    assert gates.bypass is not None
    weight, bypass = (gate.to(split.images.device) for gate in (gates.weight, gates.bypass))
    gates = Gates(weight, gates.active, bypass=bypass)
    right = torch.zeros((), device=split.images.device)
    # Nearly equal batches: BatchNorm uses the batch's statistics, and a rest of one has none.
    size = math.ceil(len(split) / math.ceil(len(split) / EVALUATION_BATCH))
    for images, labels in batches(split, size):
        right += (supernet(images, gates).argmax(dim=1) == labels).sum()
    return float(right) / len(split)
