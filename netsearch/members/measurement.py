"""Whole networks, measured one by one while nothing else runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from evaluation.cost.latency import BATCH, Latency, device_name, measure_ms
from evaluation.errors import InputError
from evaluation.files.atomic import read_json, write_json
from evaluation.records import Measured
from evaluation.training.loop import seeded_model
from evaluation.training.retrain import WEIGHTS, Trial

THREADS = 1
ROUNDS = 3  # through all networks; the least counts, since other processes only ever add time


@dataclass(frozen=True)
class Measurements:
    """What was measured of networks, by their ids, and on what.

    Attributes:
        device: In words, with threads and batch.
        models: Id of a network to its measurement.
    """

    device: str
    models: Mapping[str, Measured]

    @classmethod
    def of(
        cls, trials: Sequence[Trial], image_shape: tuple[int, ...], device: str, out: Path
    ) -> Self:
        """Time every network with fresh weights, and look up the sizes of the kept ones.

        Args:
            trials: The networks.
            image_shape: (C, H, W).
            device: `cpu` or `cuda`.
            out: Folder of the run, in which weights may lie.
        """
        timed: dict[str, Latency] = {}
        for trial in [trial for _ in range(ROUNDS) for trial in trials]:
            module, id = seeded_model(trial.build, 0, device), trial.record.id
            found = measure_ms(module, image_shape, threads=THREADS)
            timed[id] = min(timed.get(id, found), found, key=lambda one: one.median_ms)
        weights = {trial.record.id: out / trial.place / WEIGHTS for trial in trials}
        sizes = {id: path.stat().st_size for id, path in weights.items() if path.exists()}
        models = {
            id: Measured(one.median_ms, one.spread_ms, sizes.get(id)) for id, one in timed.items()
        }
        threads = "" if device == "cuda" else f", {THREADS} thread"
        where = f"{device_name(device)}{threads}, batch {BATCH}"
        return cls(f"PyTorch {torch.__version__} on {where}", models)

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
