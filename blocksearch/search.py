"""Stage one as the pipeline runs it: every configured search in a worker, then the library."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blocksearch import nas_bench_201
from blocksearch.engine import (
    Cells,
    SearchSetup,
    Strategy,
    WeightConfig,
    search,
    shared_weight_accuracy,
)
from blocksearch.forms import PLAIN, Form
from blocksearch.library import BlockLibrary, FoundCell
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS
from blocksearch.space import MOST_NODES, Cell, SearchSpace, base_kind
from blocksearch.strategies import STRATEGIES
from blocksearch.supernet import Supernet
from evaluation.checkpoint import Checkpoint
from evaluation.data import DataConfig, Dataset, worker_dataset
from evaluation.errors import InputError
from evaluation.memory import peak_bytes, require_room
from evaluation.metrics import MetricsLog
from evaluation.parallel import WorkerDied, Workers, run_tasks
from evaluation.records import read_json, write_json
from evaluation.training import MOST_COUNTED, Precision, TrainingError, uses_bfloat16

OP_SETS = {"darts": DARTS_OPS, "light": LIGHT_OPS}
MOST_SEARCHES, MOST_CHANNELS, MOST_CELLS = 1000, 4096, 100
SEED_STRIDE = 1000  # distance between the search seeds of two run seeds


class BlockSearchConfig(BaseModel):
    """The table `blocksearch`: the space, the supernet, and which strategies search it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ops: Literal["light", "darts", "nas_bench_201"] | tuple[str, ...]
    nodes: int = Field(ge=1, le=6)
    edges_per_node: int = Field(ge=1, le=MOST_NODES)
    channels: int = Field(ge=4, multiple_of=4, le=MOST_CHANNELS)
    cells: int = Field(ge=2, le=MOST_CELLS)
    epochs: int = Field(ge=1, le=MOST_COUNTED)
    batch_size: int = Field(ge=2, le=MOST_COUNTED)
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEED_STRIDE)], ...] = Field(min_length=1)
    complexity_cost: Literal["params", "flops"]
    precision: Precision = "float32"
    weights: WeightConfig
    strategies: dict[str, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "BlockSearchConfig":
        fixed = nas_bench_201.SPACE
        if self.ops == "nas_bench_201" and (self.nodes, self.edges_per_node) != (
            fixed.nodes,
            fixed.edges_per_node,
        ):
            raise ValueError(
                f"ops: nas_bench_201 has nodes: {fixed.nodes} and edges_per_node: "
                f"{fixed.edges_per_node}, got {self.nodes} and {self.edges_per_node}"
            )
        unknown = [op for op in self.space.ops if op not in OPS]
        if unknown:
            raise ValueError(f"ops: unknown {unknown}; there are {', '.join(OPS)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: expected distinct seeds")
        self.searches(seed=0)
        return self

    @property
    def space(self) -> SearchSpace:
        """The search space of the cells."""
        if self.ops == "nas_bench_201":
            return nas_bench_201.SPACE
        ops = OP_SETS[self.ops] if isinstance(self.ops, str) else self.ops
        return SearchSpace(ops, self.nodes, edges_per_node=self.edges_per_node)

    def searches(self, seed: int) -> list["Search"]:
        """Return every search to run: strategies x swept settings x seeds.

        A setting of a strategy that is given as a list is swept, one search per value.

        Raises:
            ValueError: If a strategy or one of its settings is unknown or out of range.
        """
        self._check_count()
        found = []
        for strategy, settings in self.strategies.items():
            if strategy not in STRATEGIES:
                raise ValueError(
                    f"strategies: unknown {strategy!r}; there are {', '.join(sorted(STRATEGIES))}"
                )
            swept = {key: v if isinstance(v, list) else [v] for key, v in settings.items()}
            for key, options in swept.items():
                if not options or any(options.count(option) > 1 for option in options):
                    raise ValueError(f"strategies.{strategy}.{key}: expected distinct values")
            for values in product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                try:
                    STRATEGIES[strategy].Config(**chosen)
                except ValidationError as error:
                    first = error.errors()[0]
                    key = ".".join(str(part) for part in first["loc"])
                    raise ValueError(
                        f"strategies.{strategy}.{key}: {first['msg']}, got {first['input']!r}"
                    ) from error
                label = [f"{k}={v}" for k, v in chosen.items() if len(swept[k]) > 1]
                for own_seed in self.seeds:
                    name = "-".join([strategy, *label, f"s{own_seed}"])
                    found.append(
                        Search(name, strategy, tuple(chosen.items()), seed * SEED_STRIDE + own_seed)
                    )
        return found

    def _check_count(self) -> None:
        """Refuse lists whose product would be searches without end, without making it."""
        lists = {
            name: [len(values) for values in settings.values() if isinstance(values, list)]
            for name, settings in self.strategies.items()
        }
        count = sum(map(math.prod, lists.values())) * len(self.seeds)
        if count > MOST_SEARCHES:
            largest = max(lists, key=lambda name: math.prod(lists[name]))
            raise ValueError(
                f"strategies.{largest}: expected lists and seeds that make at most "
                f"{MOST_SEARCHES:,} searches, got {count if count < 10**18 else '10**18 or more'}"
            )


@dataclass(frozen=True)
class Search:
    """One block search: a strategy with its settings and seed."""

    name: str
    strategy: str
    settings: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides how long a step takes and what it holds: all settings that are no floats."""
        ways = [(key, value) for key, value in self.settings if not isinstance(value, float)]
        return self.strategy, *ways

    @property
    def label(self) -> str:
        """The name without the seed: the strategy, and the settings that are swept."""
        return self.name.rpartition("-s")[0]


@dataclass(frozen=True)
class SearchContext:
    """What every search of a run has in common; small, since it is sent to the workers."""

    config: BlockSearchConfig
    data: DataConfig
    data_seed: int
    stages: int
    device: str
    folder: Path
    metrics: Path


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
    one: Search, config: BlockSearchConfig, dataset: Dataset, stages: int, device: str
) -> Strategy:
    """Return the strategy of a search, with its supernet, on a device and ready for its first step.

    Raises:
        InputError: If the strategy cannot search so: a wrong space, a budget too small.
    """

    def supernet(form: Form) -> Supernet:
        built = build_supernet(config, dataset, stages, one.seed, form)
        built.to(device).to(memory_format=torch.channels_last)
        built.in_bfloat16 = uses_bfloat16(config.precision, torch.device(device))
        return built

    strategy = STRATEGIES[one.strategy]
    return strategy(
        SearchSetup(supernet, config.weights, config.complexity_cost),
        strategy.Config(**dict(one.settings)),
        torch.Generator().manual_seed(one.seed),
    )


def check_searches(
    config: BlockSearchConfig, dataset: Dataset, stages: int, device: str, seed: int
) -> None:
    """Build every strategy once, so that what it cannot search is refused before any work.

    Raises:
        InputError: If a strategy cannot search the space, or keep its budget; it says why.
    """
    different = {(one.strategy, one.settings): one for one in config.searches(seed)}
    for one in different.values():
        try:
            make_strategy(one, config, dataset, stages, device)
        except InputError as error:
            raise InputError(f"{one.label}: {error}") from error


def run_search(one: Search, context: SearchContext) -> None:
    """Run one search to its end and leave its cells in `<folder>/<name>.json`.

    A search that diverges leaves its failure there instead.
    """
    config = context.config
    dataset = worker_dataset(context.data, context.data_seed, context.device)
    strategy: Strategy | None = None
    log = MetricsLog(context.metrics, "blocks", one.name)
    of = repr((one, config, context.stages, context.data.augment, dataset.fingerprint))
    saved = _checkpoint_path(context.folder, one)
    checkpoint = Checkpoint(saved, of, say=lambda line: log.write(warning=line))
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
        strategy = make_strategy(one, config, dataset, context.stages, context.device)
        cells.extend(
            search(
                strategy,
                dataset.search_train,
                dataset.search_valid,
                epochs=config.epochs,
                batch_size=config.batch_size,
                seed=one.seed,
                augment=context.data.augment,
                checkpoint=checkpoint,
                on_epoch=on_epoch,
            )
        )

    peak = 0
    try:
        peak = peak_bytes(whole_search, context.device)
    except TrainingError as error:
        result: dict[str, Any] = {"search": one.name, "failure": str(error)}
    else:
        assert strategy is not None
        valid, supernet = dataset.search_valid, strategy.supernet
        candidates = [
            {
                "cells": {kind: cell.to_json() for kind, cell in candidate.items()},
                "score": shared_weight_accuracy(supernet, candidate, valid),
            }
            for candidate in cells
        ]
        result = {"search": one.name, "candidates": candidates}
    write_json(_result_path(context.folder, one), result)
    checkpoint.remove()
    log.write(seconds=time.perf_counter() - began, peak_memory_mib=peak / 2**20)


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
    dataset_side = worker_dataset(context.data, context.data_seed, context.device).image_shape[1:]
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
        InputError: If a worker died, or a result is damaged.
    """
    missing = [one for one in searches if not _result_path(context.folder, one).exists()]
    for one in searches:
        if one not in missing:
            _read_result(_result_path(context.folder, one))  # damage is told before hours of work
            Checkpoint(_checkpoint_path(context.folder, one)).remove()  # a kill may have left it
    context.folder.mkdir(parents=True, exist_ok=True)
    tasks = {one.name: (one, context) for one in missing}
    threads = threads_of(searches, workers.cores)
    enough = replace(workers, count=min(workers.count, len(searches)))
    for name, outcome in run_tasks(run_search, tasks, enough, threads):
        if isinstance(outcome, WorkerDied):
            raise InputError(f"block search {name}: {outcome}; is there enough memory?")
    return [_read_result(_result_path(context.folder, one)) for one in searches]


def threads_of(searches: Sequence[Search], workers: int) -> int:
    """Return the compute threads of a search, so that all of them use `workers` threads.

    By all searches and not by those that are left: another number of threads rounds otherwise.
    """
    return max(1, workers // len(searches))


def _result_path(folder: Path, one: Search) -> Path:
    return folder / f"{one.name}.json"


def _checkpoint_path(folder: Path, one: Search) -> Path:
    return folder / f"{one.name}.ckpt"


def _read_result(path: Path) -> SearchResult:
    result = read_json(path)
    try:
        if "failure" in result:
            return SearchResult(failure=str(result["failure"]))
        candidates = [
            (
                {str(kind): Cell.from_json(cell) for kind, cell in one["cells"].items()},
                float(one["score"]),
            )
            for one in result["candidates"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it to search again") from error
    return SearchResult(tuple(candidates))
