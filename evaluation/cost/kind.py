"""CostKind: one cost of a network by its name: how it is measured, and how a person reads it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from evaluation.cost.program import Program
from evaluation.errors import InputError, reason_of
from evaluation.records import Cost, checked_name


class Network(Protocol):
    """A network without weights: what a cost is measured of. `Stack` is one."""

    @property
    def id(self) -> str:
        """Hash of all that decides the network."""

    def cost(self) -> Cost:
        """Return its params, FLOPs and 1-bit counts."""

    def program(self) -> Program:
        """Return its ops in the order in which they run."""


@dataclass(frozen=True)
class Axis:
    """An axis of the report's figures.

    Attributes:
        name: On the button that chooses it, and where the report speaks of the cost.
        title: Beside the axis.
        format: Of the numbers at its ticks, in d3's language.
        suffix: Behind each of them.
    """

    name: str
    title: str
    format: str = "~s"
    suffix: str = ""


@dataclass(frozen=True)
class CostKind:
    """A cost, handed on by reference: whoever has it needs no list of names.

    Attributes:
        name: In configs, records and budgets: `max_<name>`.
        unit: What a person reads behind a number.
        axis: In figures and tables; if left out, it is called as the cost.
        measure: A `Network` to its value, at least 0; it travels to workers, so it must pickle.
            None: of ours that only a device can measure.
        exact: Whether the description of a network decides it, so that it is known before any
            training; else it is measured on a device.
        whole: Whether the values are integers.
    """

    name: str
    unit: str
    axis: Axis = field(default=Axis("", ""))
    measure: Callable[[Any], float] | None = None
    exact: bool = True
    whole: bool = True

    def __post_init__(self) -> None:
        """Check the name, and give the axis one.

        Raises:
            ValueError: If it could not name a key of a config.
        """
        if not checked_name(self.name).isidentifier():
            raise ValueError(f"expected a name such as energy_nj, got {self.name!r}")
        if not self.axis.name:
            object.__setattr__(self, "axis", Axis(self.name, self.name))

    def of(self, network: Network) -> float:
        """Return the cost of a network.

        Raises:
            InputError: If there is nothing to measure it with, or the value is none: not a number,
                not finite, negative. It names the network.
        """
        if self.measure is None:
            raise InputError(f"{self.name} is not counted but measured, and was not measured here")
        try:
            value = self.measure(network)
        except InputError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"{self.name} of network {network.id}: {reason_of(error)}") from error
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a finite number"
            raise InputError(
                f"{self.name} of network {network.id}: expected {kind} of at least 0, "
                f"got {value!r:.100}"
            )
        return int(value) if self.whole else value
