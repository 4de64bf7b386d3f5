"""The event log of a run: one JSON line per epoch or evaluation, wall-clock figures included.

Several processes append to one file; a short line written in one call stays whole. Nothing that a
run depends on is read from here, so a lost line costs a point of a curve and no more.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import naming


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
            file.write((json.dumps(event) + "\n").encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, passing over lines that a kill cut short."""
    events = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
    return events
