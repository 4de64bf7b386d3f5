"""Seconds of the single steps of a run, measured in this process before the run begins.

What is timed is built anew from fixed seeds and thrown away: the run finds the random state as it
was.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from blocksearch.config import BlockSearchConfig, Search
from blocksearch.search import make_strategy
from blocksearch.supernet.stack import Stack
from evaluation.cost.costs import COSTS, cost_of
from evaluation.cost.counts import count_params
from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Dataset, Split
from evaluation.pareto.front import Budgets
from evaluation.training.loop import (
    TrainConfig,
    TrainingError,
    WeightUpdate,
    accuracy,
    seeded_model,
)
from evaluation.training.ready_made import WIDTHS, MobileNetV2, nearest_width
from netsearch.config import NetSearchConfig
from netsearch.estimators.shared_training import SharedWeightsConfig, train_shared
from netsearch.estimators.shared_weights import SharedWeights
from netsearch.forecast.memory_check import uniform_network
from netsearch.space.genome import GenomeSpace, stages_for
from netsearch.space.networks import Networks

ENOUGH_S, MAX_REPEATS = 0.1, 100  # of a timed step
PROGRESSES = (1 / 6, 3 / 6, 5 / 6)  # of a block search, whose steps differ in the warm-up
JUDGED = 128  # images that a timed network judges


@dataclass(frozen=True)
class NetworkTimes:
    """Seconds of a network.

    Attributes:
        build_s: To build it.
        step_s: Size of a batch -> one training step.
        image_s: To judge one image.
    """

    build_s: float
    step_s: Mapping[int, float]
    image_s: float

    def training_s(self, recipe: TrainConfig, images: int, judged: int) -> float:
        """Return the seconds of a whole training on `images`, and of judging `judged` others."""
        steps = recipe.epochs * steps_of(images, recipe.batch_size)
        return self.build_s + steps * self.step_s[recipe.batch_size] + judged * self.image_s


def mean_network(found: Sequence[NetworkTimes]) -> NetworkTimes:
    """Return the mean over the space from its smallest, middle and largest network, or from one.

    Seconds add up over the stages of a network, and those of a stage are about quadratic in its
    width, for which Simpson's rule is exact.
    """
    weights = (1.0,) if len(found) == 1 else (1 / 6, 4 / 6, 1 / 6)

    def mean(of: Callable[[NetworkTimes], float]) -> float:
        return sum(weight * of(one) for weight, one in zip(weights, found, strict=True))

    def mean_step_s(size: int) -> float:
        return mean(lambda one: one.step_s[size])

    step_s = {size: mean_step_s(size) for size in found[0].step_s}
    return NetworkTimes(mean(lambda one: one.build_s), step_s, mean(lambda one: one.image_s))


def time_network(
    build: Callable[[], nn.Module],
    dataset: Dataset,
    recipes: Sequence[TrainConfig],
    augment: AugmentConfig,
    device: str,
) -> NetworkTimes:
    """Time one network in training with each recipe, and in use."""
    model = seeded_model(build, 0, device)
    build_s = time_once(lambda: seeded_model(build, 0, device), device)
    generator = torch.Generator().manual_seed(0)
    step_s = {}
    for recipe in recipes:
        size = recipe.batch_size
        part = _first_images(dataset.search_train, size)
        update = WeightUpdate(seeded_model(build, 0, device).train(), recipe)

        def step(size: int = size, part: Split = part, update: WeightUpdate = update) -> None:
            update(*next(batches(part, size, generator, augment)))

        step_s[size] = time_step(step, device)
    judged = _first_images(dataset.search_valid, JUDGED)
    return NetworkTimes(
        build_s, step_s, time_step(lambda: accuracy(model, judged), device) / len(judged)
    )


def time_once(step: Callable[[], object], device: str) -> float:
    """Return the seconds of a single call."""
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def time_step(step: Callable[[], object], device: str) -> float:
    """Return the mean seconds of a step, after a first one that may take ten times as long."""
    step()
    found: list[float] = []
    while sum(found) < ENOUGH_S and len(found) < MAX_REPEATS:
        found.append(time_once(step, device))
    return statistics.fmean(found)


def time_search(
    one: Search,
    config: BlockSearchConfig,
    dataset: Dataset,
    augment: AugmentConfig,
    device: str,
    recompute: bool,
) -> float:
    """Return the seconds of a mean step of a block search."""
    generator = torch.Generator().manual_seed(0)
    stages = stages_for(dataset.image_shape[1:])
    strategy = make_strategy(one, config, dataset, stages, device, recompute=recompute)

    def drawn(split: Split) -> Any:
        part = _first_images(split, config.batch_size)
        return next(batches(part, config.batch_size, generator, augment))

    def step() -> None:
        strategy.step(drawn(dataset.search_train), drawn(dataset.search_valid))

    seconds = []
    for progress in PROGRESSES:
        strategy.schedule(progress)
        seconds.append(time_step(step, device))
    return statistics.fmean(seconds)


def time_shared_step(
    dataset: Dataset,
    blocks: BlockSearchConfig,
    config: NetSearchConfig,
    augment: AugmentConfig,
    device: str,
) -> float:
    """Return the seconds of a step of shared weights, with all threads of this process."""
    generator = random.Random(0)
    stages = stages_for(dataset.image_shape[1:])
    space = GenomeSpace(stages, config.depths, config.widths, ("normal",), ("reduction",))
    cells = {name: blocks.space.random_cell(generator) for name in ("normal", "reduction")}
    shared = SharedWeights(Networks(space, cells, dataset.image_shape, dataset.classes)).to(device)
    part = _first_images(dataset.search_train, config.train.batch_size)
    small = replace(dataset, search_train=part)
    once = SharedWeightsConfig(**(config.shared_weights.model_dump() | {"epochs": 1}))

    def step() -> None:
        with suppress(TrainingError):  # the run itself will say so
            train_shared(shared, small, once, config.train, seed=0, augment=augment)

    return time_step(step, device)


def ready_made(dataset: Dataset, params: int) -> MobileNetV2:
    """Return the MobileNetV2 of about so many params."""
    shape, classes = dataset.image_shape, dataset.classes

    def count(width: float) -> int:
        with torch.device("meta"):
            return count_params(MobileNetV2(width, shape, classes)())

    return MobileNetV2(nearest_width(WIDTHS, count, params), shape, classes)


def mean_builds(
    dataset: Dataset, blocks: BlockSearchConfig, config: NetSearchConfig
) -> list[Stack]:
    """Return the smallest, the middle and the largest network of the space within its budgets.

    Only one where no two are within them.
    """
    depths, widths = config.depths, config.widths
    budgets = config.budgets.exact()  # nothing is measured yet
    kinds = [COSTS[name] for name in budgets.of_costs()]
    count = max(len(depths), len(widths))
    ladder = [
        uniform_network(
            dataset,
            blocks,
            depths[number * len(depths) // count],
            widths[number * len(widths) // count],
        )
        for number in range(count)
    ]
    kept = ladder
    if budgets != Budgets():  # counting costs takes a second or two
        within = [budgets.cost_excess(cost_of(one, kinds)) <= 0 for one in ladder]
        kept = [one for one, fits in zip(ladder, within, strict=True) if fits] or ladder[:1]
    return [kept[0], kept[len(kept) // 2], kept[-1]] if len(kept) > 1 else kept


def _first_images(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count], split.mean, split.std)


def steps_of(images: int, batch_size: int) -> int:
    """Return the steps of an epoch: a short last batch is dropped unless it is the only one."""
    return max(1, images // batch_size)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
