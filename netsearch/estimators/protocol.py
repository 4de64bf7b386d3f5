"""The protocol of an estimator: how good a network is, before it is trained for long."""

from collections.abc import Callable
from typing import ClassVar, Protocol, Self

from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig
from evaluation.workers.workers import Workers
from netsearch.estimators.shared_training import SharedWeightsConfig
from netsearch.space.problem import NetworkProblem

Judge = Callable[..., ModelRecord]  # takes what `Estimator.arguments` returns; picklable


class EstimateSettings(Protocol):
    """What an estimator may be told: keys of the table `netsearch`."""

    @property
    def train(self) -> TrainConfig:
        """The recipe of a short training."""

    @property
    def shared_weights(self) -> SharedWeightsConfig:
        """How shared weights are trained."""


class Estimator(Protocol):
    """Judges networks, in workers.

    One that inherits from this has what it does not say: one fidelity, no weights to share, nothing
    to prepare, no settings to refuse.

    Attributes:
        fidelities: Whether it can judge for a part of the cost of a whole judgement.
        prepares: What `prepare` makes, as the event log calls it; empty where it makes nothing.
        shares_weights: Whether it scores networks by weights that all of them share.
        checked: How many networks the end of a search trains for a short time as well, to see
            whether the estimate ranks them as that does; 0 where it is that.
        epochs_ahead: Epochs of `prepare`, as the event log counts them.
    """

    fidelities: ClassVar[bool] = False
    prepares: ClassVar[str] = ""
    shares_weights: ClassVar[bool] = False

    @property
    def checked(self) -> int:  # noqa: D102
        return 0

    @property
    def epochs_ahead(self) -> int:  # noqa: D102
        return 0

    @classmethod
    def of(cls, settings: EstimateSettings, context: RunContext, folder: RunFolder) -> Self:
        """Build it for the run of a folder."""

    @classmethod
    def check(cls, settings: EstimateSettings) -> None:
        """Refuse settings with which it cannot judge.

        Raises:
            ValueError: If there are such; says which.
        """
        return

    def prepare(self, problem: NetworkProblem, workers: Workers) -> None:
        """Do once what all judgements need; what a killed run left of it is not done again.

        Raises:
            InputError: If it fails; says why.
        """
        return

    @property
    def judge(self) -> Judge:
        """What a worker calls."""

    def arguments(
        self, blank: ModelRecord, problem: NetworkProblem, fidelity: float
    ) -> tuple[object, ...]:
        """Return with what it is called for one network.

        Args:
            blank: All that is known of the network but its accuracy.
            problem: What its genome stands for.
            fidelity: Part of a whole judgement, in (0, 1].
        """
