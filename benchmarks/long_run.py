"""Long searches on a table, through the archive on disk: do memory and time stay flat?

    python benchmarks/long_run.py --data DIR --evaluations 10000 --json
    python benchmarks/long_run.py --data DIR --search surrogate --evaluations 2000

DIR is as for `benchmarks/network_search.py`. Each search runs in a process of its own on the
NATS-Bench size space (32,768 networks), `halving` on NAS-Bench-201 with its two fidelities; every
answer goes through the `Archive` on disk. At each full thousand evaluations stand the resident
memory and the milliseconds per evaluation since the last, those of the archive not counted. The
slopes are per 1,000 evaluations, over the points from `--from` on: the median of the slopes of all
pairs of points (Theil and Sen), which a few points with a large temporary array do not move, with
its 95% interval. A flat run has an interval that holds 0, or a slope that is nothing beside the
level.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import theilslopes

from evaluation.files.archive import Archive
from evaluation.records import Cost, ModelRecord
from evaluation.workers.memory import _resident_bytes as resident_bytes
from netsearch.searches import SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from netsearch.space.genome import Floats
from tabular import TableProblem, nats_size, nb201

POPULATION = 20
EVERY = 250  # evaluations between two points


def problem_of(search: str, data: Path) -> TableProblem:
    """Return the table that has what a search needs."""
    return nb201(data, epochs=200) if search == "halving" else nats_size(data)


def run(search: str, data: Path, evaluations: int, folder: Path) -> dict[str, Any]:
    """Run one search and return its points and the time to read its archive."""
    problem = problem_of(search, data)
    config = SearchConfig.model_validate(
        {"search": search, "evaluations": evaluations, "population": POPULATION, "rungs": 2}
    )
    if problem.low:
        config = config.model_copy(update={"eta": round(1 / problem.low[0])})
    archive, points = Archive(folder / "archive.jsonl"), []
    problem.features(problem.cheapest())
    search_s, began = 0.0, time.process_time()
    generations = 0

    def evaluate(batch: Batch) -> Floats:
        nonlocal search_s, began, generations
        search_s += time.process_time() - began
        generations += 1
        errors = problem.evaluate(batch)
        costs = problem.costs(batch.genomes)[:, 0]
        for genome, error, params in zip(batch.genomes, errors, costs, strict=True):
            if batch.fidelity == 1:
                id = "-".join(map(str, genome))
                cost = Cost(int(params), 0)
                archive.add(ModelRecord(id, genome, (), cost, 0, float(1 - error)))
            if batch.fidelity == 1 and len(archive) % EVERY == 0:
                mib = resident_bytes() / 2**20
                points.append((len(archive), mib, search_s, generations))
        began = time.process_time()
        return errors

    run_search(SEARCHES[search](problem, config, 0), evaluate, config.evaluations)
    began = time.process_time()
    again = len(Archive(archive.path))
    read_s = time.process_time() - began
    assert again == len(archive)
    return {"points": points, "archive_read_s": read_s, "evaluations": len(archive)}


def slope(x: Floats, y: Floats) -> dict[str, float]:
    """Return the slope per 1,000 evaluations with its 95% interval, and the median level."""
    line = theilslopes(y, x, alpha=0.95)
    per_1000 = [1000 * float(one) for one in (line.slope, line.low_slope, line.high_slope)]
    return dict(zip(("slope", "low", "high"), per_1000, strict=True), median=float(np.median(y)))


def summary(search: str, found: dict[str, Any], start: int) -> dict[str, Any]:
    """Return the row of a search."""
    count, mib, total_s, generations = np.array(found["points"], dtype=float).T
    ms = 1000 * np.diff(total_s) / np.maximum(np.diff(generations), 1)
    if search == "random":  # all at once: there are no generations
        ms = np.zeros(len(ms))
    late = count >= start
    return {
        "search": search,
        "evaluations": found["evaluations"],
        "search_s": total_s[-1],
        "memory_mib": slope(count[late], mib[late]),
        "generation_ms": slope(count[1:][late[1:]], ms[late[1:]]),
        "archive_read_s": found["archive_read_s"],
        "points": [
            {"evaluations": int(c), "memory_mib": round(m, 1), "generation_ms": round(t, 2)}
            for c, m, t in zip(count[1:], mib[1:], ms, strict=True)
            if c % 1000 == 0
        ],
    }


def _in_process(search: str, data: Path, evaluations: int, queue: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        queue.put(run(search, data, evaluations, Path(folder)))


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tables.")],
    evaluations: Annotated[int, typer.Option(min=1000)] = 10_000,
    search: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    start: Annotated[int, typer.Option("--from", help="Evaluations before the slopes.")] = 1500,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run long searches and print the slopes of memory and time."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in search or SEARCHES:
        queue = context.Queue()
        process = context.Process(target=_in_process, args=(name, data, evaluations, queue))
        process.start()
        rows.append(summary(name, queue.get(), start))
        process.join()
        if as_json:
            continue
        row, memory, ms = rows[-1], rows[-1]["memory_mib"], rows[-1]["generation_ms"]
        print(
            f"{name:10}{row['evaluations']:7} evaluations, {row['search_s']:7.1f} s; per 1,000: "
            f"memory {memory['slope']:+.2f} MiB [{memory['low']:+.2f}, {memory['high']:+.2f}] of "
            f"{memory['median']:.0f}; generation {ms['slope']:+.2f} ms [{ms['low']:+.2f}, "
            f"{ms['high']:+.2f}] of {ms['median']:.1f}; "
            f"archive read in {row['archive_read_s']:.2f} s",
            flush=True,
        )
    if as_json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
