"""The table `netsearch` of a config."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    Field,
    PrivateAttr,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from blocksearch.config import MAX_CELLS, MAX_CHANNELS
from evaluation.cost.costs import COSTS
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.kind import CostKind
from evaluation.files.bounded import MAX_COUNT, MAX_NUMBER
from evaluation.pareto.front import Budgets
from evaluation.training.loop import TrainConfig
from netsearch.estimators import ESTIMATORS
from netsearch.estimators.protocol import Estimator
from netsearch.estimators.proxy import proxy_epochs
from netsearch.estimators.shared_training import SharedWeightsConfig
from netsearch.searches.halving import fidelities
from netsearch.searches.protocol import SearchConfig


def _budget(kind: CostKind) -> Any:
    """Return type and bounds of the key `max_<name>`."""
    if kind.whole:
        return int | None, Field(default=None, ge=1, le=MAX_COUNT)
    return float | None, Field(default=None, gt=0, le=MAX_NUMBER)


def _estimators(info: ValidationInfo) -> dict[str, type[Estimator]]:
    """Return every way to judge networks, a user's own from the context of the validation."""
    return {**ESTIMATORS, **(info.context or {}).get("estimators", {})}


def _choice(unknown: str, known: Mapping[str, object]) -> str:
    """Say which names there are, which one is probably meant, and what came."""
    near = difflib.get_close_matches(unknown.lower(), known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    *first, last = known
    return f"{', '.join(first)} or {last}{meant}, got {unknown!r}"


if TYPE_CHECKING:
    WithBudgets = SearchConfig
else:  # a key for every cost, so that a new one needs no line here
    keys = {f"max_{kind.name}": _budget(kind) for kind in COSTS.values()}
    WithBudgets = create_model("WithBudgets", __base__=SearchConfig, **keys)


class NetSearchConfig(WithBudgets):
    """The table `netsearch`: the space, the budgets, the search, and how networks are judged.

    It may name a user's own estimator, which the context of its validation holds.
    """

    depths: tuple[Annotated[int, Field(le=MAX_CELLS)], ...] = Field(min_length=1)
    widths: tuple[Annotated[int, Field(le=MAX_CHANNELS)], ...] = Field(min_length=1)
    max_params: int | None = Field(ge=1, le=MAX_COUNT)
    max_flops: int | None = Field(ge=1, le=MAX_COUNT)
    latency: str | None = None
    costs: tuple[str, ...] = Field(min_length=1)
    estimate: str = "proxy"
    shared_weights: SharedWeightsConfig = SharedWeightsConfig()
    random_search: bool
    train: TrainConfig
    _estimators: Mapping[str, type[Estimator]] = PrivateAttr(ESTIMATORS)

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
            raise ValueError(f"expected {_choice(unknown, COSTS)}")
        if len(set(values)) != len(values):
            raise ValueError(f"expected distinct costs, got {list(values)}")
        return values

    @field_validator("estimate")
    @classmethod
    def _there(cls, value: str, info: ValidationInfo) -> str:
        if value not in (known := _estimators(info)):
            raise ValueError(f"expected {_choice(value, known)}")
        return value

    @model_validator(mode="after")
    def _fitting(self, info: ValidationInfo) -> "NetSearchConfig":
        self._estimators = _estimators(info)
        if self.latency is not None and not self.needs_latency:
            raise ValueError(
                f"latency: {self.latency} is given, but {LATENCY.name} is neither among the costs "
                f"nor has it a budget, max_{LATENCY.name}"
            )
        self.estimator.check(self)
        if self.search == "halving":
            if not self.estimator.fidelities:
                able = " or ".join(name for name, one in self._estimators.items() if one.fidelities)
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
    def estimator(self) -> type[Estimator]:
        """How networks are judged."""
        return self._estimators[self.estimate]

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
