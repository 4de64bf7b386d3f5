"""The table `netsearch` of a config."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from blocksearch.config import MOST_CELLS, MOST_CHANNELS
from evaluation.files.bounded import MOST_COUNT, MOST_NUMBER
from evaluation.pareto.front import Budgets
from evaluation.records import CostName
from evaluation.training.loop import TrainConfig
from netsearch.estimators import ESTIMATORS
from netsearch.estimators.proxy import proxy_epochs
from netsearch.estimators.shared_training import SharedWeightsConfig
from netsearch.searches.halving import fidelities
from netsearch.searches.protocol import SearchConfig


class NetSearchConfig(SearchConfig):
    """The table `netsearch`: the space, the budgets, the search, and how networks are judged."""

    depths: tuple[Annotated[int, Field(le=MOST_CELLS)], ...] = Field(min_length=1)
    widths: tuple[Annotated[int, Field(le=MOST_CHANNELS)], ...] = Field(min_length=1)
    max_params: int | None = Field(ge=1, le=MOST_COUNT)
    max_flops: int | None = Field(ge=1, le=MOST_COUNT)
    max_bits: int | None = Field(default=None, ge=1, le=MOST_COUNT)
    max_latency_ms: float | None = Field(default=None, gt=0, le=MOST_NUMBER)
    latency: str | None = None
    costs: tuple[CostName, ...] = Field(min_length=1)
    estimate: Literal["proxy", "shared_weights"] = "proxy"
    shared_weights: SharedWeightsConfig = SharedWeightsConfig()
    random_search: bool
    train: TrainConfig

    @field_validator("depths", "widths")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)) or values[0] < 1:
            raise ValueError(
                f"expected distinct positive numbers in ascending order, got {list(values)}"
            )
        return values

    @field_validator("widths")
    @classmethod
    def _multiples_of_4(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value % 4 for value in values):
            raise ValueError(
                f"expected multiples of 4, as grouped ops need them, got {list(values)}"
            )
        return values

    @field_validator("costs")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected distinct costs, got {list(values)}")
        return values

    @model_validator(mode="after")
    def _fitting(self) -> "NetSearchConfig":
        if self.latency is not None and not self.needs_latency:
            raise ValueError(
                f"latency: {self.latency} is given, but latency_ms is neither among the costs nor "
                "has it a budget, max_latency_ms"
            )
        ESTIMATORS[self.estimate].check(self)
        if self.search == "halving":
            if not ESTIMATORS[self.estimate].fidelities:
                able = " or ".join(name for name, one in ESTIMATORS.items() if one.fidelities)
                raise ValueError(
                    f"search: halving needs estimate: {able}; others have one fidelity"
                )
            epochs = self.rung_epochs
            if len(set(epochs)) < len(epochs):
                raise ValueError(
                    f"search: halving would train for {epochs} epochs on its rungs, which must "
                    "differ; raise train.epochs, or lower rungs or eta"
                )
        return self

    @property
    def rung_epochs(self) -> list[int]:
        """Epochs of a proxy training on each rung of `halving`."""
        levels = fidelities(self.rungs, self.eta)
        return [proxy_epochs(self.train.epochs, fidelity) for fidelity in levels]

    @property
    def budgets(self) -> Budgets:
        """The hard budgets."""
        return Budgets(self.max_params, self.max_flops, self.max_latency_ms, max_bits=self.max_bits)

    @property
    def needs_latency(self) -> bool:
        """Whether latency is a cost or has a budget."""
        return "latency_ms" in self.costs or self.max_latency_ms is not None
