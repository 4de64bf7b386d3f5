"""The event log of a run: one JSON line per epoch or evaluation, wall-clock figures included.

Several processes append to one file; a short line written in one call stays whole. Nothing that a
run depends on is read from here, so a lost line costs a point of a curve and no more. In the folder
of a run a line ends with a check of itself, see `evaluation.files.manifest`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import naming, printable
from evaluation.files.bounded import MAX_LOG_BYTES, read_bounded
from evaluation.files.manifest import salt_of, sealed, unsealed

ADDED = ("time_s", "epoch", "seconds", "wall_s")
LARGEST = 2.0**63


@dataclass(frozen=True)
class MetricsLog:
    """Appends events of one stage and task to `path`."""

    path: Path
    stage: str
    task: str

    def write(self, **values: Any) -> None:
        """Append one event with a time stamp in seconds."""
        event = {"stage": self.stage, "task": self.task, "time_s": round(time.time(), 3), **values}
        with naming(self.path), self.path.open("ab") as file:
            file.write(sealed(event, salt_of(self.path)) + b"\n")


def _is_sound(event: dict[str, Any]) -> bool:
    """Tell whether what every event has, and what is added up, is of the right type."""
    words = (event.get("stage"), event.get("task"))
    numbers = [event[name] for name in ADDED if name in event]
    return all(isinstance(word, str) for word in words) and all(
        isinstance(number, int | float) and abs(number) < LARGEST for number in numbers
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, passing over lines cut short by a kill, and damaged ones."""
    return [event for event in _events(path) if event is not None]


def epochs_and_warnings(path: Path, stage: str, say: Callable[[str], None]) -> Callable[[], int]:
    """Return what counts the epochs that a stage has logged, over all its tasks.

    Each call also says the warnings of the stage that came since the one before, or this one.
    """
    told = sum("warning" in event for event in _of_stage(path, stage))  # by an earlier call

    def count() -> int:
        nonlocal told
        events = _of_stage(path, stage)
        warnings = [event for event in events if "warning" in event]
        for event in warnings[told:]:
            say(printable(f"warning: {event['task']}: {event['warning']}"))
        told = len(warnings)
        return len({(event["task"], event["epoch"]) for event in events if "epoch" in event})

    return count


def _of_stage(path: Path, stage: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(path) if event["stage"] == stage]


def damaged_lines(path: Path) -> int:
    """Return how many lines of a log cannot be read."""
    return sum(event is None for event in _events(path))


def _events(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a log, None for a line that is none."""
    if not path.exists():
        return
    salt = salt_of(path)
    for line in read_bounded(path, MAX_LOG_BYTES).splitlines():
        try:
            event = unsealed(line, salt)
        except ValueError:
            yield None
        else:
            yield event if _is_sound(event) else None
