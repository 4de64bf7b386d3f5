"""Retrain networks from scratch on the full train split; only here the test split is read."""

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import nn

from evaluation.data import worker_dataset
from evaluation.metrics import MetricsLog
from evaluation.records import read_json, write_atomic, write_json
from evaluation.training import TrainConfig, TrainingContext, accuracy, seeded_model, train


class RetrainConfig(BaseModel):
    """Which Pareto members are trained from scratch, how often, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    members: int = Field(ge=1)
    baselines: int = Field(ge=0)
    seeds: tuple[int, ...] = Field(min_length=1)
    train: TrainConfig


def retrain(
    build: Callable[[], nn.Module], seed: int, folder: Path, context: TrainingContext
) -> float:
    """Train one network from scratch with one seed and return its test accuracy in [0, 1].

    The result stays in `folder` as `seed-<seed>.json`, the weights as
    `weights-seed-<seed>.safetensors`; a retraining that finds its result returns it, one that
    finds its checkpoint goes on from there.

    Args:
        build: Returns the network with fresh weights drawn from torch's global generator.
        seed: Of the initial weights, the order of the images and the augmentation.
        folder: Where this network's files go.
        context: Data, recipe and device.
    """
    result = folder / f"seed-{seed}.json"
    if result.exists():
        return float(read_json(result)["test_accuracy"])
    dataset = worker_dataset(context.data, context.data_seed, context.device)
    model = seeded_model(build, seed, context.device)
    log = MetricsLog(context.metrics, "retrain", f"{folder.name}/{seed}")
    checkpoint = folder / f"seed-{seed}.ckpt"
    began = time.perf_counter()
    train(
        model,
        dataset.train,
        context.recipe,
        seed=seed,
        augment=context.data.augment,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: log.write(epoch=epoch, loss=loss),
    )
    test_accuracy = accuracy(model, dataset.test)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(folder / f"weights-seed-{seed}.safetensors", save(state))
    write_json(result, {"seed": seed, "test_accuracy": test_accuracy})
    checkpoint.unlink(missing_ok=True)
    log.write(test_accuracy=test_accuracy, seconds=time.perf_counter() - began)
    return test_accuracy
