"""The table `netsearch` of a config."""

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from blocksearch.config import MAX_CELLS, MAX_CHANNELS
from evaluation.cost.costs import COSTS
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.kind import CostKind
from evaluation.files.bounded import MAX_COUNT, MAX_NUMBER
from evaluation.pareto.front import Budgets
from evaluation.training.loop import TrainConfig
from netsearch.estimators import ESTIMATORS
from netsearch.estimators.proxy import proxy_epochs
from netsearch.estimators.shared_training import SharedWeightsConfig
from netsearch.searches.halving import fidelities
from netsearch.searches.protocol import SearchConfig


def _budget(kind: CostKind) -> Any:
    """Return type and bounds of the key `max_<name>`."""
    if kind.whole:
        return int | None, Field(default=None, ge=1, le=MAX_COUNT)
    return float | None, Field(default=None, gt=0, le=MAX_NUMBER)


if TYPE_CHECKING:
    WithBudgets = SearchConfig
else:  # a key for every cost, so that a new one needs no line here
    keys = {f"max_{kind.name}": _budget(kind) for kind in COSTS.values()}
    WithBudgets = create_model("WithBudgets", __base__=SearchConfig, **keys)


class NetSearchConfig(WithBudgets):
    """The table `netsearch`: the space, the budgets, the search, and how networks are judged."""

    depths: tuple[Annotated[int, Field(le=MAX_CELLS)], ...] = Field(min_length=1)
    widths: tuple[Annotated[int, Field(le=MAX_CHANNELS)], ...] = Field(min_length=1)
    max_params: int | None = Field(ge=1, le=MAX_COUNT)
    max_flops: int | None = Field(ge=1, le=MAX_COUNT)
    latency: str | None = None
    costs: tuple[str, ...] = Field(min_length=1)
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
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for unknown in (value for value in values if value not in COSTS):
            near = difflib.get_close_matches(unknown.lower(), COSTS, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            *first, last = COSTS
            raise ValueError(f"expected {', '.join(first)} or {last}{meant}, got {unknown!r}")
        if len(set(values)) != len(values):
            raise ValueError(f"expected distinct costs, got {list(values)}")
        return values

    @model_validator(mode="after")
    def _fitting(self) -> "NetSearchConfig":
        if self.latency is not None and not self.needs_latency:
            raise ValueError(
                f"latency: {self.latency} is given, but {LATENCY.name} is neither among the costs "
                f"nor has it a budget, max_{LATENCY.name}"
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
        given = dict(self)
        return Budgets(**{key: given[key] for key in (f"max_{name}" for name in COSTS)})

    @property
    def needs_latency(self) -> bool:
        """Whether a cost that must be measured is minimised or has a budget."""
        names = (*self.costs, *self.budgets.of_costs())
        return not all(COSTS[name].exact for name in names)
