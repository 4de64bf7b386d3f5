"""Refuse batches and networks that memory could not hold, before any work starts."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from blocksearch.config import BlockSearchConfig, Search
from blocksearch.search import make_strategy
from blocksearch.space import NORMAL, REDUCTION
from blocksearch.supernet.stack import Stack
from evaluation.data.batches import batches
from evaluation.data.dataset import Dataset, Split
from evaluation.errors import InputError
from evaluation.training.loop import TrainConfig, WeightUpdate, seeded_model
from evaluation.training.retrain import RetrainConfig
from evaluation.workers.memory import available_bytes, largest_batch, peak_bytes, require_room
from netsearch.config import NetSearchConfig
from netsearch.space.genome import NetworkSpec, Stage, stages_for
from netsearch.space.network import builder

TRAINED_BYTES = 12  # of a parameter: itself, its gradient and its momentum
Steps = Callable[[], None]


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
    largest = uniform_network(dataset, blocks, max(networks.depths), max(networks.widths))
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
    for form, one in by_form(searches).items():
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


def by_form(searches: Sequence[Search]) -> dict[tuple[Any, ...], Search]:
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


def uniform_network(
    dataset: Dataset, blocks: BlockSearchConfig, depth: int, width: int, seed: int = 0
) -> Stack:
    """Return the network of equal stages whose cells are all one random cell of the space."""
    stages = stages_for(dataset.image_shape[1:])
    cell = blocks.space.random_cell(random.Random(seed))
    spec = NetworkSpec((Stage(NORMAL, depth, width),) * stages, (REDUCTION,) * (stages - 1))
    cells = {NORMAL: cell, REDUCTION: cell}
    return builder(spec, cells, dataset.image_shape, dataset.classes)
