"""Cost and ModelRecord: the plain data of one evaluated network."""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, PlainValidator

from evaluation.parsing import EXACT, Count, Fraction, NotNegative, Positive, Size, parsed

LARGEST_COUNT = 2**63
LATENCY = "latency_ms"
ONE_BIT = ("bit_ops", "bit_params")  # counts that only networks with 1-bit layers carry
COUNTS = ("params", "flops", *ONE_BIT)  # integers, which add up
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}")  # an id, fit for the name of a file


def checked_name(name: object) -> str:
    """Return an id that may become the name of a file.

    Raises:
        ValueError: If it is none: no text, too long, or with other characters.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"expected a name of letters, digits and _.=+- that begins with none of .=+-, "
            f"got {name!r:.200}"
        )
    return name


Name = Annotated[str, PlainValidator(checked_name)]


@dataclass(frozen=True, init=False, repr=False)
class Cost:
    """What a network costs, by name: exact counts, and whatever else was counted or measured.

    `evaluation.cost.costs.COSTS` says what the names mean. Params and FLOPs are always there.

    Attributes:
        values: Name to value, in a fixed order.
    """

    values: tuple[tuple[str, float], ...]

    def __init__(
        self,
        params: int,
        flops: int,
        latency_ms: float | None = None,
        bit_ops: int = 0,
        bit_params: int = 0,
        **others: float | None,
    ):
        """Take the values.

        Args:
            params: Trainable parameters.
            flops: Multiply-adds of convolutions and linear layers for one image, forward.
            latency_ms: Median milliseconds, or a sum of those of its parts; None: not measured.
            bit_ops: Multiply-adds of 1-bit numbers for one image, forward; not among `flops`.
            bit_params: Those of `params` that are 1-bit weights.
            others: Further costs; None is not known.
        """
        given: dict[str, float | None] = {"params": params, "flops": flops, LATENCY: latency_ms}
        given |= {"bit_ops": bit_ops, "bit_params": bit_params, **dict(sorted(others.items()))}
        kept = ((n, v) for n, v in given.items() if v is not None and (v or n not in ONE_BIT))
        object.__setattr__(self, "values", tuple(kept))

    def __repr__(self) -> str:
        return f"Cost({', '.join(f'{name}={value}' for name, value in self.values)})"

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return self._counted("params")

    @property
    def flops(self) -> int:
        """Multiply-adds for one image, forward."""
        return self._counted("flops")

    @property
    def bit_ops(self) -> int:
        """Multiply-adds of 1-bit numbers for one image, forward."""
        return self._counted("bit_ops")

    @property
    def bit_params(self) -> int:
        """Params that are 1-bit weights."""
        return self._counted("bit_params")

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds; None where they were not measured."""
        return dict(self.values).get(LATENCY)

    @property
    def model_bits(self) -> int:
        """Size of the weights in bits: 1 for a 1-bit weight, 32 for every other parameter."""
        return 32 * self.params - 31 * self.bit_params

    def known(self) -> dict[str, float]:
        """Return every value that is known, by the name of its cost; `bits` is `model_bits`."""
        values = {name: value for name, value in self.values if name not in ONE_BIT}
        return {**values, "bits": self.model_bits}

    def others(self) -> dict[str, float]:
        """Return the values that not every record speaks of."""
        common = (*COUNTS, LATENCY)
        return {name: value for name, value in self.values if name not in common}

    def count(self, name: str) -> float:
        """Return the cost of that name, one of `known`.

        Raises:
            ValueError: If it is not known of this network; lists those that are.
        """
        known = self.known()
        if name not in known:
            raise ValueError(f"expected a cost that is known, {', '.join(known)}, got {name!r}")
        return known[name]

    def with_latency(self, latency_ms: float) -> "Cost":
        """Return a copy that carries this latency."""
        return self.with_values({LATENCY: latency_ms})

    def with_values(self, values: Mapping[str, float]) -> "Cost":
        """Return a copy that carries these values as well, or in place of its own."""
        fields: dict[str, Any] = {**dict(self.values), **values}
        return Cost(**fields)

    def __add__(self, other: "Cost") -> "Cost":
        """Add counts; latencies and peaks do not add up and are dropped."""
        return Cost(
            self.params + other.params,
            self.flops + other.flops,
            bit_ops=self.bit_ops + other.bit_ops,
            bit_params=self.bit_params + other.bit_params,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a network without 1-bit layers has no fields about them."""
        counts = {"params": self.params, "flops": self.flops, LATENCY: self.latency_ms}
        return counts | dict(self.values)

    @classmethod
    def from_json(cls, data: Any) -> "Cost":
        """Rebuild from `to_json`; a cost stays as it is.

        Raises:
            ValueError: If there are no counts, or a value is none that a network could have.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict) or not {"params", "flops"} <= data.keys():
            raise ValueError("expected params and flops")
        for name, value in data.items():
            checked_name(name)
            if name in COUNTS:
                good = type(value) is int and 0 <= value < LARGEST_COUNT
            else:
                number = isinstance(value, float | int) and not isinstance(value, bool)
                good = value is None or (number and 0 <= value < math.inf)
            if not good or (value == 0 and name == LATENCY):
                raise ValueError(f"{name} {value!r:.80}")
        return cls(**data)

    def _counted(self, name: str) -> int:
        return int(dict(self.values).get(name, 0))


@dataclass(frozen=True)
class ModelRecord:
    """One evaluated network; every accuracy is a fraction in [0, 1].

    Attributes:
        id: Hash of the network's description; equal networks have equal ids in every run.
        genome: Integer genes, empty for a network that stands outside the space (a baseline).
        blocks: Names of the blocks used, stage by stage, reductions included.
        cost: Exact counts.
        seed: Seed of the proxy training, or the first seed of the retraining.
        valid_accuracy: On `search_valid` after proxy training; None when it failed or was not run.
        test_accuracy: One value per retraining seed; empty until retrained.
        seeds: The seeds of `test_accuracy`.
        failure: Why there is no accuracy, None when there is one.
    """

    id: Name
    genome: tuple[Count, ...]
    blocks: tuple[Name, ...]
    cost: Annotated[Cost, PlainValidator(Cost.from_json)]
    seed: Count
    valid_accuracy: Fraction | None = None
    test_accuracy: tuple[Fraction, ...] = ()
    seeds: tuple[Count, ...] = ()
    failure: str | None = None
    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    @property
    def test_accuracy_mean(self) -> float | None:
        """Mean over the retraining seeds, None when not retrained."""
        return statistics.fmean(self.test_accuracy) if self.test_accuracy else None

    @property
    def test_accuracy_std(self) -> float | None:
        """Sample standard deviation over the seeds, None for fewer than two."""
        return statistics.stdev(self.test_accuracy) if len(self.test_accuracy) > 1 else None

    def retrained(self, test_accuracy: tuple[float, ...], seeds: tuple[int, ...]) -> "ModelRecord":
        """Return a copy that carries the test accuracies of `seeds`, and no failure."""
        return replace(self, test_accuracy=test_accuracy, seeds=seeds, failure=None)

    def row(self) -> dict[str, Any]:
        """Return what `front --json` and `pick --json` say of a model."""
        cost = self.cost
        bits = {"bit_ops": cost.bit_ops, "model_bits": cost.model_bits} if cost.bit_params else {}
        return (
            {
                "id": self.id,
                "params": cost.params,
                "flops": cost.flops,
                LATENCY: cost.latency_ms,
                "valid_accuracy": self.valid_accuracy,
                "test_accuracy": self.test_accuracy_mean,
                "test_accuracy_std": self.test_accuracy_std,
                "seeds": list(self.seeds),
                "genome": list(self.genome),
                "blocks": list(self.blocks),
            }
            | bits
            | cost.others()
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**vars(self), "cost": self.cost.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> "ModelRecord":
        """Rebuild from `to_json`.

        Raises:
            ValueError: If a field is missing, unknown or of another type, or a name is none that
                could name a file.
        """
        record = parsed(cls, data, "a model record")
        if record.genome and record.valid_accuracy is None and record.failure is None:
            raise ValueError("not a model record: it has neither a valid_accuracy nor a failure")
        return record


@dataclass(frozen=True)
class ModelMeasurement:
    """What was measured of a whole network, at batch 1.

    Attributes:
        latency_ms: Median milliseconds of a forward pass; None where it does not count.
        spread_ms: Their interquartile range; None likewise.
        file_bytes: Size of the file of its weights; None where there is none.
    """

    latency_ms: Positive | None
    spread_ms: NotNegative | None
    file_bytes: Size | None = None
    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)
