"""Proxy training: a network is as good as it is after a short training."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from blocksearch.supernet.stack import Stack
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext, blame
from evaluation.training.loop import TrainConfig, accuracy, seeded_model, train
from netsearch.estimators.protocol import EstimateSettings, Estimator, Judge
from netsearch.space.problem import NetworkProblem


def estimate(
    record: ModelRecord, build: Stack, context: RunContext, recipe: TrainConfig
) -> ModelRecord:
    """Return `record` with the accuracy on `search_valid` after proxy training on `search_train`.

    A network that cannot be built, raises, does not fit into memory or diverges comes back with the
    reason as its `failure` and no accuracy.

    Raises:
        AcceleratorError: If the device is broken.
        OSError: If a file cannot be read or written.
    """
    began = time.perf_counter()
    dataset = context.dataset
    try:
        model = seeded_model(build, record.seed, context.device)
        train(
            model,
            dataset.search_train,
            recipe,
            seed=record.seed,
            augment=context.data.augment,
        )
        record = replace(record, valid_accuracy=accuracy(model, dataset.search_valid))
    except Exception as error:
        record = replace(record, failure=blame(error))
    context.log("networks", record.id).write(
        valid_accuracy=record.valid_accuracy, seconds=time.perf_counter() - began
    )
    return record


def proxy_epochs(epochs: int, fidelity: float) -> int:
    """Return the epochs of a proxy training at a fidelity in (0, 1]."""
    return max(1, round(epochs * fidelity))


@dataclass(frozen=True)
class ProxyTraining(Estimator):
    """Judge networks by training each for a short time; a fidelity is its part of the epochs."""

    context: RunContext
    recipe: TrainConfig
    fidelities: ClassVar[bool] = True

    @classmethod
    def of(cls, settings: EstimateSettings, context: RunContext, folder: RunFolder) -> Self:
        """Build it for a run."""
        return cls(context, settings.train)

    @property
    def judge(self) -> Judge:
        """What a worker calls."""
        return estimate

    def arguments(
        self, blank: ModelRecord, problem: NetworkProblem, fidelity: float
    ) -> tuple[object, ...]:
        """Return with what it is called for one network."""
        epochs = proxy_epochs(self.recipe.epochs, fidelity)
        recipe = self.recipe.model_copy(update={"epochs": epochs})
        return blank, problem.stack(blank.genome), self.context, recipe
