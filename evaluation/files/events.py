"""The event log of a run: one JSON line per epoch or evaluation, wall-clock figures included.

Several processes append to one file; a short line written in one call stays whole. Nothing that a
run depends on is read from here, so a lost line costs a point of a curve and no more. With a salt
a line ends with a check of itself, see `evaluation.files.lines`; who reads without one checks none.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import naming, printable
from evaluation.files.bounded import MAX_LOG_BYTES, read_bounded
from evaluation.files.lines import sealed, unsealed

ADDED = ("time_s", "epoch", "seconds", "wall_s")
LARGEST = 2.0**63


@dataclass(frozen=True)
class MetricsLog:
    """Appends events of one stage and task to `path`, with checks where there is a salt."""

    path: Path
    stage: str
    task: str
    salt: str | None = None

    def write(self, **values: Any) -> None:
        """Append one event with a time stamp in seconds."""
        event = {"stage": self.stage, "task": self.task, "time_s": round(time.time(), 3), **values}
        with naming(self.path), self.path.open("ab") as file:
            file.write(sealed(event, self.salt) + b"\n")


def _is_sound(event: dict[str, Any]) -> bool:
    """Tell whether what every event has, and what is added up, is of the right type."""
    words = (event.get("stage"), event.get("task"))
    numbers = [event[name] for name in ADDED if name in event]
    return all(isinstance(word, str) for word in words) and all(
        isinstance(number, int | float) and abs(number) < LARGEST for number in numbers
    )


def read_metrics(path: Path, salt: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a log, passing over lines cut short by a kill, and damaged ones."""
    return [event for event in _events(path, salt) if event is not None]


def epochs_and_warnings(
    path: Path, stage: str, say: Callable[[str], None], salt: str | None = None
) -> Callable[[], int]:
    """Return what counts the epochs that a stage has logged, over all its tasks.

    Each call also says the warnings of the stage that came since the one before, or this one.
    """
    told = sum("warning" in event for event in _of_stage(path, stage, salt))  # by an earlier call

    def count() -> int:
        nonlocal told
        events = _of_stage(path, stage, salt)
        warnings = [event for event in events if "warning" in event]
        for event in warnings[told:]:
            say(printable(f"warning: {event['task']}: {event['warning']}"))
        told = len(warnings)
        return len({(event["task"], event["epoch"]) for event in events if "epoch" in event})

    return count


def _of_stage(path: Path, stage: str, salt: str | None) -> list[dict[str, Any]]:
    return [event for event in read_metrics(path, salt) if event["stage"] == stage]


def damaged_lines(path: Path, salt: str | None = None) -> int:
    """Return how many lines of a log cannot be read."""
    return sum(event is None for event in _events(path, salt))


def _events(path: Path, salt: str | None) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a log, None for a line that is none."""
    if not path.exists():
        return
    for _, event in unsealed(read_bounded(path, MAX_LOG_BYTES), salt):
        yield event if isinstance(event, dict) and _is_sound(event) else None
