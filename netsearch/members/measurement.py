"""What was measured of whole networks; reading it needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from evaluation.files.run_folder import RunFolder
from evaluation.parsing import parsed
from evaluation.records import ModelMeasurement


@dataclass(frozen=True)
class RunMeasurements:
    """What was measured of networks, by their ids, and on what.

    Attributes:
        device: In words, with threads and batch.
        models: Id of a network to its measurement.
    """

    device: str
    models: Mapping[str, ModelMeasurement]

    def save(self, folder: RunFolder) -> None:
        """Write `measured.json` into the folder of a run."""
        models = {id: measured.to_json() for id, measured in self.models.items()}
        folder.write_json(folder.measured.name, {"device": self.device, "models": models})

    @classmethod
    def load(cls, folder: RunFolder) -> Self:
        """Read that of a run.

        Raises:
            InputError: If the file is missing or damaged; the message names it.
        """
        return folder.load(folder.measured.name, cls.from_json)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from what `save` wrote.

        Raises:
            ValueError: If the data has another form.
        """
        return parsed(cls, data, "measurements")
