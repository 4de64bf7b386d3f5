"""NetworkSpec -> ModelRecord: hard budgets from exact counts, then accuracy by proxy training."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from blocksearch.space import Cell
from blocksearch.stack import Stack
from evaluation.data import worker_dataset
from evaluation.metrics import MetricsLog
from evaluation.parallel import WorkerDied, run_tasks
from evaluation.pareto import Budgets
from evaluation.records import Archive, Cost, ModelRecord
from evaluation.training import TrainingContext, accuracy, seeded_model, train
from netsearch.genome import GenomeSpace
from netsearch.network import builder, extreme_genomes, predict_cost

Genome = tuple[int, ...]


def estimate(record: ModelRecord, build: Stack, context: TrainingContext) -> ModelRecord:
    """Return `record` with the accuracy on `search_valid` after proxy training on `search_train`.

    A network that cannot be built, does not fit into memory or diverges comes back with the reason
    as its `failure` and no accuracy.
    """
    began = time.perf_counter()
    dataset = worker_dataset(context.data, context.data_seed, context.device)
    try:
        model = seeded_model(build, record.seed, context.device)
        train(
            model,
            dataset.search_train,
            context.recipe,
            seed=record.seed,
            augment=context.data.augment,
        )
        record = replace(record, valid_accuracy=accuracy(model, dataset.search_valid))
    except torch.AcceleratorError:
        raise  # the device is broken for this process: no fault of the candidate
    except (RuntimeError, ValueError, MemoryError) as error:  # torch's out-of-memory is the first
        record = replace(record, failure=_reason(error))
    MetricsLog(context.metrics, "networks", record.id).write(
        valid_accuracy=record.valid_accuracy, seconds=time.perf_counter() - began
    )
    return record


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


@dataclass
class Evaluator:
    """Evaluates genomes of one space into archives, each network once.

    Attributes:
        space: Where the genomes live.
        cells: Block name to cell.
        image_shape: (C, H, W).
        classes: Number of classes.
        budgets: Hard budgets on params and FLOPs.
        context: Data, proxy recipe and device, for the workers.
        seed: Of every proxy training, so that candidates differ by their structure alone.
        workers: Processes that train at the same time.
        known: Archives whose records are taken over instead of being trained again.
        on_record: Called after every new record.
    """

    space: GenomeSpace
    cells: Mapping[str, Cell]
    image_shape: tuple[int, int, int]
    classes: int
    budgets: Budgets
    context: TrainingContext
    seed: int
    workers: int
    known: tuple[Archive, ...] = ()
    on_record: Callable[[ModelRecord], None] = lambda record: None
    _ids: dict[Genome, str] = field(default_factory=dict)
    _costs: dict[Genome, Cost] = field(default_factory=dict)

    def cost(self, genome: Genome) -> Cost:
        """Return the exact cost of a genome's network."""
        if genome not in self._costs:
            spec = self.space.decode(genome)
            self._costs[genome] = predict_cost(spec, self.cells, self.image_shape, self.classes)
        return self._costs[genome]

    def id(self, genome: Genome) -> str:
        """Return the id of a genome's network."""
        if genome not in self._ids:
            self._ids[genome] = self.space.decode(genome).id(self.cells)
        return self._ids[genome]

    def cheapest(self, count: str) -> Genome:
        """Return a genome than which none of the space has less `count`, params or flops."""
        cells, shape, classes = self.cells, self.image_shape, self.classes
        return extreme_genomes(self.space, cells, shape, classes, count)[0]

    def fits(self, genome: Genome) -> bool:
        """Tell whether a genome's network keeps the hard budgets."""
        return self.budgets.cost_excess(self.cost(genome)) <= 0

    def evaluate(self, genomes: Sequence[Genome], archive: Archive) -> None:
        """Put a record of every genome into `archive`; those that are there stay as they are.

        Raises:
            ValueError: If a genome is over a hard budget: such a one is never trained.
        """
        tasks: dict[str, tuple[object, ...]] = {}
        blanks: dict[str, ModelRecord] = {}
        for genome in genomes:
            cost, id = self.cost(genome), self.id(genome)
            if self.budgets.cost_excess(cost) > 0:
                raise ValueError(f"genome {genome} is over budget: {cost} against {self.budgets}")
            if archive.get(id) is not None or id in tasks:
                continue
            earlier = next((r for a in self.known if (r := a.get(id)) is not None), None)
            if earlier is not None:
                self._add(archive, earlier)
                continue
            spec = self.space.decode(genome)
            blanks[id] = ModelRecord(id, genome, spec.blocks, cost, self.seed)
            build = builder(spec, self.cells, self.image_shape, self.classes)
            tasks[id] = (blanks[id], build, self.context)
        for id, result in run_tasks(estimate, tasks, self.workers):
            if isinstance(result, WorkerDied):
                result = replace(blanks[id], failure=_reason(result))
            self._add(archive, result)

    def _add(self, archive: Archive, record: ModelRecord) -> None:
        archive.add(record)
        self.on_record(record)
