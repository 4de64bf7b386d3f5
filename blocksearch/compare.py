"""Strategies side by side on equal budgets: search, then train or look up what they found.

Every strategy searches the same space with the same images, epochs, batch and supernet layout, once
per seed. Its first candidate, built in the layout of the supernet, is trained from scratch by one
recipe, or looked up where the space has a table. Random cells of the space stand beside them.
"""

import os
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blocksearch import nas_bench_201
from blocksearch.config import Search
from blocksearch.engine import Cells
from blocksearch.search import SearchContext, SearchResult, build_supernet
from blocksearch.supernet.supernet import Supernet
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.records import ModelRecord
from evaluation.training.context import RunContext
from evaluation.training.retrain import RetrainConfig, RetrainJob, retrain_all
from evaluation.workers.workers import Workers

RANDOM = "random"
TABLES_VARIABLE = "PARETOBLOCKS_DATA"
FIGURES = ("accuracy", "params", "flops", "bit_ops", "search_s", "peak_memory_mib")
TABLE_COLUMNS = ("c10_test_200", "c100_test_200", "in16_test_200", "raspi4")


@dataclass(frozen=True)
class Row:
    """What one search came to.

    Attributes:
        strategy: Its name; with the settings that are swept, if any.
        seed: Of the search.
        space: Name of the op set.
        accuracy: Test accuracy in [0, 1]: of the retrained network, a mean over retraining seeds,
            or from the table, and then of CIFAR-10 whatever the search saw; None if the search or a
            training failed.
        params: A count.
        flops: Multiply-adds for one image.
        bit_ops: Multiply-adds of 1-bit numbers for one image, which are not among the FLOPs.
        model_bits: Size of the weights, 32 bits each but for 1-bit ones.
        search_s: Wall-clock seconds of the search on its threads; None if an epoch is not logged.
        peak_memory_mib: Most memory that the search held, supernets included; None likewise.
        cells: The cells found, by kind; None if the search failed.
        table: Other columns of the table, if there is one.
        failure: Why there is no accuracy.
    """

    strategy: str
    seed: int
    space: str
    accuracy: float | None = None
    params: int | None = None
    flops: int | None = None
    bit_ops: int = 0
    model_bits: int | None = None
    search_s: float | None = 0.0
    peak_memory_mib: float | None = 0.0
    cells: Cells | None = None
    table: Mapping[str, float] | None = None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = asdict(self)
        if self.cells is not None:
            data["cells"] = {kind: cell.to_json() for kind, cell in self.cells.items()}
        return data


def compare(
    context: SearchContext,
    searches: Sequence[Search],
    results: Sequence[SearchResult],
    retraining: RetrainConfig,
    out: RunFolder,
    workers: Workers,
) -> list[Row]:
    """Judge what searches found: train it, or look it up; what is trained is not trained again.

    Args:
        context: What the searches have in common.
        searches: Strategies x seeds.
        results: What `run_searches` returned for them.
        retraining: Recipe and seeds of the trainings from scratch.
        out: Folder of the run.
        workers: Where networks train, and how many at the same time.

    Returns:
        A row for every search, then one of random cells for every search seed.

    Raises:
        InputError: If a worker died, or a file is missing or damaged.
    """
    config = context.config
    dataset = context.run.dataset
    supernet = build_supernet(config, dataset, context.stages, seed=0)
    space = config.ops if isinstance(config.ops, str) else "own"
    spent = _spent(context.folder.events(), config.epochs)
    rows = []
    for one, result in zip(searches, results, strict=True):
        search_s, peak_mib = spent.get(one.name, (None, None))
        row = Row(one.label, one.seed, space, search_s=search_s, peak_memory_mib=peak_mib)
        best = result.candidates[0][0] if result.candidates else None
        rows.append(replace(row, cells=best, failure=result.failure))
    for seed in dict.fromkeys(one.seed for one in searches):
        generator = random.Random(seed)
        cells = {kind: supernet.space.random_cell(generator) for kind in supernet.kinds}
        rows.append(Row(RANDOM, seed, space, cells=cells))
    if supernet.space == nas_bench_201.SPACE:
        return _looked_up(rows)
    return _retrained(rows, supernet, retraining, context.run, out, workers)


def benchmark_table() -> nas_bench_201.Table:
    """Return NAS-Bench-201's table from the folder `$PARETOBLOCKS_DATA`.

    Raises:
        InputError: If the variable is not set, or a file is missing or damaged.
    """
    folder = os.environ.get(TABLES_VARIABLE)
    if folder is None:
        raise InputError(
            f"the space nas_bench_201 is judged by tables: set {TABLES_VARIABLE} to the folder "
            "that holds nb201_accuracy.csv.gz and nb201_latency_help.csv.gz"
        )
    return nas_bench_201.Table.read(Path(folder), TABLE_COLUMNS)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line per strategy: n, and mean and sample standard deviation of each figure."""
    lines = []
    for strategy in dict.fromkeys(row.strategy for row in rows):
        own = [row for row in rows if row.strategy == strategy]
        good = [row.to_json() for row in own if row.accuracy is not None]
        line: dict[str, Any] = {
            "strategy": strategy,
            "n": len(good),
            "failed": len(own) - len(good),
        }
        for figure in FIGURES:
            values = [float(row[figure]) for row in good if row[figure] is not None]
            line[figure] = statistics.fmean(values) if values else None
            line[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    return lines


def _looked_up(rows: Sequence[Row]) -> list[Row]:
    """Rows with the accuracies of the table, and the costs of its networks, which are not 1-bit."""
    table = benchmark_table()
    judged = []
    for row in rows:
        if row.cells is None:
            judged.append(row)
            continue
        (found,) = row.cells.values()
        cell = replace(found, one_bit=False)
        cost = nas_bench_201.benchmark_network(cell).cost()
        judged.append(
            replace(
                row,
                accuracy=table[cell][TABLE_COLUMNS[0]],
                params=cost.params,
                flops=cost.flops,
                model_bits=cost.model_bits,
                table=dict(table[cell]),
            )
        )
    return judged


def _retrained(
    rows: Sequence[Row],
    supernet: Supernet,
    retraining: RetrainConfig,
    context: RunContext,
    out: RunFolder,
    workers: Workers,
) -> list[Row]:
    """Rows with the test accuracies of the networks that the cells make, trained from scratch."""
    stacks = [None if row.cells is None else supernet.found(row.cells) for row in rows]
    jobs = {
        stack: RetrainJob("retrained", ModelRecord(stack.id, (), (), stack.cost(), 0), stack)
        for stack in stacks
        if stack is not None
    }
    records = retrain_all(list(jobs.values()), retraining, out, context, workers)
    record_of = dict(zip(jobs, records, strict=True))
    judged = list(rows)
    for number, stack in enumerate(stacks):
        if stack is None:
            continue
        record = record_of[stack]
        judged[number] = replace(
            rows[number],
            accuracy=record.test_accuracy_mean,
            params=record.cost.params,
            flops=record.cost.flops,
            bit_ops=record.cost.bit_ops,
            model_bits=record.cost.model_bits,
            failure=record.failure,
        )
    return judged


def _spent(
    events: Sequence[Mapping[str, Any]], epochs: int
) -> dict[str, tuple[float | None, float | None]]:
    """Return seconds and peak MiB of every search; of an epoch that was done twice, the last.

    None where not all epochs are logged: the search failed, or its lines are lost.
    """
    seconds: dict[str, dict[int, float]] = {}
    peaks: dict[str, float] = {}
    for event in events:
        if event.get("stage") == "blocks":
            task = str(event["task"])
            if "epoch_s" in event:
                seconds.setdefault(task, {})[event["epoch"]] = event["epoch_s"]
            if "peak_memory_mib" in event:
                peaks[task] = max(peaks.get(task, 0.0), event["peak_memory_mib"])
    return {
        task: (sum(own.values()) if len(own) == epochs else None, peaks.get(task))
        for task, own in seconds.items()
    }
