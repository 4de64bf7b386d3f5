"""HOPNAS where all networks can be trained: do path dropout and the order of the pruning help?

Three cells of one edge with four ops make 64 networks, on scikit-learn's 8x8 digits. Each is
trained alone from several seeds; its mean test accuracy is the truth. Then, over supernet seeds:

- Kendall's tau between the truth and the supernet's rating of the 64, by accuracy and by loss on
  the validation images, trained without and with path dropout, nothing pruned;
- for every order of the pruning, the place of the network that survives, in [0, 1], 0 the best.

`python benchmarks/hopnas_order.py --scale small` takes minutes on one core.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import nn

from blocksearch.engine import Cells, SearchSetup, WeightConfig, search
from blocksearch.relaxation import one_hot_gates
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.strategies.hopnas import Hopnas
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.supernet import Supernet
from evaluation.data.batches import batches
from evaluation.data.config import AugmentConfig, DataConfig
from evaluation.data.dataset import Dataset, load_dataset
from evaluation.training.loop import TrainConfig, accuracy, seeded_model, train

SPACE = SearchSpace(
    ("skip_connect", "avg_pool_3x3", "dws_conv_3x3", "dws_conv_5x5"),
    nodes=1,
    inputs=1,
    edges_per_node=1,
    output="last",
)
CELLS = 3
DATA = DataConfig(name="digits", valid_fraction=0.4, test_fraction=0.4)
SCALES = {  # seeds of the truth, epochs of each training, supernet seeds, epochs of each search
    "small": (2, 10, 8, 12),
    "full": (6, 24, 20, 32),
}
BATCH_SIZE = 32
UNPRUNED = {"warmup": 0.999}  # no step is so late
DIRECTIONS = ("shallow_first", "deep_first", "all_at_once", "random")


def supernet(dataset: Dataset, seed: int, form: Form = PLAIN) -> Supernet:
    """Return the seeded supernet of the mini-space."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Supernet(
            SPACE,
            dataset.image_shape,
            dataset.classes,
            channels=8,
            cells=CELLS,
            stages=1,
            form=form,
        )


def networks() -> list[Cells]:
    """Return the cells of every network."""
    return [
        {
            f"normal@{position}": Cell(((Edge(0, op),),), SPACE.inputs, SPACE.output)
            for position, op in enumerate(ops)
        }
        for ops in itertools.product(SPACE.ops, repeat=CELLS)
    ]


def truth(dataset: Dataset, nets: list[Cells], epochs: int, seed: int) -> list[float]:
    """Return the test accuracy of each network, each trained alone."""
    recipe = TrainConfig(
        epochs=epochs,
        batch_size=BATCH_SIZE,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        label_smoothing=0.0,
        grad_clip=5.0,
        warmup=0.2,
    )
    layout = supernet(dataset, 0, Form(cell_kinds=True))
    reached = []
    for cells in nets:
        model = seeded_model(layout.found(cells), seed, "cpu")
        train(model, dataset.search_train, recipe, seed=seed, augment=AugmentConfig())
        reached.append(accuracy(model, dataset.test))
    return reached


def searched(dataset: Dataset, epochs: int, seed: int, **settings: Any) -> tuple[Hopnas, Cells]:
    """Return a strategy after its search, and what it derives."""
    weights = WeightConfig(
        learning_rate=0.1,
        learning_rate_end=0.001,
        momentum=0.9,
        weight_decay=3e-4,
        grad_clip=5.0,
    )
    setup = SearchSetup(lambda form: supernet(dataset, seed, form), weights)
    strategy = Hopnas(setup, Hopnas.Config(**settings), torch.Generator().manual_seed(seed))
    (cells,) = search(
        strategy,
        dataset.search_train,
        dataset.search_valid,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
        augment=AugmentConfig(),
    )
    return strategy, cells


@torch.no_grad()
def shared_ratings(
    strategy: Hopnas, dataset: Dataset, nets: list[Cells]
) -> tuple[list[float], list[float]]:
    """Return accuracy and negative loss of each network on the supernet's weights."""
    ((images, labels),) = batches(dataset.search_valid, len(dataset.search_valid))
    right, losses = [], []
    for cells in nets:
        logits = strategy.supernet(images, one_hot_gates(cells, SPACE))
        right.append(float((logits.argmax(dim=1) == labels).float().mean()))
        losses.append(-float(nn.functional.cross_entropy(logits, labels)))
    return right, losses


def place(cells: Cells, nets: list[Cells], reached: list[float]) -> float:
    """Return the part of the other networks that are better than this one."""
    own = reached[nets.index(cells)]
    return sum(other > own for other in reached) / (len(reached) - 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small")
    truth_seeds, truth_epochs, seeds, epochs = SCALES[parser.parse_args().scale]
    torch.set_num_threads(1)
    dataset = load_dataset(DATA, 0)
    began = time.process_time()
    nets = networks()
    runs = [truth(dataset, nets, truth_epochs, seed) for seed in range(truth_seeds)]
    reached = [statistics.fmean(values) for values in zip(*runs, strict=True)]
    agreement = [kendalltau(a, b).statistic for a, b in itertools.combinations(runs, 2)]
    print(f"truth: accuracies {min(reached):.3f} to {max(reached):.3f}, {truth_seeds} seeds;")
    print(f"tau between two of them {statistics.fmean(agreement):.3f}; torch {torch.__version__}")

    def line(name: str, values: list[float], note: str = "") -> None:
        mean, std = statistics.fmean(values), statistics.stdev(values)
        print(f"{name:46} {len(values):3} {mean:7.3f} {std:7.3f}  {note}", flush=True)

    print(f"{'':46} {'n':>3} {'mean':>7} {'std':>7}")
    for end in (0.0, 0.8):
        taus: dict[str, list[float]] = {"accuracy": [], "loss": []}
        for seed in range(seeds):
            strategy, _ = searched(dataset, epochs, seed, dropout_end=end, **UNPRUNED)
            for name, rating in zip(taus, shared_ratings(strategy, dataset, nets), strict=True):
                taus[name].append(kendalltau(rating, reached).statistic)
        for name, values in taus.items():
            line(f"tau, dropout_end {end}, rated by {name}", values)
    places: dict[str, list[float]] = {}
    variants = [{"direction": direction} for direction in DIRECTIONS]
    for settings in [*variants, {"dropout_end": 0.0}]:
        survivors = [searched(dataset, epochs, seed, **settings)[1] for seed in range(seeds)]
        label = ", ".join(f"{key} {value}" for key, value in settings.items())
        places[label] = [place(cells, nets, reached) for cells in survivors]
        top = sum(value <= 0.1 for value in places[label])
        line(f"place of the survivor, {label}", places[label], f"{top} in the best tenth")
    for direction in DIRECTIONS[:-1]:
        pairs = zip(places[f"direction {direction}"], places["direction random"], strict=True)
        line(f"place, {direction} minus random", [one - other for one, other in pairs])
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
