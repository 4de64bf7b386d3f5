"""What all tasks of a run have in common, and whose fault it is when one fails."""

from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.data.config import DataConfig
from evaluation.data.dataset import Dataset, OwnImages, worker_dataset
from evaluation.errors import InputError, reason_of
from evaluation.files.events import MetricsLog
from evaluation.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class RunContext:
    """The images, the device and the event log of a run; small, since it is sent to the workers.

    Attributes:
        data: Which images, and how they are changed for training.
        data_seed: Of their division.
        device: `cpu` or `cuda`.
        metrics: The event log.
        salt: Of the checks of its lines; None is none.
        checkpoint_s: Seconds between two checkpoints of a task, see `Checkpoint`.
        own_images: In place of those that `data` names.
    """

    data: DataConfig
    data_seed: int
    device: str
    metrics: Path
    checkpoint_s: float | None = None
    own_images: OwnImages | None = None
    salt: str | None = None

    @property
    def dataset(self) -> Dataset:
        """The images on the device, loaded once in each process."""
        return worker_dataset(self.data, self.data_seed, self.device, self.own_images)

    def log(self, stage: str, task: str) -> MetricsLog:
        """Return what appends the events of a task to the event log."""
        return MetricsLog(self.metrics, stage, task, self.salt)

    def checkpoint(self, path: Path, of: str, log: MetricsLog) -> Checkpoint:
        """Return the checkpoint of a task; that it was damaged goes into the task's log.

        Args:
            path: Of the newest.
            of: What the task is, as a text.
            log: Of the task.
        """
        return Checkpoint(
            path, of, every_s=self.checkpoint_s, say=lambda line: log.write(warning=line)
        )


def blame(error: Exception) -> str:
    """Return why a candidate failed, and raise what is no fault of a candidate again.

    A candidate may be anything, so whatever it raises is its own fault, running out of memory and
    a loss that is not finite included; one must not end a search of days. A device that is broken,
    files that cannot be read or written, and what the user gave are not.
    """
    if isinstance(error, torch.AcceleratorError | OSError | InputError):
        raise error
    return reason_of(error)
