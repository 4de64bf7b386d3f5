"""A forecast of the time and memory of a run, from timed steps of each kind, before it begins."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blocksearch.config import BlockSearchConfig
from blocksearch.search import threads_of
from evaluation.data.config import DataConfig
from evaluation.data.dataset import Dataset
from evaluation.training.retrain import RetrainConfig
from evaluation.words import duration
from evaluation.workers.workers import Workers
from netsearch.config import NetSearchConfig
from netsearch.forecast.memory_check import by_form
from netsearch.forecast.timed_steps import (
    NetworkTimes,
    mean_builds,
    mean_network,
    ready_made,
    steps_of,
    time_network,
    time_search,
    time_shared_step,
)
from netsearch.space.problem import OwnCost

# Of this process when all was loaded, which each worker loads too: the CPU's seconds, since
# a worker reads files that are in memory by then.
LOADED_CPU_S, LOADED_AT_S = time.process_time(), time.perf_counter()
# Of such a start: about what the report and the end of the processes take, which load and unload
# libraries. A rough figure, from tiny runs.
END_STARTS = 0.75
STAGES = ("blocks", "networks", "retrain")


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        data: Table of the config.
        blocks: Table of the config.
        networks: Table of the config.
        retraining: Table of the config.
        workers: Where, and how many at the same time.
        until: The last stage, one of `STAGES`.
        seed: Of the run.
        costs: A user's own.
    """

    data: DataConfig
    blocks: BlockSearchConfig
    networks: NetSearchConfig
    retraining: RetrainConfig
    workers: Workers
    until: str = "retrain"
    seed: int = 0
    costs: tuple[OwnCost, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages up to the last one."""
        return STAGES[: STAGES.index(self.until) + 1]


@dataclass(frozen=True)
class Times:
    """The seconds that were measured; what the plan does not need is left out.

    Attributes:
        start_s: Until a worker process can compute.
        search_s: Form of a block search -> a mean step.
        network: Of a mean network of the space.
        ready_made: Of a ready-made network.
        shared_step_s: Of a step of shared weights.
    """

    start_s: float
    search_s: Mapping[tuple[Any, ...], float]
    network: NetworkTimes | None = None
    ready_made: NetworkTimes | None = None
    shared_step_s: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """How many images each split has: the two that search sees, train and test."""

    search_train_images: int
    search_valid_images: int
    train_images: int
    test_images: int


@dataclass(frozen=True)
class Forecast:
    """Seconds of wall-clock time, and memory in MiB of one process or of the GPU.

    Attributes:
        elapsed_s: Gone since the process began.
        stages_s: Each stage, with the start of its workers.
        end_s: Of the report and of the end of the processes.
        memory_mib: Of a worker.
    """

    elapsed_s: float
    stages_s: Mapping[str, float]
    end_s: float
    memory_mib: float

    @property
    def total_s(self) -> float:
        """Of the whole process."""
        return self.elapsed_s + sum(self.stages_s.values()) + self.end_s

    def __str__(self) -> str:
        """Say it to people."""
        names = {"blocks": "blocks", "networks": "networks", "retrain": "retraining"}
        parts = [f"{names[stage]} {duration(s)}" for stage, s in self.stages_s.items()]
        around = f"start and end {duration(self.elapsed_s + self.end_s)}"
        return (
            f"forecast from timed steps: about {duration(self.total_s)} "
            f"({', '.join([*parts, around])}), {self.memory_mib:.0f} MiB in each worker"
        )


def forecast(
    dataset: Dataset, plan: Plan, *, device: str, recompute: frozenset[str] = frozenset()
) -> Forecast:
    """Time some steps of all that the plan holds, after one each that warms up.

    Args:
        dataset: The images.
        plan: What the run does.
        device: `cpu` or `cuda`.
        recompute: Names of block searches that recompute their cells, as `check_memory` returns.
    """
    threads = torch.get_num_threads()
    try:
        times = measure(dataset, plan, device, recompute)
    finally:
        torch.set_num_threads(threads)
    sizes = Sizes(
        search_train_images=len(dataset.search_train),
        search_valid_images=len(dataset.search_valid),
        train_images=len(dataset.train),
        test_images=len(dataset.test),
    )
    stages_s = reckon(plan, times, sizes)
    elapsed_s = LOADED_CPU_S + time.perf_counter() - LOADED_AT_S
    return Forecast(elapsed_s, stages_s, END_STARTS * times.start_s, _peak_mib(device))


def measure(dataset: Dataset, plan: Plan, device: str, recompute: frozenset[str]) -> Times:
    """Time what the stages consist of; leaves one thread, as workers have."""
    blocks, networks, retraining = plan.blocks, plan.networks, plan.retraining
    searches, cores, augment = blocks.searches(seed=0), plan.workers.cores, plan.data.augment
    torch.set_num_threads(threads_of(searches, cores))
    search_s = {
        form: time_search(one, blocks, dataset, augment, device, one.name in recompute)
        for form, one in by_form(searches).items()
    }
    found: dict[str, Any] = {}
    if "networks" in plan.stages and networks.estimator.shares_weights:
        torch.set_num_threads(cores)
        found["shared_step_s"] = time_shared_step(dataset, blocks, networks, augment, device)
    torch.set_num_threads(1)
    if "networks" in plan.stages:
        recipes, builds = (networks.train, retraining.train), mean_builds(dataset, blocks, networks)
        timed = [time_network(one, dataset, recipes, augment, device) for one in builds]
        found["network"] = mean_network(timed)
        if "retrain" in plan.stages and retraining.baselines:
            near = ready_made(dataset, builds[len(builds) // 2].cost().params)
            found["ready_made"] = time_network(near, dataset, recipes, augment, device)
    return Times(LOADED_CPU_S, search_s, **found)


def reckon(plan: Plan, times: Times, sizes: Sizes) -> dict[str, float]:
    """Return the seconds of each stage, with the start of its workers."""
    stages = {"blocks": _blocks_s, "networks": _networks_s, "retrain": _retrain_s}
    found: dict[str, float] = {}
    running = 0
    for stage in plan.stages:
        count = _processes(plan, stage)
        starts_s = times.start_s if count not in (0, running) else 0.0
        running = count or running
        found[stage] = starts_s + stages[stage](plan, times, sizes)
    return found


def _processes(plan: Plan, stage: str) -> int:
    """Return how many processes `run_tasks` starts for a stage; 0 where this one computes."""
    workers = plan.workers
    count = min(workers.count, len(plan.blocks.searches(0))) if stage == "blocks" else workers.count
    minutes = workers.evaluation_minutes if stage == "networks" else None
    here = workers.backend == "loky" and workers.memory_mib is None and minutes is None
    return 0 if here and count == 1 else count


def _blocks_s(plan: Plan, times: Times, sizes: Sizes) -> float:
    steps = plan.blocks.epochs * steps_of(sizes.search_train_images, plan.blocks.batch_size)
    seconds = [steps * times.search_s[one.form] for one in plan.blocks.searches(0)]
    return side_by_side(seconds, plan.workers.count)


def _networks_s(plan: Plan, times: Times, sizes: Sizes) -> float:
    config, workers, network = plan.networks, plan.workers.count, times.network
    assert network is not None
    training_s = network.training_s(
        config.train, sizes.search_train_images, sizes.search_valid_images
    )
    searches = 2 if config.random_search else 1
    if not config.estimator.shares_weights:
        return side_by_side([training_s] * config.evaluations, workers) * searches
    shared = config.shared_weights
    calibrated = min(shared.calibration_images, sizes.search_train_images)
    score_s = network.build_s + (calibrated + sizes.search_valid_images) * network.image_s
    steps = shared.epochs * steps_of(sizes.search_train_images, config.train.batch_size)
    judged_s = side_by_side([score_s] * config.evaluations, workers) * searches
    checked_s = side_by_side([training_s] * shared.checked, workers)
    return steps * times.shared_step_s + judged_s + checked_s


def _retrain_s(plan: Plan, times: Times, sizes: Sizes) -> float:
    config, network, ready_made = plan.retraining, times.network, times.ready_made
    assert network is not None
    beside = min(config.members, config.baselines)
    seconds = [network.training_s(config.train, sizes.train_images, sizes.test_images)] * (
        (config.members + beside) * len(config.seeds)
    )
    if ready_made is not None:
        one_s = ready_made.training_s(config.train, sizes.train_images, sizes.test_images)
        seconds += [one_s] * (beside * len(config.seeds))
    return side_by_side(seconds, plan.workers.count)


def side_by_side(seconds: Sequence[float], workers: int) -> float:
    """Return the seconds until tasks are done that workers take one by one, in that order."""
    busy = [0.0] * min(workers, max(1, len(seconds)))
    for one in seconds:
        busy[busy.index(min(busy))] += one
    return max(busy)


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
