"""The table `blocksearch` of a config, and the searches that it asks for."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails

from blocksearch import nas_bench_201
from blocksearch.engine import Strategy, WeightConfig
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS
from blocksearch.space import MAX_NODES, OwnOps, SearchSpace
from blocksearch.strategies import STRATEGIES
from evaluation.training.loop import MAX_COUNTED, Precision

OP_SETS = {"darts": DARTS_OPS, "light": LIGHT_OPS}
MAX_SEARCHES, MAX_CHANNELS, MAX_CELLS = 1000, 4096, 100
SEED_STRIDE = 1000  # distance between the search seeds of two run seeds


class BlockSearchConfig(BaseModel):
    """The table `blocksearch`: the space, the supernet, and which strategies search it.

    It may name a user's own ops and strategies, which the context of its validation holds as `ops`
    and `strategies`; below the config they are handed on as what they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ops: Literal["light", "darts", "nas_bench_201"] | tuple[str, ...]
    nodes: int = Field(ge=1, le=6)
    edges_per_node: int = Field(ge=1, le=MAX_NODES)
    channels: int = Field(ge=4, multiple_of=4, le=MAX_CHANNELS)
    cells: int = Field(ge=2, le=MAX_CELLS)
    epochs: int = Field(ge=1, le=MAX_COUNTED)
    batch_size: int = Field(ge=2, le=MAX_COUNTED)
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEED_STRIDE)], ...] = Field(min_length=1)
    complexity_cost: Literal["params", "flops"]
    precision: Precision = "float32"
    weights: WeightConfig
    strategies: dict[str, dict[str, Any]] = Field(min_length=1)
    _own_ops: OwnOps = PrivateAttr(())
    _methods: Mapping[str, type[Strategy]] = PrivateAttr(STRATEGIES)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "BlockSearchConfig":
        own = info.context or {}
        self._own_ops = tuple(own.get("ops", {}).items())
        self._methods = {**STRATEGIES, **own.get("strategies", {})}
        fixed = nas_bench_201.SPACE
        if self.ops == "nas_bench_201" and (self.nodes, self.edges_per_node) != (
            fixed.nodes,
            fixed.edges_per_node,
        ):
            raise ValueError(
                f"ops: nas_bench_201 has nodes: {fixed.nodes} and edges_per_node: "
                f"{fixed.edges_per_node}, got {self.nodes} and {self.edges_per_node}"
            )
        known = {**OPS, **dict(self._own_ops)}
        unknown = [op for op in self.space.ops if op not in known]
        if unknown:
            raise ValueError(
                f"ops: unknown {', '.join(map(repr, unknown))}; there are {', '.join(known)}; your "
                "own are handed over from Python, see docs/extending.md"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: expected distinct seeds")
        self.searches(seed=0)
        return self

    @property
    def space(self) -> SearchSpace:
        """The search space of the cells."""
        if self.ops == "nas_bench_201":
            return nas_bench_201.SPACE
        ops = OP_SETS[self.ops] if isinstance(self.ops, str) else self.ops
        return SearchSpace(ops, self.nodes, edges_per_node=self.edges_per_node, own=self._own_ops)

    def searches(self, seed: int) -> list["Search"]:
        """Return every search to run: strategies x swept settings x seeds.

        A setting of a strategy that is given as a list is swept, one search per value.

        Raises:
            ValueError: If a strategy or a setting is unknown or out of range; it has all of those.
        """
        self._check_count()
        found, problems = [], []
        for strategy, settings in self.strategies.items():
            method = self._methods.get(strategy)
            if method is None:
                raise ValueError(_unknown(strategy, self._methods))
            swept = {key: v if isinstance(v, list) else [v] for key, v in settings.items()}
            for key, options in swept.items():
                if not options or any(options.count(option) > 1 for option in options):
                    raise ValueError(f"strategies.{strategy}.{key}: expected distinct values")
            for values in product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                try:
                    method.Config(**chosen)
                except ValidationError as error:
                    problems += _within(error, "strategies", strategy)
                    continue
                label = [f"{k}={v}" for k, v in chosen.items() if len(swept[k]) > 1]
                for own_seed in self.seeds:
                    name = "-".join([strategy, *label, f"s{own_seed}"])
                    of = strategy, tuple(chosen.items()), seed * SEED_STRIDE + own_seed
                    found.append(Search(name, *of, method))
        if problems:
            raise ValidationError.from_exception_data("strategies", problems)
        return found

    def _check_count(self) -> None:
        """Refuse lists whose product would be searches without end, without making it."""
        lists = {
            name: [len(values) for values in settings.values() if isinstance(values, list)]
            for name, settings in self.strategies.items()
        }
        count = sum(map(math.prod, lists.values())) * len(self.seeds)
        if count > MAX_SEARCHES:
            largest = max(lists, key=lambda name: math.prod(lists[name]))
            raise ValueError(
                f"strategies.{largest}: expected lists and seeds that make at most "
                f"{MAX_SEARCHES:,} searches, got {count if count < 10**18 else '10**18 or more'}"
            )


def _unknown(strategy: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(strategy, known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"strategies: unknown {strategy!r}{meant}; there are {', '.join(sorted(known))}"


def _within(error: ValidationError, *tables: str) -> list[InitErrorDetails]:
    """Return the errors of a table in the form in which those of the tables around it are."""
    return [
        InitErrorDetails(
            type=one["type"],
            loc=(*tables, *one["loc"]),
            input=one["input"],
            ctx=one.get("ctx", {}),
        )
        for one in error.errors(include_url=False)
    ]


@dataclass(frozen=True)
class Search:
    """One block search: a strategy with its settings and seed; `method` is what it is called by."""

    name: str
    strategy: str
    settings: tuple[tuple[str, Any], ...]
    seed: int
    method: type[Strategy] = field(repr=False)

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides how long a step takes and what it holds: all settings that are no floats."""
        ways = [(key, value) for key, value in self.settings if not isinstance(value, float)]
        return self.strategy, *ways

    @property
    def label(self) -> str:
        """The name without the seed: the strategy, and the settings that are swept."""
        return self.name.rpartition("-s")[0]
