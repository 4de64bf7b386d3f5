"""How far a short block search gets with a small and a large step on the alphas.

`python benchmarks/alpha_step.py` runs the quickstart's search (digits, 54 architecture steps) with
two learning rates and three seeds on one thread, and prints the entropy of an edge's op
probabilities at its end, mean over edges: ln(ops) is no decision, 0 a full one. Four minutes.
"""

import math
import statistics

import torch

from blocksearch.engine import search
from blocksearch.search import make_strategy
from configs import FOLDER
from configs.experiment import Config
from evaluation.data.dataset import load_dataset
from netsearch.space.genome import stages_for

TABLE = "blocksearch.strategies.enhanced_gradient"
SEEDS = (0, 1, 2)


def entropy(learning_rate: float, seed: int) -> float:
    """Return the mean entropy of an edge, in nats, after one search."""
    changes = [f"{TABLE}.alpha_learning_rate={learning_rate}", f"{TABLE}.complexity_weight=0.0"]
    config = Config.load(FOLDER / "quickstart.yaml", [*changes, f"seed={seed}"])
    dataset = load_dataset(config.data, seed)
    (one,) = config.blocksearch.searches(seed)
    stages = stages_for(dataset.image_shape[1:])
    strategy = make_strategy(one, config.blocksearch, dataset, stages, "cpu")
    search(
        strategy,
        dataset.search_train,
        dataset.search_valid,
        epochs=config.blocksearch.epochs,
        batch_size=config.blocksearch.batch_size,
        seed=one.seed,
        augment=config.data.augment,
    )
    p = torch.softmax(strategy.architecture()[0].detach(), dim=-1)
    return float(-(p * p.log()).sum(dim=-1).mean())


def main() -> None:
    """Print one line per learning rate."""
    torch.set_num_threads(1)
    ops = len(Config.load(FOLDER / "quickstart.yaml").blocksearch.space.ops)
    print(f"no decision: {math.log(ops):.3f} nats; torch {torch.__version__}, seeds {SEEDS}")
    for learning_rate in (0.5, 5.0):
        values = [entropy(learning_rate, seed) for seed in SEEDS]
        mean, std = statistics.fmean(values), statistics.stdev(values)
        print(f"learning rate {learning_rate}: {mean:.3f} +- {std:.3f}", flush=True)


if __name__ == "__main__":
    main()
