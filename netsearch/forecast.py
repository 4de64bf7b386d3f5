"""A forecast of time and memory from two timed steps of each kind, before any work starts."""

import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blocksearch.config import BlockSearchConfig, Search
from blocksearch.search import make_strategy, threads_of
from blocksearch.space import NORMAL, REDUCTION
from blocksearch.stack import Stack
from evaluation.data import AugmentConfig, Dataset, Split, batches
from evaluation.errors import InputError
from evaluation.memory import available_bytes, largest_batch, peak_bytes, require_room
from evaluation.retrain import RetrainConfig
from evaluation.training import TrainConfig, TrainingError, WeightUpdate, seeded_model, train
from netsearch.config import NetSearchConfig
from netsearch.genome import NetworkSpec, Stage, stages_for
from netsearch.network import builder

TIMED_STEPS = 2
TRAINED_BYTES = 12  # of a parameter: itself, its gradient and its momentum
Steps = Callable[[], None]


@dataclass(frozen=True)
class Forecast:
    """Seconds of wall-clock time of each stage, and memory in MiB of one process or of the GPU.

    A network in the middle of the space stands for all; what is found may be smaller or larger.
    """

    blocks_s: float
    networks_s: float
    retrain_s: float
    memory_mib: float

    @property
    def total_s(self) -> float:
        """Sum over the stages."""
        return self.blocks_s + self.networks_s + self.retrain_s


def forecast(
    dataset: Dataset,
    augment: AugmentConfig,
    blocks: BlockSearchConfig,
    networks: NetSearchConfig,
    retraining: RetrainConfig,
    *,
    device: str,
    workers: int,
    recompute: frozenset[str] = frozenset(),
) -> Forecast:
    """Time two steps of block search, proxy training and retraining, after one that warms up.

    Args:
        dataset: The images.
        augment: What is done to them in training.
        blocks: Table of the config.
        networks: Table of the config.
        retraining: Table of the config.
        device: `cpu` or `cuda`.
        workers: Processes at the same time.
        recompute: Names of block searches that recompute their cells, as `check_memory` returns.
    """
    threads = torch.get_num_threads()
    try:
        searches = blocks.searches(seed=0)
        torch.set_num_threads(threads_of(searches, workers))
        step_s = {
            form: _time_search_steps(one, blocks, dataset, augment, device, one.name in recompute)
            for form, one in _by_form(searches).items()
        }
        torch.set_num_threads(1)  # as in the workers
        steps = blocks.epochs * _steps(dataset.search_train, blocks.batch_size)
        seconds = [step_s[one.form] * steps for one in searches]
        blocks_s = max(*seconds, sum(seconds) / workers)
        build = _middle_network(dataset, blocks, networks)
        proxy_s = _time_epochs(build, dataset.search_train, networks.train, augment, device)
        candidates: float = networks.evaluations * (2 if networks.random_search else 1)
        if networks.estimate == "shared_weights":  # scores themselves are nearly free
            shared = networks.shared_weights
            trained = shared.epochs * shared.networks_per_step / networks.train.epochs
            candidates = trained + shared.checked
        retrain_s = _time_epochs(build, dataset.train, retraining.train, augment, device)
        trainings = (retraining.members + 2 * retraining.baselines) * len(retraining.seeds)
    finally:
        torch.set_num_threads(threads)
    return Forecast(
        blocks_s, proxy_s * candidates / workers, retrain_s * trainings / workers, _peak_mib(device)
    )


def check_memory(
    dataset: Dataset,
    blocks: BlockSearchConfig,
    networks: NetSearchConfig,
    retraining: RetrainConfig,
    *,
    device: str,
    workers: int,
) -> frozenset[str]:
    """Measure steps with small batches, and refuse a batch that all memory could not hold.

    Returns:
        Names of the block searches whose batch fits only if they recompute their cells.

    Raises:
        InputError: If a batch does not fit, naming the key and the largest batch that does; or the
            largest network of the space does not.
    """
    recompute = check_search_memory(dataset, blocks, device=device, workers=workers)
    largest = _network(dataset, blocks, max(networks.depths), max(networks.widths))
    needed = TRAINED_BYTES * largest.cost().params * workers
    require_room("netsearch.depths, netsearch.widths: the largest networks", needed, device)

    def training_steps(recipe: TrainConfig, split: Split, batch: int) -> Steps:
        update = WeightUpdate(seeded_model(largest, 0, device).train(), recipe)
        images = next(batches(_repeated(split, batch), batch))
        return lambda: _twice(lambda: update(*images))

    for key, recipe, split in (
        ("netsearch.train", networks.train, dataset.search_train),
        ("retrain.train", retraining.train, dataset.train),
    ):
        wanted = min(recipe.batch_size, len(split))
        steps = partial(training_steps, recipe, split)
        _check_batch(key, wanted, steps, device=device, processes=workers)
    return recompute


def check_search_memory(
    dataset: Dataset, blocks: BlockSearchConfig, *, device: str, workers: int
) -> frozenset[str]:
    """Measure steps of every form of block search with small batches, as `check_memory` does.

    Returns:
        Names of the searches whose batch fits only if they recompute their cells.

    Raises:
        InputError: If a batch does not fit; names the search and the largest batch that does.
    """
    searches = blocks.searches(seed=0)
    stages = stages_for(dataset.image_shape[1:])

    def steps(one: Search, recompute: bool, batch: int) -> Steps:
        strategy = make_strategy(one, blocks, dataset, stages, device, recompute=recompute)
        train, valid = dataset.search_train, dataset.search_valid
        images = [next(batches(_repeated(split, batch), batch)) for split in (train, valid)]

        def at_both_ends() -> None:  # all that a warm-up leaves out, all that is dropped later on
            for progress in (0.0, 0.99):
                strategy.schedule(progress)
                strategy.step(*images)

        return at_both_ends

    wanted = min(blocks.batch_size, len(dataset.search_train))
    room = available_bytes(device) // min(workers, len(searches))
    tight = set()
    for form, one in _by_form(searches).items():
        if _largest(partial(steps, one, False), room, wanted, device) < wanted:
            tight.add(form)
            _check_batch(
                "blocksearch",
                wanted,
                partial(steps, one, True),
                device=device,
                processes=min(workers, len(searches)),
                purpose=f" for {one.strategy}, its cells recomputed,",
            )
    return frozenset(one.name for one in searches if one.form in tight)


def _check_batch(
    key: str,
    wanted: int,
    steps: Callable[[int], Steps],
    *,
    device: str,
    processes: int,
    purpose: str = "",
) -> None:
    room = available_bytes(device) // processes
    fits = _largest(steps, room, wanted, device)
    if fits < wanted:
        raise InputError(
            f"{key}.batch_size: {wanted} images{purpose} do not fit into the memory of {device} "
            f"({room / 2**30:.1f} GiB for each of {processes} processes); the largest batch "
            f"that does is {fits}"
        )


def _largest(steps: Callable[[int], Steps], room: int, wanted: int, device: str) -> int:
    return largest_batch(lambda batch: peak_bytes(steps(batch), device), room, wanted)


def _by_form(searches: Sequence[Search]) -> dict[tuple[Any, ...], Search]:
    """One search of each form."""
    return {one.form: one for one in reversed(searches)}


def _repeated(split: Split, count: int) -> Split:
    """Return `count` images of a split, again from its first where it has not as many."""
    index = torch.arange(count, device=split.labels.device) % len(split)
    return Split(split.images[index], split.labels[index], split.mean, split.std)


def _twice(step: Callable[[], object]) -> None:
    """Momenta and the like appear in the first step and are there in the second."""
    step()
    step()


def _steps(split: Split, batch_size: int) -> int:
    return max(1, len(split) // batch_size)


def _time_search_steps(
    one: Search,
    config: BlockSearchConfig,
    dataset: Dataset,
    augment: AugmentConfig,
    device: str,
    recompute: bool,
) -> float:
    stages = stages_for(dataset.image_shape[1:])
    strategy = make_strategy(one, config, dataset, stages, device, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    batch = next(batches(dataset.search_train, config.batch_size, generator, augment))
    valid = next(batches(dataset.search_valid, config.batch_size, generator, augment))
    # Near the end of the search, where no warm-up leaves out the architecture step.
    strategy.schedule(0.99)
    return _time(lambda: strategy.step(batch, valid), device)


def _middle_network(
    dataset: Dataset, blocks: BlockSearchConfig, networks: NetSearchConfig
) -> Stack:
    depths, widths = networks.depths, networks.widths
    return _network(dataset, blocks, depths[len(depths) // 2], widths[len(widths) // 2])


def _network(dataset: Dataset, blocks: BlockSearchConfig, depth: int, width: int) -> Stack:
    stages = stages_for(dataset.image_shape[1:])
    cell = blocks.space.random_cell(random.Random(0))
    spec = NetworkSpec((Stage(NORMAL, depth, width),) * stages, (REDUCTION,) * (stages - 1))
    cells = {NORMAL: cell, REDUCTION: cell}
    return builder(spec, cells, dataset.image_shape, dataset.classes)


def _time_epochs(
    build: Stack, split: Split, recipe: TrainConfig, augment: AugmentConfig, device: str
) -> float:
    """Return the seconds of a whole training, from one epoch over two batches of images."""
    model = seeded_model(build, 0, device)
    count = min(len(split), TIMED_STEPS * recipe.batch_size)
    part = Split(split.images[:count], split.labels[:count], split.mean, split.std)
    one_epoch = recipe.model_copy(update={"epochs": 1})

    def one() -> None:
        with suppress(TrainingError):  # the run itself will record it
            train(model, part, one_epoch, seed=0, augment=augment)

    seconds = _time(one, device, 1)
    per_step = seconds / _steps(part, recipe.batch_size)
    return per_step * _steps(split, recipe.batch_size) * recipe.epochs


def _time(step: Callable[[], object], device: str, repeats: int = TIMED_STEPS) -> float:
    """Return the mean seconds of a step, after one that is not counted."""
    step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
