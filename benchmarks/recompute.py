"""What recomputing cells costs and saves: peak memory and seconds of a step of block search.

`python benchmarks/recompute.py [CONFIG]... [--rounds N] [--json]` measures a step (weights and
alphas) of the first search of each config: as it is, with the insides of cells recomputed in the
backward pass, and with half the batch, as accumulation over two halves would hold. Peaks are what
two steps add, each in a process of its own, once; times come from one process, in turns, on
one thread. Images are random, of the size of the config's data. Of times the mean and
standard deviation.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from blocksearch.search import make_strategy  # noqa: E402
from configs import FOLDER  # noqa: E402
from configs.experiment import Config  # noqa: E402
from evaluation.data.dataset import Dataset, Split  # noqa: E402
from evaluation.workers.memory import keep_freed_memory, peak_bytes  # noqa: E402
from netsearch.space.genome import stages_for  # noqa: E402

DEFAULTS = [FOLDER / f"{name}.yaml" for name in ("quickstart", "cifar10_cpu", "cifar10")]
WAYS = ("kept", "recomputed", "half the batch")


class Steps:
    """Steps of the first search of a config, on random images."""

    def __init__(self, config: Path, way: str):
        experiment = Config.load(config)
        blocks = experiment.blocksearch
        batch = blocks.batch_size // (2 if way == "half the batch" else 1)
        digits = experiment.data.name == "digits"
        split = _random_split(batch, (1, 8, 8) if digits else (3, 32, 32))
        dataset = Dataset("random", tuple("0123456789"), split, split, split, split, "")
        search, recompute = blocks.searches(0)[0], way == "recomputed"
        stages = stages_for(dataset.image_shape[1:])
        self.strategy = make_strategy(search, blocks, dataset, stages, "cpu", recompute=recompute)
        self.batch = split.images.float() / 255, split.labels
        self.strategy.schedule(0.99)  # behind any warm-up

    def __call__(self) -> None:
        """Take one."""
        self.strategy.step(self.batch, self.batch)


def _random_split(count: int, shape: tuple[int, int, int]) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    labels, some = torch.arange(count) % 10, torch.full((shape[0],), 0.5)
    return Split(images, labels, some, some)


def peak_mib(config: Path, way: str) -> float:
    """Return what two steps add to the memory, in a process of its own."""
    command = [sys.executable, __file__, str(config), "--peak-of", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(config: Path, rounds: int) -> dict[str, Any]:
    """Return the figures of one config."""
    steps = {way: Steps(config, way) for way in WAYS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["kept"], seconds["recomputed"], strict=True)]
    return {
        "config": config.stem,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "seconds": {way: _mean_and_std(times) for way, times in seconds.items()},
        "time_ratio": _mean_and_std(ratios),
        "peak_mib": {way: round(peak_mib(config, way)) for way in WAYS},
    }


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    return round(statistics.fmean(values), 4), round(statistics.stdev(values), 4)


def main(
    configs: Annotated[list[Path] | None, typer.Argument()] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    peak_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure each config, with --json one line for each."""
    keep_freed_memory()
    torch.set_num_threads(1)
    chosen = configs or DEFAULTS
    if peak_of:
        steps = Steps(chosen[0], peak_of)
        print(peak_bytes(lambda: (steps(), steps()), "cpu") / 2**20)
        return
    for config in chosen:
        row = measured(config, rounds)
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        print(f"{row['config']}: time ratio {row['time_ratio']}")
        for way in WAYS:
            print(f"  {way:16} {row['seconds'][way]} s, {row['peak_mib'][way]} MiB", flush=True)


if __name__ == "__main__":
    typer.run(main)
