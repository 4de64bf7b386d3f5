"""What was measured of whole networks; reading it needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from evaluation.errors import InputError
from evaluation.files.atomic import read_json, write_json
from evaluation.records import Measured


@dataclass(frozen=True)
class Measurements:
    """What was measured of networks, by their ids, and on what.

    Attributes:
        device: In words, with threads and batch.
        models: Id of a network to its measurement.
    """

    device: str
    models: Mapping[str, Measured]

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        models = {id: measured.to_json() for id, measured in self.models.items()}
        write_json(path, {"device": self.device, "models": models})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing or damaged; the message names it.
        """
        data: Any = read_json(path)
        try:
            models = {str(id): Measured.from_json(one) for id, one in data["models"].items()}
            return cls(str(data["device"]), models)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged measurements: {error}") from error
