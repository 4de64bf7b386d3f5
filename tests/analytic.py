"""A space of networks small enough to enumerate, whose accuracy is a formula instead of a training.

Everything else is the production code: genomes, costs, budgets, the evaluator and its archives.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import netsearch.estimators.proxy
from blocksearch.ops import LIGHT_OPS
from blocksearch.space import SearchSpace
from blocksearch.supernet.stack import Stack
from evaluation.data.config import DataConfig
from evaluation.files.archive import Archive
from evaluation.pareto.front import Budgets
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext
from evaluation.training.loop import TrainConfig
from evaluation.workers.workers import Workers
from netsearch.estimators.evaluator import Evaluator
from netsearch.estimators.proxy import ProxyTraining
from netsearch.searches import SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from netsearch.space.genome import Floats, Genome, GenomeSpace
from netsearch.space.networks import Networks
from netsearch.space.problem import NetworkProblem

SHAPE, CLASSES = (1, 8, 8), 10
SPACE = GenomeSpace(
    stages=2,
    depths=(1, 2, 3),
    widths=(4, 8, 16),
    normal=("n0", "n1", "n2"),
    reduction=("r0", "r1"),
)
TINY = GenomeSpace(2, depths=(1, 2), widths=(4, 8), normal=("n0",), reduction=("r0",))
EPOCHS = 9
RECIPE = TrainConfig(
    epochs=EPOCHS,
    batch_size=2,
    learning_rate=0.1,
    momentum=0,
    weight_decay=0,
    label_smoothing=0,
    grad_clip=1,
    warmup=0,
)
CONTEXT = RunContext(DataConfig(name="digits"), 0, "cpu", Path("never-written"))
GENERATOR = random.Random(0)
CELLS = {
    name: SearchSpace(LIGHT_OPS, nodes=2).random_cell(GENERATOR)
    for name in (*SPACE.normal, *SPACE.reduction)
}

Estimate = Callable[[ModelRecord, Stack, RunContext, TrainConfig], ModelRecord]


def accuracy(genome: Genome, epochs: int = EPOCHS) -> float:
    """Rises with depth and width, less and less; blocks matter, and fit together or do not.

    Deep networks of the three-level space learn slowly: with fewer epochs they fall behind.
    """
    d0, d1, w0, w1, n0, n1, r0 = genome
    gain = 0.5 * d0 + 0.8 * d1 + 0.7 * w0 + 0.9 * w1
    fit = (0, 0.5, 0.2)[n0] + (0.4, 0, 0.3)[n1] + 0.3 * r0 + 0.4 * (n0 == n1) * r0
    unlearnt = 0.05 * (d0 + d1) * (1 - epochs / EPOCHS)
    return 1 - 0.9 * math.exp(-0.4 * gain - 0.5 * fit + unlearnt)


def learn(
    record: ModelRecord, build: Stack, context: RunContext, recipe: TrainConfig
) -> ModelRecord:
    """Stands for the training."""
    return replace(record, valid_accuracy=accuracy(record.genome, recipe.epochs))


def replace_training(
    monkeypatch: pytest.MonkeyPatch, estimate: Estimate = learn
) -> list[tuple[str, int]]:
    """Have `estimate` answer instead of the training; (id, epochs) of each call are listed."""
    calls: list[tuple[str, int]] = []

    def answer(
        record: ModelRecord, build: Stack, context: RunContext, recipe: TrainConfig
    ) -> ModelRecord:
        calls.append((record.id, recipe.epochs))
        return estimate(record, build, context, recipe)

    monkeypatch.setattr(netsearch.estimators.proxy, "estimate", answer)
    return calls


@functools.cache  # with what it knows of costs
def problem_of(
    space: GenomeSpace = SPACE,
    budgets: Budgets | None = None,
    costs: tuple[str, ...] = ("params",),
) -> NetworkProblem:
    """Return the networks of a space, with the cells and the images of this file."""
    return NetworkProblem(Networks(space, CELLS, SHAPE, CLASSES), budgets or Budgets(), costs)


def genomes_of(space: GenomeSpace) -> list[Genome]:
    """Return every genome."""
    return list(itertools.product(*(range(top + 1) for top in space.upper.tolist())))


def every_record() -> list[ModelRecord]:
    """Return a record of every network of `SPACE`, as full evaluations give it."""
    problem = problem_of()
    return [
        ModelRecord(str(genome), genome, (), problem.cost(genome), 0, accuracy(genome))
        for genome in genomes_of(SPACE)
    ]


def evaluator_of(
    problem: NetworkProblem, on_record: Callable[[ModelRecord], None] = lambda record: None
) -> Evaluator:
    """Return what evaluates one network after the other, in this process."""
    return Evaluator(problem, ProxyTraining(CONTEXT, RECIPE), 0, Workers(1), on_record=on_record)


def run(
    folder: Path,
    name: str,
    problem: NetworkProblem,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    on_record: Callable[[ModelRecord], None] = lambda record: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    **settings: object,
) -> list[ModelRecord]:
    """Run a search with an archive for each fidelity, and return its full evaluations."""
    config = SearchConfig.model_validate(
        {"search": name, "evaluations": 60, "population": 12, **settings}
    )
    evaluator = evaluator_of(problem, on_record)
    archives = {1.0: Archive(folder / "1.0")}
    folder.mkdir(exist_ok=True)

    def evaluate(batch: Batch) -> Floats:
        on_batch(batch)
        if batch.fidelity not in archives:
            archives[batch.fidelity] = Archive(folder / str(batch.fidelity))
        return evaluator.evaluate(batch, archives[batch.fidelity])

    run_search(SEARCHES[name](problem, config, seed), evaluate, config.evaluations, say)
    return list(archives[1.0])


def files(folder: Path) -> dict[str, bytes]:
    """Return the archives that `run` left."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def counts(name: str) -> Floats:
    """Return a cost of every network of `SPACE`, in the order of `genomes_of`."""
    problem = problem_of()
    return np.array([problem.cost(genome).count(name) for genome in genomes_of(SPACE)])
