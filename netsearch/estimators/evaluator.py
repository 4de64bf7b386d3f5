"""Genomes -> records in an archive: hard budgets first, then what an estimator says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from evaluation.errors import InputError, reason_of
from evaluation.files.archive import Archive
from evaluation.records import ModelRecord
from evaluation.workers.pool import WorkerDied, run_tasks
from evaluation.workers.workers import Workers
from netsearch.estimators.protocol import Estimator
from netsearch.searches.protocol import Batch
from netsearch.space.genome import Floats, Genome
from netsearch.space.problem import NetworkProblem

FIRST = 10  # networks that a search must have asked for before it has too many failures
TOO_MANY = 0.5  # part of them; a search in which more fail stops
REASONS = 3  # that the message of such an end names


@dataclass
class Evaluator:
    """Evaluates genomes of one problem into archives, each network once.

    Attributes:
        problem: What the genomes stand for, what they cost, what is allowed.
        method: How a network is judged.
        seed: Of every proxy training, so that candidates differ by their structure alone.
        workers: Where networks train, and how many at the same time.
        known: Archives of full evaluations, taken over instead of being evaluated again.
        on_record: Called after every new record.
    """

    problem: NetworkProblem
    method: Estimator
    seed: int
    workers: Workers
    known: tuple[Archive, ...] = ()
    on_record: Callable[[ModelRecord], None] = lambda record: None
    _told: list[str | None] = field(init=False, default_factory=list)  # failures so far, or None

    def evaluate(self, batch: Batch, archive: Archive) -> Floats:
        """Put a record of every genome into `archive`; those that are there stay as they are.

        Returns:
            The errors in [0, 1], NaN for failed networks, (N,).

        Raises:
            ValueError: If a genome is over a hard budget: such a one is never evaluated.
            InputError: If more than `TOO_MANY` of at least `FIRST` networks have failed.
        """
        tasks: dict[str, tuple[object, ...]] = {}
        blanks: dict[str, ModelRecord] = {}
        known = self.known if batch.fidelity == 1 else ()
        for genome in batch.genomes:
            cost, id = self.problem.cost(genome), self.problem.id(genome)
            budgets = self.problem.budgets
            if budgets.cost_excess(cost) > 0:
                raise ValueError(f"genome {genome} is over budget: {cost} against {budgets}")
            if archive.get(id) is not None or id in tasks:
                continue
            earlier = next((r for a in known if (r := a.get(id)) is not None), None)
            if earlier is not None:
                self._add(archive, earlier)
                continue
            blocks = self.problem.space.decode(genome).blocks
            blanks[id] = ModelRecord(id, genome, blocks, cost, self.seed)
            tasks[id] = self.method.arguments(blanks[id], self.problem, batch.fidelity)
        self._check_failures(batch, archive)
        minutes = self.workers.evaluation_minutes
        for id, result in run_tasks(self.method.judge, tasks, self.workers, minutes=minutes):
            if isinstance(result, WorkerDied):
                result = replace(blanks[id], failure=reason_of(result))
            self._add(archive, result)
            self._check_failures(batch, archive)
        self._told += [self._failure(genome, archive) for genome in batch.genomes]
        return np.array([self._error(genome, archive) for genome in batch.genomes])

    def _error(self, genome: Genome, archive: Archive) -> float:
        record = archive.get(self.problem.id(genome))
        assert record is not None
        return np.nan if record.valid_accuracy is None else 1.0 - record.valid_accuracy

    def _failure(self, genome: Genome, archive: Archive) -> str | None:
        record = archive.get(self.problem.id(genome))
        return record.failure if record is not None else None

    def _check_failures(self, batch: Batch, archive: Archive) -> None:
        """Stop as soon as too many of all networks asked for have failed, this batch included.

        Networks still to come count as good, for those that fail may be the fastest to answer.

        Raises:
            InputError: If so; it names the commonest reasons.
        """
        failures = [*self._told, *(self._failure(genome, archive) for genome in batch.genomes)]
        reasons = Counter(failure for failure in failures if failure is not None)
        failed, asked = reasons.total(), len(failures)
        if asked >= FIRST and failed > TOO_MANY * asked:
            common = [f"{count} x {reason}" for reason, count in reasons.most_common(REASONS)]
            raise InputError(
                f"{failed} of {asked} networks failed, so the search stops: {'; '.join(common)}; "
                f"all are recorded in {archive.path}, and this run does not try them again"
            )

    def _add(self, archive: Archive, record: ModelRecord) -> None:
        archive.add(record)
        self.on_record(record)
