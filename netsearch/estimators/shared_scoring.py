"""Shared weights as an estimator: trained once, then any network is scored in seconds.

A network that is scored has the statistics of its BatchNorms measured anew, as Yu and Huang do
(2019, https://arxiv.org/abs/1903.05134). `benchmarks/shared_ranking.py` measures how well the
scores rank networks.
"""

import functools
import time
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn

from blocksearch.space import OwnOps
from evaluation.data.batches import batches
from evaluation.data.dataset import Dataset
from evaluation.errors import InputError
from evaluation.files.names import SHARED_WEIGHTS
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext, blame
from evaluation.training.loop import TrainConfig, accuracy
from evaluation.workers.pool import run_tasks
from evaluation.workers.workers import Workers
from netsearch.estimators.protocol import EstimateSettings, Estimator, Judge
from netsearch.estimators.shared_training import SharedWeightsConfig, train_shared
from netsearch.estimators.shared_weights import SharedWeights, batch_norms
from netsearch.space.genome import NetworkSpec
from netsearch.space.problem import NetworkProblem

SHARED_STAGE = "shared_weights"  # of the event log
CALIBRATION_BATCH = 250


@dataclass(frozen=True)
class SharedScoring(Estimator):
    """Judge networks by weights that all of them share; there is but one fidelity."""

    context: RunContext
    recipe: TrainConfig
    settings: SharedWeightsConfig
    folder: RunFolder
    prepares: ClassVar[str] = SHARED_STAGE
    shares_weights: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: EstimateSettings, context: RunContext, folder: RunFolder) -> Self:
        """Build it for a run."""
        return cls(context, settings.train, settings.shared_weights, folder)

    @classmethod
    def check(cls, settings: EstimateSettings) -> None:
        """Refuse averages of weights, which the shared ones have none of.

        Raises:
            ValueError: If the recipe asks for them.
        """
        if settings.train.ema_decay > 0:
            raise ValueError("train.ema_decay: shared weights are not averaged; expected 0")

    @property
    def checked(self) -> int:
        """Networks that are also trained for a short time."""
        return self.settings.checked

    @property
    def epochs_ahead(self) -> int:
        """Epochs of the training of the shared weights."""
        return self.settings.epochs

    def prepare(self, problem: NetworkProblem, workers: Workers) -> None:
        """Train the shared weights, in this process, on all its cores.

        Raises:
            InputError: If they cannot be trained.
        """
        task = (problem, self.settings, self.context, self.recipe, self.folder)
        cores = workers.cores
        for _, failure in run_tasks(train_shared_weights, {"weights": task}, Workers(1), cores):
            if failure is not None:
                raise InputError(f"shared weights could not be trained: {failure}")

    @property
    def judge(self) -> Judge:
        """What a worker calls."""
        return estimate_shared

    def arguments(
        self, blank: ModelRecord, problem: NetworkProblem, fidelity: float
    ) -> tuple[object, ...]:
        """Return with what it is called for one network."""
        spec, images = problem.space.decode(blank.genome), self.settings.calibration_images
        return blank, spec, self.context, self.folder, images, problem.networks.own


def train_shared_weights(
    problem: NetworkProblem,
    config: SharedWeightsConfig,
    context: RunContext,
    recipe: TrainConfig,
    folder: RunFolder,
) -> str | None:
    """Train the weights of a problem's networks into a run's folder, unless they are there.

    A killed training goes on from its checkpoint.

    Returns:
        Why it failed, None when it did not.
    """
    path = folder.path / SHARED_WEIGHTS
    saved = path.with_suffix(".ckpt")
    if path.exists():
        Checkpoint(saved).remove()  # a kill may have left it
        return None
    dataset = context.dataset
    shared = SharedWeights(problem.networks, seed=context.data_seed).to(context.device)
    log = context.log(SHARED_STAGE, "weights")
    of = repr((problem.space, dict(problem.networks.cells), problem.budgets, config, recipe))
    of += repr((context.data_seed, context.data.augment, dataset.fingerprint))
    checkpoint = context.checkpoint(saved, of, log)
    began = time.perf_counter()
    try:
        train_shared(
            shared,
            dataset,
            config,
            recipe,
            seed=context.data_seed,
            augment=context.data.augment,
            fits=lambda genome: bool(problem.excess([genome])[0] <= 0),
            checkpoint=checkpoint,
            on_epoch=lambda epoch, loss: log.write(epoch=epoch, loss=loss),
        )
    except Exception as error:
        return blame(error)
    folder.write(SHARED_WEIGHTS, shared.to_bytes())
    checkpoint.remove()
    log.write(seconds=time.perf_counter() - began)
    return None


def calibrate(network: nn.Module, dataset: Dataset, images: int) -> None:
    """Measure the statistics of a network's BatchNorms anew, on `images` of `search_train`.

    They become the means over batches of the same images, not augmented, for every network.
    """
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    network.train()
    split = dataset.search_train
    images = min(images, len(split))
    count = -(-images // CALIBRATION_BATCH)
    size = images // count
    with torch.no_grad():
        stream = batches(split, size, torch.Generator().manual_seed(0))
        for _, (batch, _labels) in zip(range(count), stream, strict=False):
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def score(
    shared: SharedWeights, spec: NetworkSpec, dataset: Dataset, calibration_images: int
) -> float:
    """Return the accuracy in [0, 1] on `search_valid` of a network with shared weights.

    Deterministic; the store stays as it is.

    Args:
        shared: The trained store, on the device of `dataset`.
        spec: The network.
        dataset: Its `search_train` calibrates, its `search_valid` is judged on.
        calibration_images: See `calibrate`.

    Raises:
        InputError: If the network is not in the space.
        TrainingError: If a logit is not finite.
    """
    network = shared.network(spec)
    calibrate(network, dataset, calibration_images)
    return accuracy(network, dataset.search_valid)


def estimate_shared(
    record: ModelRecord,
    spec: NetworkSpec,
    context: RunContext,
    folder: RunFolder,
    images: int,
    own: OwnOps = (),
) -> ModelRecord:
    """Return `record` with the accuracy of `score`, for a worker process.

    A network that does not fit into memory or has logits that are not finite comes back with the
    reason as its `failure` and no accuracy.

    Args:
        record: What is known of the network.
        spec: The network.
        context: Images, device, event log.
        folder: Of the run, with the shared weights.
        images: On which BatchNorm's statistics are measured.
        own: A user's own ops.

    Raises:
        InputError: If the weights cannot be read, or the network is not in their space.
    """
    began = time.perf_counter()
    dataset = context.dataset
    changed_ns = (folder.path / SHARED_WEIGHTS).stat().st_mtime_ns
    shared = _worker_weights(folder, changed_ns, context.device, own)
    try:
        found = score(shared, spec, dataset, images)
        record = replace(record, valid_accuracy=found)
    except Exception as error:
        record = replace(record, failure=blame(error))
    context.log("networks", record.id).write(
        valid_accuracy=record.valid_accuracy, seconds=time.perf_counter() - began
    )
    return record


@functools.lru_cache(maxsize=1)
def _worker_weights(folder: RunFolder, changed_ns: int, device: str, own: OwnOps) -> SharedWeights:
    """Load shared weights onto a device, once per process and state of the file."""
    folder.check(SHARED_WEIGHTS)
    return SharedWeights.load(folder.path / SHARED_WEIGHTS, own).to(device)
