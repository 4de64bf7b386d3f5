"""How well shared weights rank networks: Kendall's tau against proxy training, on this machine.

`python benchmarks/shared_ranking.py [--data NPZ]` draws a library of random blocks and networks of
all sizes, trains each network by itself (the truth: mean accuracy on `search_valid` over proxy
trainings of two seeds), trains a store of shared weights for each way of sampling, and scores the
networks with it. Data, space and proxy recipe are those of `configs/quickstart.yaml`; with NPZ, a
file of CIFAR-10, those of `configs/cifar10_cpu.yaml`.

Printed per ranker: tau against the truth; tau with params held fixed (the partial tau of Kendall
1942, https://doi.org/10.1093/biomet/32.3-4.277), since a ranker that only knows the size is worth
little; the mean accuracy that it gives; seconds for the store and for one network. The rows
`params` and `one proxy seed` are rankers to compare with: the latter against the other seed. On two
busy cores the run on digits takes several minutes; `--networks 16 --sampling fair` is shorter.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from scipy.stats import kendalltau

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from blocksearch.ops import LIGHT_OPS  # noqa: E402
from blocksearch.space import Cell, SearchSpace  # noqa: E402
from evaluation.data.config import DataConfig  # noqa: E402
from evaluation.data.dataset import Dataset, load_dataset  # noqa: E402
from evaluation.training.loop import (  # noqa: E402
    TrainConfig,
    accuracy,
    seeded_model,
    train,
)
from netsearch.estimators.shared_scoring import score  # noqa: E402
from netsearch.estimators.shared_training import SharedWeightsConfig, train_shared  # noqa: E402
from netsearch.estimators.shared_weights import SharedWeights  # noqa: E402
from netsearch.space.genome import (  # noqa: E402
    GenomeSpace,
    NetworkSpec,
    stages_for,
)
from netsearch.space.network import builder, predict_cost  # noqa: E402
from netsearch.space.networks import Networks  # noqa: E402

PROXY_SEEDS = (0, 1)
SIZE_STEPS = 8  # networks are spread evenly over so many sizes, from the least to the largest


class Task:
    """Data, recipe, blocks and space of one configuration file, and networks of that space."""

    def __init__(self, config: dict[str, Any], blocks: int, networks: int, seed: int):
        """Draw `blocks` normal and as many reduction blocks, and `networks` of all sizes."""
        self.data = DataConfig(**config["data"])
        self.dataset: Dataset = load_dataset(self.data, seed)
        self.recipe = TrainConfig(**config["netsearch"]["train"])
        block_space = SearchSpace(LIGHT_OPS, nodes=config["blocksearch"]["nodes"])
        drawn = random.Random(seed)
        kinds = ("normal", "reduction")
        names = {kind: tuple(f"{kind}-{i}" for i in range(blocks)) for kind in kinds}
        self.cells: dict[str, Cell] = {
            name: block_space.random_cell(drawn) for kind in kinds for name in names[kind]
        }
        self.space = GenomeSpace(
            stages_for(self.dataset.image_shape[1:]),
            tuple(config["netsearch"]["depths"]),
            tuple(config["netsearch"]["widths"]),
            names["normal"],
            names["reduction"],
        )
        rng = np.random.default_rng(seed)
        sizes = [i % SIZE_STEPS / (SIZE_STEPS - 1) for i in range(networks)]
        self.specs = [self.space.decode(self.space.genes.random_of_size(s, rng)) for s in sizes]

    @property
    def params(self) -> list[float]:
        """Params of each network."""
        where = self.cells, self.dataset.image_shape, self.dataset.classes
        return [float(predict_cost(spec, *where).params) for spec in self.specs]

    def proxy_accuracy(self, spec: NetworkSpec, seed: int) -> float:
        """Train a network by itself."""
        build = builder(spec, self.cells, self.dataset.image_shape, self.dataset.classes)
        model = seeded_model(build, seed, "cpu")
        split = self.dataset.search_train
        train(model, split, self.recipe, seed=seed, augment=self.data.augment)
        return accuracy(model, self.dataset.search_valid)

    def trained_store(
        self, config: SharedWeightsConfig, recipe: TrainConfig, seed: int
    ) -> SharedWeights:
        """Train shared weights."""
        dataset = self.dataset
        shared = SharedWeights(
            Networks(self.space, self.cells, dataset.image_shape, dataset.classes), seed=seed
        )
        train_shared(shared, dataset, config, recipe, seed=seed, augment=self.data.augment)
        return shared


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b."""
    return float(kendalltau(a, b).statistic)


def partial_tau(a: Sequence[float], b: Sequence[float], held: Sequence[float]) -> float:
    """Return the tau of `a` and `b` with `held` fixed; nan where `held` orders one of them."""
    ab, ah, bh = tau(a, b), tau(a, held), tau(b, held)
    rest = (1 - ah**2) * (1 - bh**2)
    return (ab - ah * bh) / math.sqrt(rest) if rest > 0 else math.nan


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return what a call returns, and its seconds."""
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def main(
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as one npz; digits without")] = None,
    networks: Annotated[int, typer.Option(min=16)] = 32,
    blocks: Annotated[int, typer.Option(min=2, help="normal blocks, and reduction blocks")] = 4,
    sampling: Annotated[str, typer.Option(help="ways, with commas between")] = "sandwich,fair",
    epochs: Annotated[int, typer.Option(min=1, help="of the store")] = 40,
    networks_per_step: Annotated[int, typer.Option(min=2)] = 4,
    learning_rate: Annotated[float, typer.Option()] = 0.1,
    seeds: Annotated[int, typer.Option(min=1, help="stores for each sampling")] = 1,
    seed: Annotated[int, typer.Option(help="of blocks, networks and splits")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Print a table of rankers."""
    torch.set_num_threads(threads)
    name = "quickstart.yaml" if data is None else "cifar10_cpu.yaml"
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    if data is not None:
        config["data"]["root"] = str(data)
    task = Task(config, blocks, networks, seed)
    print(f"{name}: {networks} networks of {task.space.size}, {blocks} blocks of a kind")
    print(
        f"{'ranker':22} {'tau':>6} {'partial':>8} {'accuracy':>9} {'store_s':>8} {'network_s':>10}"
    )

    def row(ranker: str, tau: float, partial: float, mean: float, *seconds: float) -> None:
        times = "".join(f" {value:>{8 + 2 * i}.2f}" for i, value in enumerate(seconds))
        print(f"{ranker:22} {tau:6.2f} {partial:8.2f} {mean:9.3f}{times}", flush=True)

    proxies, proxy_s = timed(
        lambda: [[task.proxy_accuracy(spec, s) for spec in task.specs] for s in PROXY_SEEDS]
    )
    truth = [statistics.fmean(pair) for pair in zip(*proxies, strict=True)]
    params = task.params
    row("params", tau(params, truth), math.nan, math.nan, 0.0, 0.0)
    one = tau(*proxies), partial_tau(*proxies, params), statistics.fmean(truth)
    row("one proxy seed", *one, 0.0, proxy_s / networks / len(PROXY_SEEDS))
    for way in sampling.split(","):
        for store_seed in range(seeds):
            recipe = task.recipe.model_copy(update={"learning_rate": learning_rate})
            settings = SharedWeightsConfig(
                sampling=way,
                networks_per_step=networks_per_step,
                epochs=epochs,
                calibration_images=len(task.dataset.search_train),
            )
            shared, store_s = timed(task.trained_store, settings, recipe, store_seed)
            found, score_s = timed(
                lambda s=shared, n=settings.calibration_images: [
                    score(s, spec, task.dataset, n) for spec in task.specs
                ]
            )
            numbers = tau(found, truth), partial_tau(found, truth, params), statistics.fmean(found)
            row(f"{way}, seed {store_seed}", *numbers, store_s, score_s / networks)


if __name__ == "__main__":
    typer.run(main)
