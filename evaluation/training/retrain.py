"""Retrain networks from scratch on the full train split; only here the test split is read."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from evaluation.files.names import WEIGHTS
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.checkpoint import Checkpoint
from evaluation.training.context import RunContext, blame
from evaluation.training.loop import TrainConfig, correct, seeded_model, train
from evaluation.training.weights import weights_of
from evaluation.workers.pool import run_tasks
from evaluation.workers.workers import Workers

MAX_RETRAINED = 10_000


class RetrainConfig(BaseModel):
    """Which Pareto members are trained from scratch, how often, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: int = Field(ge=1, le=MAX_RETRAINED)
    baselines: int = Field(ge=0, le=MAX_RETRAINED)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    train: TrainConfig

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("expected distinct seeds")
        return seeds


@dataclass(frozen=True)
class RetrainJob:
    """A network to retrain.

    Attributes:
        folder: Of its group in the run.
        record: What is known of it.
        build: Returns it with fresh weights.
        description: What stands beside its weights, so that the file says what they are of.
        keep_weights: Whether those of the first seed stay.
    """

    folder: str
    record: ModelRecord
    build: Callable[[], nn.Module]
    description: str = ""
    keep_weights: bool = True

    @property
    def place(self) -> str:
        """Its own folder in the run."""
        return f"{self.folder}/{self.record.id}"


def retrain_all(
    jobs: Sequence[RetrainJob],
    config: RetrainConfig,
    out: RunFolder,
    context: RunContext,
    workers: Workers,
) -> list[ModelRecord]:
    """Retrain every network with every seed in workers, and leave a `record.json` for each.

    The weights of the first seed are kept, not those of the best: the test split chooses nothing.

    Returns:
        The records with their test accuracies; with a failure where a training went wrong.
    """
    tasks = {
        (job, seed): (
            job.build,
            seed,
            out,
            job.place,
            context,
            config.train,
            job.description if job.keep_weights and seed == config.seeds[0] else None,
        )
        for job in jobs
        for seed in config.seeds
    }
    for job in jobs:
        (out.path / job.place).mkdir(parents=True, exist_ok=True)
    results = dict(run_tasks(retrain, tasks, workers))
    records = []
    for job in jobs:
        accuracies = [results[job, seed] for seed in config.seeds]
        good = tuple(a for a in accuracies if isinstance(a, float))
        if len(good) == len(accuracies):
            record = job.record.retrained(good, config.seeds)
        else:
            reason = next(str(a) for a in accuracies if not isinstance(a, float))
            record = replace(job.record, failure=f"retraining: {reason}")
        out.write_json(f"{job.place}/record.json", record.to_json())
        records.append(record)
    return records


def retrain(
    build: Callable[[], nn.Module],
    seed: int,
    out: RunFolder,
    place: str,
    context: RunContext,
    recipe: TrainConfig,
    description: str | None,
) -> float | str:
    """Train one network from scratch with one seed and return its test accuracy in [0, 1].

    The result stays in its place as `seed-<seed>.json`, with the numbers of the test images that
    the network got wrong; a retraining that finds its files returns it, one that finds its
    checkpoint goes on from there. One that diverges or runs out of memory returns the reason
    instead, and leaves no result.

    Args:
        build: Returns the network with fresh weights drawn from torch's global generator.
        seed: Of the initial weights, the order of the images and the augmentation.
        out: Folder of the run.
        place: Where in it this network's files go.
        context: Images, device, event log.
        recipe: Of the training.
        description: The weights stay as `weights.safetensors`, with this in the header; None keeps
            none.
    """
    folder, result, weights = out.path / place, f"{place}/seed-{seed}.json", f"{place}/{WEIGHTS}"
    saved, keeps = folder / f"seed-{seed}.ckpt", description is not None
    if (out.path / result).exists() and (not keeps or (out.path / weights).exists()):
        Checkpoint(saved).remove()  # a kill may have left it
        if keeps:
            out.check(weights)
        return out.load(result, _test_accuracy)
    folder.mkdir(exist_ok=True)  # not those above: a run folder that has vanished stays away
    dataset = context.dataset
    model = seeded_model(build, seed, context.device)
    log = context.log("retrain", f"{folder.name}/{seed}")
    augment = context.data.augment
    of = repr((folder.name, seed, model, recipe, augment, dataset.fingerprint))
    checkpoint = context.checkpoint(saved, of, log)
    began = time.perf_counter()
    try:
        train(
            model,
            dataset.train,
            recipe,
            seed=seed,
            augment=augment,
            checkpoint=checkpoint,
            on_epoch=lambda epoch, loss: log.write(epoch=epoch, loss=loss),
        )
        right = correct(model, dataset.test)
    except Exception as error:
        return blame(error)
    if keeps:
        out.write(weights, weights_of(model, description or ""))
    test_accuracy = float(right.sum()) / len(right)
    wrong = (~right).nonzero().flatten().tolist()
    out.write_json(result, {"seed": seed, "test_accuracy": test_accuracy, "wrong": wrong})
    checkpoint.remove()
    log.write(test_accuracy=test_accuracy, seconds=time.perf_counter() - began)
    return test_accuracy


def _test_accuracy(data: Any) -> float:
    accuracy = float(data["test_accuracy"])
    if not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy is a fraction in [0, 1], got {accuracy}")
    return accuracy
