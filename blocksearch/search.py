"""Stage one as the pipeline runs it: every configured search in a worker, then the library."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocksearch.config import BlockSearchConfig, Search
from blocksearch.engine import (
    Cells,
    SearchSetup,
    Strategy,
    search,
    shared_weight_accuracy,
)
from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.own_op import check_own_op
from blocksearch.space import Cell, OwnOps, base_kind
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet
from evaluation.data.dataset import Dataset
from evaluation.errors import InputError, reason_of
from evaluation.files.run_folder import RunFolder
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainingError, uses_bfloat16
from evaluation.workers.memory import out_of_memory, peak_bytes, release_memory, require_room
from evaluation.workers.pool import WorkerDied, run_tasks
from evaluation.workers.workers import Workers

BLOCKS = "blocks"  # folder of the searches in a run


@dataclass(frozen=True)
class SearchContext:
    """What every search of a run has in common; small, since it is sent to the workers.

    Attributes:
        run: Images, device, event log.
        config: The table `blocksearch`.
        stages: Number of resolutions.
        folder: Of the run; results and checkpoints go to `blocks`.
        recompute: Names of the searches that have too little memory for the insides of all cells.
    """

    run: RunContext
    config: BlockSearchConfig
    stages: int
    folder: RunFolder
    recompute: frozenset[str] = frozenset()


def build_supernet(
    config: BlockSearchConfig, dataset: Dataset, stages: int, seed: int, form: Form = PLAIN
) -> Supernet:
    """Build the supernet on the CPU, its initial weights drawn from `seed` alone.

    Raises:
        InputError: If it has too few cells, or cannot be built in that form or in this memory.
    """
    build = partial(
        Supernet,
        config.space,
        dataset.image_shape,
        dataset.classes,
        channels=config.channels,
        cells=config.cells,
        stages=stages,
        form=form,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                needed = sum(weight.nbytes for weight in build().parameters())
            require_room("blocksearch.channels: the supernet", needed, "cpu")
            torch.manual_seed(seed)
            return build()
    except InputError:
        raise
    except ValueError as error:
        if form != PLAIN:
            raise InputError(f"blocksearch.channels: {error}") from error
        raise InputError(
            f"blocksearch.cells, for images of {dataset.image_shape[1]}x{dataset.image_shape[2]} "
            f"pixels: {error}"
        ) from error


def make_strategy(
    one: Search,
    config: BlockSearchConfig,
    dataset: Dataset,
    stages: int,
    device: str,
    *,
    recompute: bool = False,
) -> Strategy:
    """Return the strategy of a search, with its supernet, on a device and ready for its first step.

    Args:
        one: The search.
        config: Its table.
        dataset: The images.
        stages: Number of resolutions.
        device: `cpu` or `cuda`.
        recompute: Whether supernets recompute their cells in the backward pass.

    Raises:
        InputError: If the strategy cannot search so: a wrong space, a budget too small.
    """

    def supernet(form: Form) -> Supernet:
        built = build_supernet(config, dataset, stages, one.seed, form)
        built.to(device).to(memory_format=torch.channels_last)
        built.in_bfloat16 = uses_bfloat16(config.precision, torch.device(device))
        built.recompute = recompute
        return built

    return one.method(
        SearchSetup(supernet, config.weights, config.complexity_cost),
        one.method.Config(**dict(one.settings)),
        torch.Generator().manual_seed(one.seed),
    )


def check_searches(
    config: BlockSearchConfig, dataset: Dataset, stages: int, device: str, seed: int
) -> None:
    """Build every strategy once, so that what it cannot search is refused before any work.

    Raises:
        InputError: If a strategy cannot search the space, or keep its budget; it says why.
    """
    for name, builder in config.space.own:
        check_own_op(name, builder, config.channels)
    different = {(one.strategy, one.settings): one for one in config.searches(seed)}
    for one in different.values():
        try:
            make_strategy(one, config, dataset, stages, device)
        except InputError as error:
            raise InputError(f"{one.label}: {error}") from error


def run_search(one: Search, context: SearchContext) -> str | None:
    """Run one search to its end and leave its cells in `blocks/<name>.json`.

    A search that diverges leaves its failure there instead.

    Returns:
        None; or why it ran out of memory, after which it can go on from its last checkpoint.
    """
    began = time.perf_counter()
    try:
        result, peak = _search_from_checkpoint(one, context)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = reason_of(error)
    else:
        context.folder.write_json(_result_name(one), result)
        Checkpoint(_checkpoint_path(context.folder, one)).remove()
        log = context.run.log("blocks", one.name)
        log.write(seconds=time.perf_counter() - began, peak_memory_mib=peak / 2**20)
        return None
    release_memory()  # only here: until then the error held all that the search had
    return reason


def _search_from_checkpoint(one: Search, context: SearchContext) -> tuple[dict[str, Any], int]:
    """Return what a search found, or why it diverged, and its peak memory in bytes."""
    config = context.config
    dataset = context.run.dataset
    strategy: Strategy | None = None
    log = context.run.log("blocks", one.name)
    of = repr((one, config, context.stages, context.run.data.augment, dataset.fingerprint))
    saved = _checkpoint_path(context.folder, one)
    checkpoint = context.run.checkpoint(saved, of, log)
    began = epoch_began = time.perf_counter()
    cells: list[Cells] = []

    def on_epoch(epoch: int, scalars: dict[str, float]) -> None:
        nonlocal epoch_began
        now = time.perf_counter()
        is_rest = checkpoint.restored and epoch_began == began  # of an epoch begun before a kill
        timed = {} if is_rest else {"epoch_s": now - epoch_began}
        log.write(epoch=epoch, **timed, **scalars)
        epoch_began = now

    def whole_search() -> None:
        nonlocal strategy  # built here, so that its supernets count among the memory
        recompute = one.name in context.recompute
        strategy = make_strategy(
            one, config, dataset, context.stages, context.run.device, recompute=recompute
        )
        cells.extend(
            search(
                strategy,
                dataset.search_train,
                dataset.search_valid,
                epochs=config.epochs,
                batch_size=config.batch_size,
                seed=one.seed,
                augment=context.run.data.augment,
                checkpoint=checkpoint,
                on_epoch=on_epoch,
            )
        )

    try:
        peak = peak_bytes(whole_search, context.run.device)
    except TrainingError as error:
        return {"search": one.name, "failure": str(error)}, 0
    assert strategy is not None
    valid, supernet = dataset.search_valid, strategy.supernet
    candidates = [
        {
            "cells": {kind: cell.to_json() for kind, cell in candidate.items()},
            "score": shared_weight_accuracy(supernet, candidate, valid),
        }
        for candidate in cells
    ]
    return {"search": one.name, "candidates": candidates}, peak


def search_blocks(
    context: SearchContext,
    seed: int,
    workers: Workers,
    say: Callable[[str], None] = lambda line: None,
) -> BlockLibrary:
    """Run every search that has no result yet, in workers, and gather the block library.

    Raises:
        InputError: If not one search came to an end.
    """
    searches = context.config.searches(seed)
    found: list[FoundCell] = []
    failures = []
    for one, result in zip(searches, run_searches(context, searches, workers), strict=True):
        if result.failure:
            failures.append(f"{one.name}: {result.failure}")
            say(f"block search {failures[-1]}")
        for cells, score in result.candidates:
            found += [
                FoundCell(cell, base_kind(kind), one.name, score) for kind, cell in cells.items()
            ]
    if not found:
        raise InputError("every block search failed: " + "; ".join(failures))
    dataset_side = context.run.dataset.image_shape[1:]
    return BlockLibrary.from_found(found, dataset_side)


@dataclass(frozen=True)
class SearchResult:
    """What a search left: its candidates, best first, with their scores; or why it failed."""

    candidates: tuple[tuple[Cells, float], ...] = ()
    failure: str | None = None


def run_searches(
    context: SearchContext, searches: Sequence[Search], workers: Workers
) -> list[SearchResult]:
    """Run those searches that have no result yet in workers, and return the results of all.

    Raises:
        InputError: If memory does not suffice, or a result is damaged.
    """
    path = context.folder.path

    def read(one: Search) -> SearchResult:
        parse = partial(_result_of, own=context.config.space.own)
        return context.folder.load(_result_name(one), parse)

    missing = [one for one in searches if not (path / _result_name(one)).exists()]
    for one in searches:
        if one not in missing:
            read(one)  # damage is told before hours of work
            Checkpoint(_checkpoint_path(context.folder, one)).remove()  # a kill may have left it
    (path / BLOCKS).mkdir(parents=True, exist_ok=True)
    threads = threads_of(searches, workers.cores)
    enough = replace(workers, count=min(workers.count, len(searches)))
    _run_each({one.name: one for one in missing}, context, enough, threads)
    return [read(one) for one in searches]


def _run_each(
    searches: Mapping[str, Search], context: SearchContext, workers: Workers, threads: int
) -> None:
    """Run searches; those for which memory does not suffice once again, with cells recomputed.

    In new workers: memory that a search has cut into pieces does not all come back.

    Raises:
        InputError: If memory does not suffice then either.
    """
    left, is_again = dict(searches), False
    while left:
        short: dict[str, Search] = {}
        tasks = {name: (one, context) for name, one in left.items()}
        for name, outcome in run_tasks(run_search, tasks, workers, threads, anew=is_again):
            if outcome is None:
                continue
            died = isinstance(outcome, WorkerDied)
            why = f"{outcome}; is there enough memory?" if died else f"out of memory ({outcome})"
            if name in context.recompute:
                raise InputError(
                    f"block search {name}: {why}, even with its cells recomputed; lower "
                    "blocksearch.batch_size or blocksearch.channels"
                )
            context.run.log("blocks", name).write(
                warning=f"{why}; the search starts again from its last checkpoint and recomputes "
                "its cells in the backward pass: slower, but with the same result"
            )
            short[name] = left[name]
        context = replace(context, recompute=context.recompute.union(short))
        left, is_again = short, True


def threads_of(searches: Sequence[Search], workers: int) -> int:
    """Return the compute threads of a search, so that all of them use `workers` threads.

    By all searches and not by those that are left: another number of threads rounds otherwise.
    """
    return max(1, workers // len(searches))


def _result_name(one: Search) -> str:
    return f"{BLOCKS}/{one.name}.json"


def _checkpoint_path(folder: RunFolder, one: Search) -> Path:
    return folder.path / BLOCKS / f"{one.name}.ckpt"


def _result_of(data: Any, own: OwnOps) -> SearchResult:
    if "failure" in data:
        return SearchResult(failure=str(data["failure"]))
    candidates = [
        (
            {str(kind): Cell.from_json(cell, own) for kind, cell in one["cells"].items()},
            float(one["score"]),
        )
        for one in data["candidates"]
    ]
    return SearchResult(tuple(candidates))
