"""Milliseconds that were measured, here or on another device; reading them needs no torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaluation.cost.kind import Axis, CostKind
from evaluation.cost.paretoblocks_latency import FORMAT
from evaluation.errors import InputError
from evaluation.files.atomic import read_json
from evaluation.parsing import NotNegative, Positive, parsed

NAMES_SHOWN = 3

LATENCY = CostKind(  # a search measures it with its `LatencyTable`
    "latency_ms", "ms", Axis("latency", "latency, ms", "~r"), exact=False, whole=False
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one forward pass: median and interquartile range over the timed passes."""

    median_ms: Positive
    spread_ms: NotNegative


@dataclass(frozen=True)
class DeviceLatencies:
    """What `paretoblocks-latency` measured on a device: its JSON, read and checked.

    Attributes:
        path: The file.
        facts: On what and how it was measured: device, runtime, threads, batch.
        files: Name of a file, as its metadata has it, to its latency.
    """

    path: Path
    facts: Mapping[str, str | int]
    files: Mapping[str, Timing]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a latency JSON.

        Raises:
            InputError: If it is missing, damaged or of another format; the message names it.
        """
        data = read_json(path)
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise InputError(f"{path}: expected a JSON of format {FORMAT!r}, got {found!r}")
        try:
            words = {name: str(data[name]) for name in ("device", "runtime")}
            counts = {name: int(data[name]) for name in ("threads", "batch")}
            files = parsed(dict[str, Timing], data["files"], "the latencies of files")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: damaged latency JSON: {error}") from error
        if not files:
            raise InputError(f"{path}: damaged latency JSON: it has no file")
        return cls(path, {**words, **counts}, files)

    @property
    def device(self) -> str:
        """Device, runtime, threads and batch, in words."""
        threads = self.facts["threads"]
        plural = "" if threads == 1 else "s"
        return (
            f"{self.facts['device']}, {self.facts['runtime']}, {threads} thread{plural}, "
            f"batch {self.facts['batch']}"
        )

    def of(self, names: Collection[str], what: str) -> dict[str, float]:
        """Return the median milliseconds of each name.

        Args:
            names: Whose latency is wanted.
            what: What they are, for the message: `the members of this front`.

        Raises:
            InputError: If one was not measured: the JSON is one for other files.
        """
        missing = [name for name in names if name not in self.files]
        if missing:
            raise InputError(
                f"{self.path}: measured for other files: of {what}, {len(missing)} of {len(names)} "
                f"are missing, {_some(missing)}; it has {_some(self.files)}"
            )
        return {name: self.files[name].median_ms for name in names}


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
