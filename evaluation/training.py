"""The one supervised loop: `train` and `accuracy`; proxy training and retraining both use it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from evaluation.checkpoint import load_checkpoint, save_checkpoint
from evaluation.data import AugmentConfig, DataConfig, Split, batches

EVALUATION_BATCH = 500
SEEDS_PER_RUN = 1_000_003  # a prime, so that (seed, epoch) pairs do not meet


class TrainConfig(BaseModel):
    """One training recipe: SGD with Nesterov momentum, linear warm-up, then a cosine to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    label_smoothing: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    warmup: float = Field(ge=0, lt=1)


@dataclass(frozen=True)
class TrainingContext:
    """What many trainings of a run have in common; small, since it is sent to the workers."""

    data: DataConfig
    data_seed: int
    recipe: TrainConfig
    device: str
    metrics: Path


class TrainingError(RuntimeError):
    """A training went wrong by itself: the loss is not finite any more."""


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Return the learning rate's factor at `progress` in [0, 1]: up in a line, down a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """Return the CPU generator of one epoch, so that a resumed run draws as the unbroken one."""
    return torch.Generator().manual_seed((seed * SEEDS_PER_RUN + epoch) * 4 + stream)


def seeded_model(build: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone; global state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    return model.to(device).to(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    *,
    seed: int,
    augment: AugmentConfig,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train `model` in place on all images of `split`.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes); on the device of `split`.
        split: The images to learn from.
        config: The recipe.
        seed: Of the order of the images and of their augmentation, not of the initial weights.
        augment: Random changes to the images.
        checkpoint: Written after every epoch; a training that finds one goes on from it and ends
            as if it had not stopped.
        on_epoch: Called with the number of epochs done and the epoch's mean loss.

    Raises:
        TrainingError: If the loss of an epoch is not finite.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    start = 0
    state = load_checkpoint(checkpoint) if checkpoint else None
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    steps = max(1, len(split) // config.batch_size)
    model.train()
    for epoch in range(start, config.epochs):
        losses = []
        stream = batches(split, config.batch_size, epoch_generator(seed, epoch), augment)
        for step, (images, labels) in enumerate(stream):
            progress = (epoch + (step + 1) / steps) / (config.epochs + 1 / steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * cosine(progress, config.warmup)
            loss = criterion(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the loss is {mean_loss} in epoch {epoch + 1}")
        if checkpoint:
            save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                },
            )
        on_epoch(epoch + 1, mean_loss)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction in [0, 1] of the images of `split` that `model` classifies rightly.

    Raises:
        TrainingError: If a logit is not finite.
    """
    model.eval()
    right = []
    for images, labels in batches(split, EVALUATION_BATCH):
        logits = model(images)
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("a logit is not finite")
        right.append((logits.argmax(dim=1) == labels).sum())
    return float(torch.stack(right).sum()) / len(split)
