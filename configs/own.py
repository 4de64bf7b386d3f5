"""Own: what a user brings to a run from Python, beside what a config may name."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluation.errors import InputError, require

if TYPE_CHECKING:
    from blocksearch.engine import Strategy
    from blocksearch.space import OpBuilder, OwnOps
    from evaluation.data.dataset import Dataset
    from netsearch.estimators.own import Judgement
    from netsearch.estimators.protocol import Estimator
    from netsearch.space.problem import OwnCost

NAME = r"[A-Za-z_][A-Za-z0-9_]{0,39}"
YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Own:
    """A user's own parts of a run. All of them travel to the workers, so they must pickle.

    Attributes:
        ops: For `blocksearch.ops`: name to builder(channels, stride, searching) of a module.
        strategies: For `blocksearch.strategies`: name to class, see `blocksearch.engine.Strategy`.
        estimators: For `netsearch.estimate`: name to an accuracy(network, context, seed), or to a
            class, see `netsearch.estimators.protocol.Estimator`.
        data: For `data.name: own`: returns the images, divided.
        costs: A tuple, beside those of `netsearch.costs`.
    """

    ops: "Mapping[str, OpBuilder]" = field(default_factory=dict)
    strategies: "Mapping[str, type[Strategy]]" = field(default_factory=dict)
    estimators: "Mapping[str, type[Estimator] | Judgement]" = field(default_factory=dict)
    data: "Callable[[], Dataset] | None" = None
    costs: "tuple[OwnCost, ...]" = ()

    def __post_init__(self) -> None:
        """Check names, and that everything can travel to the workers.

        Raises:
            InputError: If a name is none, or is taken, or something cannot be pickled; says why.
        """
        from blocksearch.ops import OPS
        from blocksearch.strategies import STRATEGIES
        from evaluation.cost.costs import known_kinds
        from evaluation.workers.pool import check_picklable
        from netsearch.estimators import ESTIMATORS
        from netsearch.space.problem import OwnCost

        ours: dict[str, Mapping[str, Any]] = {
            "op": OPS,
            "strategy": STRATEGIES,
            "estimator": ESTIMATORS,
        }
        for what in ("ops", "strategies", "estimators"):
            given = vars(self)[what]
            require(
                isinstance(given, Mapping),
                f"own {what}: expected a table of names and parts, got {given!r:.80}",
            )
        require(
            isinstance(self.costs, tuple) and all(isinstance(one, OwnCost) for one in self.costs),
            f"own costs: expected a tuple of OwnCost, got {self.costs!r:.80}",
        )
        known_kinds(one.kind for one in self.costs)
        for kind, name, part in self:
            called = f"own {kind} {name}".rstrip()
            if kind in ours:
                good = isinstance(name, str) and re.fullmatch(NAME, name) is not None
                require(
                    good and name not in YAML_WORDS,
                    f"own {kind}: expected a name such as wide_conv_3x3 of at most 40 characters, "
                    f"got {name!r:.80}",
                )
                require(name not in ours[kind], f"{called}: this name is taken")
            if not callable(part) and kind != "cost":
                raise InputError(f"{called}: expected a callable, got {part!r:.80}")
            if kind == "strategy":
                there = hasattr(part, "Config") and hasattr(part, "derive")
                require(there, f"{called}: expected a class of the protocol blocksearch.Strategy")
            check_picklable(part, called)

    @property
    def described(self) -> tuple[str, ...]:
        """What a run's folder says of them, so that it is gone on with by the same ones."""
        return tuple(
            f"cost {one.kind.name}{' (minimised)' if one.minimised else ''}"
            f"{'' if one.limit is None else f', at most {one.limit:g}'}"
            if kind == "cost"
            else f"{kind} {name}".strip()
            for kind, name, one in self
        )

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        """Yield kind, name and part of each."""
        for kind, parts in (
            ("op", self.ops),
            ("strategy", self.strategies),
            ("estimator", self.estimators),
        ):
            yield from ((kind, name, part) for name, part in parts.items())
        if self.data is not None:
            yield "data", "", self.data
        yield from (("cost", cost.kind.name, cost) for cost in self.costs)

    @property
    def names(self) -> dict[str, Any]:
        """What the models of the config resolve names with."""
        from netsearch.estimators.own import as_estimator

        return {
            "ops": self.ops,
            "strategies": self.strategies,
            "estimators": {name: as_estimator(one) for name, one in self.estimators.items()},
        }

    @property
    def builders(self) -> "OwnOps":
        """The ops as cells hold them."""
        return tuple(self.ops.items())
