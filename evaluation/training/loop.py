"""The one supervised loop: `train` and `accuracy`; proxy training and retraining both use it."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split
from evaluation.files.bounded import MAX_NUMBER
from evaluation.training.checkpoint import Checkpoint, Position, Stateful
from evaluation.training.cuda_graphs import CapturedStep, graphs_for
from evaluation.training.optimizers import Sgd

EVALUATION_BATCH = 500
SEEDS_PER_RUN = 1_000_003  # a prime, so that (seed, epoch) pairs do not meet
MAX_COUNTED = 1_000_000  # epochs, for the same reason, and images of a batch


Precision = Literal["float32", "bfloat16"]


class TrainConfig(BaseModel):
    """One training recipe: SGD with Nesterov momentum, linear warm-up, then a cosine to zero.

    With an `ema_decay` above 0 the trained network is the moving average of those of all steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(ge=1, le=MAX_COUNTED)
    batch_size: int = Field(ge=2, le=MAX_COUNTED)
    learning_rate: float = Field(gt=0, le=MAX_NUMBER)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, le=MAX_NUMBER)
    label_smoothing: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0, le=MAX_NUMBER)
    warmup: float = Field(ge=0, lt=1)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    precision: Precision = "float32"


class TrainingError(RuntimeError):
    """A training went wrong by itself: the loss is not finite any more."""


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Return the learning rate's factor at `progress` in [0, 1]: up in a line, down a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def learning_rate(recipe: TrainConfig, epochs_done: float, epochs: float) -> float:
    """Return the learning rate after so many of all epochs, which may be parts of one."""
    return recipe.learning_rate * cosine(epochs_done / epochs, recipe.warmup)


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """Return the CPU generator of one epoch, so that a resumed run draws as the unbroken one."""
    return torch.Generator().manual_seed((seed * SEEDS_PER_RUN + epoch) * 4 + stream)


def seeded_model(build: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone; global state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    return model.to(device).to(memory_format=torch.channels_last)


def average_rate(decay: float, steps_done: int) -> float:
    """Return how far an average moves to the newest weights after so many steps.

    The decay rises to its value, so that the first, random weights are soon forgotten.
    """
    return 1.0 - min(decay, steps_done / (9 + steps_done))


class WeightAverage:
    """The moving average of all that a network computes with, the statistics of BatchNorms too.

    `torch.optim.swa_utils` waits for the device in every update, which no captured step may.

    Attributes:
        rate: How far the average moves, see `average_rate`; a tensor, as that of `WeightUpdate`.
    """

    def __init__(self, model: nn.Module):
        """Begin with the weights of `model`, which is only read until `replace`."""
        self.newest = [value for value in model.state_dict().values() if value.is_floating_point()]
        self.averages = [value.clone() for value in self.newest]
        self.rate = torch.ones((), device=self.newest[0].device)

    def update(self) -> None:
        """Move the average to the newest weights."""
        moves = torch._foreach_sub(self.newest, self.averages)
        torch._foreach_mul_(moves, self.rate)
        torch._foreach_add_(self.averages, moves)

    def replace(self) -> None:
        """Give the network the average."""
        torch._foreach_copy_(self.newest, self.averages)


class WeightUpdate:
    """One step of SGD on one batch: a function of tensors that never waits for the device.

    Attributes:
        rate: The learning rate, read by every step: a tensor, so that a captured step sees it move.
        average: Of the weights; None where the recipe wants none.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        """Prepare to train `model`, which stays on its device."""
        self.model = model
        self.parameters = list(model.parameters())
        self.grad_clip = config.grad_clip
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.rate = torch.zeros((), device=self.parameters[0].device)
        self.average = WeightAverage(model) if config.ema_decay > 0 else None
        self.bfloat16 = uses_bfloat16(config.precision, self.rate.device)
        self.optimizer = Sgd(
            self.parameters,
            self.rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=True,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Update the weights and return the `loss` before the update."""
        self.optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss: Tensor = self.criterion(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return {"loss": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the momenta, and the averages if there are any."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.average is None else state | {"averages": self.average.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            torch._foreach_copy_(self.average.averages, state["averages"])


def train(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    *,
    seed: int,
    augment: AugmentConfig,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train `model` in place on all images of `split`; on a GPU the step is replayed as a graph.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes); on the device of `split`.
        split: The images to learn from.
        config: The recipe.
        seed: Of the order of the images and of their augmentation, not of the initial weights.
        augment: Random changes to the images.
        checkpoint: Written after every epoch and whenever one is due; a training that finds one
            goes on from it and ends as if it had not stopped.
        on_epoch: Called with the number of epochs done and the epoch's mean loss.

    Raises:
        TrainingError: If the loss of an epoch is not finite.
    """
    update = WeightUpdate(model, config)
    captured = CapturedStep(update, graphs_for(split.images.device))
    position = Position()
    parts: dict[str, Stateful] = {"update": update, "position": position}
    if checkpoint:
        checkpoint.restore(parts)
    steps = max(1, len(split) // config.batch_size)
    model.train()
    while position.epoch < config.epochs:
        epoch = position.epoch
        order = epoch_generator(seed, epoch)
        for batch in batches(split, config.batch_size, order, augment, start=position.step):
            done = epoch + (position.step + 1) / steps
            update.rate.fill_(learning_rate(config, done, config.epochs + 1 / steps))
            if update.average is not None:
                begun = epoch * steps + position.step + 1
                update.average.rate.fill_(average_rate(config.ema_decay, begun))
            position.end_step(captured(*batch))
            if checkpoint and checkpoint.due():
                checkpoint.save(parts)
        mean_loss = position.end_epoch()["loss"]
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the loss is {mean_loss} in epoch {position.epoch}")
        if checkpoint:
            checkpoint.save(parts)
        on_epoch(position.epoch, mean_loss)
    if update.average is not None:
        update.average.replace()


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction in [0, 1] of the images of `split` that `model` classifies rightly.

    Raises:
        TrainingError: If a logit is not finite.
    """
    return float(correct(model, split).sum()) / len(split)


@torch.no_grad()
def correct(model: nn.Module, split: Split) -> Tensor:
    """Return which images of `split` `model` classifies rightly, (N,) bool.

    Raises:
        TrainingError: If a logit is not finite.
    """
    model.eval()
    right, finite = [], []
    for images, labels in batches(split, EVALUATION_BATCH):
        logits = model(images)
        right.append(logits.argmax(dim=1) == labels)
        finite.append(torch.isfinite(logits).all())
    if not bool(torch.stack(finite).all()):
        raise TrainingError("a logit is not finite")
    return torch.cat(right)


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Tell whether to compute in bfloat16: where asked for, and only on a GPU that has it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16" and native
