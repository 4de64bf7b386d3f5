"""Training of shared weights.

A step trains several networks on one batch. Their sizes follow the sandwich rule (Yu and Huang
2019, https://arxiv.org/abs/1903.05134; without its distillation) or are uniform. Their blocks are
dealt from shuffled decks, one per stage or reduction: strict fairness (Chu et al. 2019,
https://arxiv.org/abs/1907.01845), where a step has a multiple of as many networks as there are
blocks to choose from. Ours: a weight takes the mean gradient of the networks that use it, not the
sum.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Dataset
from evaluation.training.checkpoint import Checkpoint, Position, Stateful
from evaluation.training.loop import (
    MAX_COUNTED,
    SEEDS_PER_RUN,
    TrainConfig,
    TrainingError,
    epoch_generator,
    learning_rate,
    uses_bfloat16,
)
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.space.genome import Genome, GenomeSpace, NetworkSpec

SIZES = {"sandwich": (1, 0), "fair": ()}  # of a step's first networks: largest, smallest
DRAWS = 100  # of the sizes of a network, before the smallest are taken


class SharedWeightsConfig(BaseModel):
    """How the shared weights are trained, and how networks are scored with them.

    Attributes:
        sampling: Sizes of the networks of a step: `sandwich`, the largest, the smallest and random
            ones, or `fair`, all random; blocks are dealt fairly in both.
        networks_per_step: Networks trained on each batch; each costs as much as training it.
        epochs: Passes over `search_train`; the rest of the recipe is that of proxy training.
        calibration_images: Images of `search_train` on which BatchNorm's statistics are measured.
        checked: Networks that are also trained for a short time, to see whether the scores rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampling: Literal["sandwich", "fair"] = "sandwich"
    networks_per_step: int = Field(default=4, ge=2, le=1000)
    epochs: int = Field(default=40, ge=1, le=MAX_COUNTED)
    calibration_images: int = Field(default=500, ge=2, le=MAX_COUNTED)
    checked: int = Field(default=10, ge=0, le=10_000)


class _SharedUpdate:
    """One step of SGD on some networks; on a single one it is that of `WeightUpdate`.

    A weight takes the mean gradient of those of the networks that use it. A weight that none uses
    stays, and so does its momentum, as PyTorch's SGD passes over parameters without a gradient.
    """

    def __init__(self, shared: SharedWeights, config: TrainConfig):
        self.shared = shared
        self.config = config
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.bfloat16 = uses_bfloat16(config.precision, shared.weights.device)
        self.momentum = torch.zeros_like(shared.weights, requires_grad=False)

    def __call__(
        self, specs: Sequence[NetworkSpec], images: Tensor, labels: Tensor, rate: float
    ) -> Tensor:
        """Update the weights and return the networks' mean loss before the update."""
        self.shared.weights.grad = None
        users, losses = torch.zeros_like(self.momentum), []
        for spec in specs:  # one graph at a time, so that memory is that of one network
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
                loss: Tensor = self.criterion(self.shared.logits(spec, images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            index = self.shared.index(spec)
            users.index_add_(0, index, users.new_ones(len(index)))
        self._descend(users, rate)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _descend(self, users: Tensor, rate: float) -> None:
        weights, config = self.shared.weights, self.config
        cast(Tensor, weights.grad).div_(users.clamp(min=1))
        nn.utils.clip_grad_norm_(weights, config.grad_clip)
        slope = cast(Tensor, weights.grad).add_(weights, alpha=config.weight_decay)
        used = (users > 0).to(slope.dtype)
        self.momentum.lerp_(config.momentum * self.momentum + slope, used)
        # Nesterov's step, in the form of PyTorch's SGD.
        weights.addcmul_(used, slope + config.momentum * self.momentum, value=-rate)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the momentum."""
        return {"weights": self.shared.weights.detach(), "momentum": self.momentum}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: If it is of another store.
        """
        if state["weights"].shape != self.shared.weights.shape:
            raise ValueError(
                f"expected {len(self.shared.weights)} shared weights, got {len(state['weights'])}"
            )
        self.shared.weights.copy_(state["weights"])
        self.momentum.copy_(state["momentum"])


def train_shared(
    shared: SharedWeights,
    dataset: Dataset,
    config: SharedWeightsConfig,
    recipe: TrainConfig,
    *,
    seed: int,
    augment: AugmentConfig,
    fits: Callable[[Genome], bool] = lambda genome: True,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train the store in place on `search_train`.

    Args:
        shared: The store, on the device of `dataset`.
        dataset: Its `search_train` is all that is read.
        config: Sampling and epochs; one costs `networks_per_step` epochs of a network.
        recipe: The rest of the recipe; its own epochs do not count.
        seed: Of the images' order and augmentation, and of the networks that are sampled.
        augment: Random changes to the images.
        fits: Whether a network is worth training, as those over a hard budget are not.
        checkpoint: Written after every epoch and whenever one is due; a training that finds one
            goes on from it and ends as if it had not stopped.
        on_epoch: Called with the number of epochs done and the epoch's mean loss.

    Raises:
        TrainingError: If the loss of an epoch is not finite.
        InputError: If the checkpoint is damaged or of another store.
    """
    split = dataset.search_train
    update = _SharedUpdate(shared, recipe)
    position = Position()
    parts: dict[str, Stateful] = {"update": update, "position": position}
    if checkpoint:
        checkpoint.restore(parts)
    steps = max(1, len(split) // recipe.batch_size)
    while position.epoch < config.epochs:
        epoch = position.epoch
        rng = np.random.default_rng(seed * SEEDS_PER_RUN + epoch)
        sampled = islice(sampled_steps(shared.space, config, rng, fits), position.step, None)
        order = epoch_generator(seed, epoch)
        stream = batches(split, recipe.batch_size, order, augment, start=position.step)
        for images, labels in stream:
            done = epoch + (position.step + 1) / steps
            rate = learning_rate(recipe, done, config.epochs + 1 / steps)
            position.end_step({"loss": update(next(sampled), images, labels, rate)})
            if checkpoint and checkpoint.due():
                checkpoint.save(parts)
        mean_loss = position.end_epoch()["loss"]
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the loss is {mean_loss} in epoch {position.epoch}")
        if checkpoint:
            checkpoint.save(parts)
        on_epoch(position.epoch, mean_loss)


def sampled_steps(
    space: GenomeSpace,
    config: SharedWeightsConfig,
    generator: np.random.Generator,
    fits: Callable[[Genome], bool] = lambda genome: True,
) -> Iterator[list[NetworkSpec]]:
    """Yield the networks of one step after the other, without end.

    A network that does not fit keeps its blocks and draws other sizes; where none of many draws
    fits, it takes the smallest.
    """
    ends = 2 * space.stages
    largest = space.upper[:ends]
    decks = [_deck(int(top) + 1, generator) for top in space.upper[ends:]]
    while True:
        step = []
        for number in range(config.networks_per_step):
            blocks = [next(deck) for deck in decks]
            fixed = [size * largest for size in SIZES[config.sampling][number : number + 1]]
            draws = (generator.integers(0, largest + 1) for _ in range(DRAWS))
            genomes = ((*map(int, sizes), *blocks) for sizes in (*fixed, *draws))
            genome = next(filter(fits, genomes), (*[0] * ends, *blocks))
            step.append(space.decode(genome))
        yield step


def _deck(cards: int, generator: np.random.Generator) -> Iterator[int]:
    """Deal 0..cards - 1 in random order, shuffled anew whenever all are dealt."""
    while True:
        yield from map(int, generator.permutation(cards))
