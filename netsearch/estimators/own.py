"""A user's own estimator: any function that gives a network an accuracy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from blocksearch.supernet.stack import Stack
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext, blame
from netsearch.estimators.protocol import EstimateSettings, Estimator, Judge
from netsearch.space.problem import NetworkProblem

Judgement = Callable[[Stack, RunContext, int], float]  # (network, context, seed) -> accuracy


def judge(
    record: ModelRecord, network: Stack, context: RunContext, function: Judgement
) -> ModelRecord:
    """Return `record` with the accuracy that a function gives it, or with why it gives none.

    What raises, returns no number or NaN has failed.

    Raises:
        InputError: If it returns a number that is no accuracy.
        AcceleratorError: If the device is broken.
        OSError: If a file cannot be read or written.
    """
    began = time.perf_counter()
    try:
        found = function(network, context, record.seed)
        accuracy = float(found)
        if math.isnan(accuracy):
            raise ValueError("the accuracy is NaN")
    except Exception as error:
        record = replace(record, failure=blame(error))
    else:
        if not 0 <= accuracy <= 1:
            called = getattr(function, "__name__", repr(function))
            raise InputError(
                f"{called} of network {record.id}: expected an accuracy in [0, 1], "
                f"got {found!r:.80}"
            )
        record = replace(record, valid_accuracy=accuracy)
    context.log("networks", record.id).write(
        valid_accuracy=record.valid_accuracy, seconds=time.perf_counter() - began
    )
    return record


def as_estimator(own: type[Estimator] | Judgement) -> type[Estimator]:
    """Return an estimator that asks a function; a class of estimators stays as it is."""
    if isinstance(own, type):
        return cast(type[Estimator], own)
    function: Judgement = own

    @dataclass(frozen=True)
    class ByFunction(Estimator):
        """Judge networks by that function; there is but one fidelity."""

        context: RunContext

        @classmethod
        def of(cls, settings: EstimateSettings, context: RunContext, folder: RunFolder) -> Self:
            """Build it for a run."""
            return cls(context)

        @property
        def judge(self) -> Judge:
            """What a worker calls."""
            return judge

        def arguments(
            self, blank: ModelRecord, problem: NetworkProblem, fidelity: float
        ) -> tuple[Any, ...]:
            """Return with what it is called for one network."""
            return blank, problem.stack(blank.genome), self.context, function

    return ByFunction
