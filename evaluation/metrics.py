"""The event log of a run: one JSON line per epoch or evaluation, wall-clock figures included.

Several processes append to one file; a short line written in one call stays whole. Nothing that a
run depends on is read from here, so a lost line costs a point of a curve and no more.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.bounded import MOST_LOG_BYTES, parse_json, read_bounded

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
        with self.path.open("ab") as file:
            file.write((json.dumps(event) + "\n").encode())


def _is_sound(event: dict[str, Any]) -> bool:
    """Tell whether what every event has, and what is added up, is of the right type."""
    words = (event.get("stage"), event.get("task"))
    numbers = [event[name] for name in ADDED if name in event]
    return all(isinstance(word, str) for word in words) and all(
        isinstance(number, int | float) and abs(number) < LARGEST for number in numbers
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, passing over lines cut short by a kill and lines of no event."""
    events = []
    if path.exists():
        for line in read_bounded(path, MOST_LOG_BYTES).splitlines():
            try:
                event = parse_json(line)
            except ValueError:
                continue
            if isinstance(event, dict) and _is_sound(event):
                events.append(event)
    return events
