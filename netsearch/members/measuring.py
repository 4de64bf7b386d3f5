"""Whole networks, measured one by one while nothing else runs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.cost.device_latency import Timing
from evaluation.cost.latency import BATCH, device_name, measure_ms
from evaluation.files.names import WEIGHTS
from evaluation.records import ModelMeasurement
from evaluation.training.loop import seeded_model
from evaluation.training.retrain import RetrainJob
from netsearch.members.measurement import RunMeasurements

THREADS = 1
ROUNDS = 3  # through all networks; the least counts, since other processes only ever add time


def measure_networks(
    jobs: Sequence[RetrainJob], image_shape: tuple[int, ...], device: str, out: Path
) -> RunMeasurements:
    """Time every network with fresh weights, and look up the sizes of the kept ones.

    Args:
        jobs: The networks.
        image_shape: (C, H, W).
        device: `cpu` or `cuda`.
        out: Folder of the run, in which weights may lie.
    """
    timed: dict[str, Timing] = {}
    for job in [job for _ in range(ROUNDS) for job in jobs]:
        module, id = seeded_model(job.build, 0, device), job.record.id
        found = measure_ms(module, image_shape, threads=THREADS)
        timed[id] = min(timed.get(id, found), found, key=lambda one: one.median_ms)
    weights = {job.record.id: out / job.place / WEIGHTS for job in jobs}
    sizes = {id: path.stat().st_size for id, path in weights.items() if path.exists()}
    models = {
        id: ModelMeasurement(one.median_ms, one.spread_ms, sizes.get(id))
        for id, one in timed.items()
    }
    threads = "" if device == "cuda" else f", {THREADS} thread"
    where = f"{device_name(device)}{threads}, batch {BATCH}"
    return RunMeasurements(f"PyTorch {torch.__version__} on {where}", models)
