"""Every network search on tabular benchmarks: hypervolume against evaluations.

    python benchmarks/network_search.py --data DIR --picture curves.png          # all problems
    python benchmarks/network_search.py --data DIR --problem nb201 --evaluations 100 --json
    python benchmarks/network_search.py --data DIR --problem nats_size --overhead

DIR holds `nb201_accuracy.csv.gz`, `nb201_latency_help.csv.gz` and `nats_size_cifar10.csv.gz`.
Hypervolume is a share of that of the whole table's front; the reference point holds the table's
worst error and largest cost, on linear axes. On NAS-Bench-201 the validation accuracy after 12
epochs is searched; the share by test accuracy after 200 epochs is reported beside it. A latency is
taken as known before a cell is trained, as a count is.
"""

import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from joblib import Parallel, cpu_count, delayed
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem as PymooProblem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.crossover.ux import UX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from evaluation.errors import InputError
from netsearch.searches import LABELS, SEARCHES
from netsearch.searches.protocol import Batch, SearchConfig, run_search
from netsearch.space.genome import Floats, Genome
from tabular import TableProblem, nats_size, nb201

POPULATION = 20
LONG, LONG_POPULATION = 4, 40  # plain NSGA-II with so many times the evaluations, for comparison
DEVICES = ("raspi4", "pixel3", "eyeriss", "fpga", "1080ti_1", "gold_6226")
POINTS = (20, 30, 40, 60, 80, 100, 150, 200, 300, 400)


@dataclass(frozen=True)
class Run:
    """One search with one seed: shares of hypervolume, and its seconds without evaluations."""

    shares: dict[int, float]
    test_share: float
    overhead_s: float


def problems(folder: Path, names: list[str]) -> dict[str, TableProblem]:
    """Read problems: `nats_size`, `nb201`, and `nb201-NAME` of a data set, device or `epochs`."""
    readers = {
        "nats_size": lambda: nats_size(folder),
        "nb201": lambda: nb201(folder),
        "nb201-cifar100": lambda: nb201(folder, "cifar100"),
        "nb201-imagenet16": lambda: nb201(folder, "imagenet16"),
        "nb201-flops": lambda: nb201(folder, costs=("flops",)),
        "nb201-params-raspi4": lambda: nb201(folder, costs=("params", "raspi4")),
        "nb201-200-epochs": lambda: nb201(folder, epochs=200),
        **{f"nb201-{one}": lambda one=one: nb201(folder, costs=(one,)) for one in DEVICES},
    }
    unknown = [name for name in names if name not in readers]
    if unknown:
        raise InputError(f"--problem: expected one of {', '.join(readers)}, got {unknown[0]}")
    return {name: readers[name]() for name in names or readers}


def run_one(
    problem: TableProblem, search: str, evaluations: int, population: int, seed: int
) -> Run:
    """Run a search once; its clock stands still while the table answers."""
    config = SearchConfig(search=search, evaluations=evaluations, population=population, rungs=2)
    if problem.low:
        config = config.model_copy(update={"eta": round(1 / problem.low[0])})
    told: list[Genome] = []
    spent, table_s, shares = 0.0, 0.0, {}

    def evaluate(batch: Batch) -> Floats:
        nonlocal spent, table_s
        began = time.perf_counter()
        for genome in batch.genomes:
            spent += batch.fidelity
            if batch.fidelity == 1:
                told.append(genome)
            count = int(spent + 1e-9)
            if count in POINTS and count not in shares and told:
                shares[count] = problem.share(told)
        errors = problem.evaluate(batch)
        table_s += time.perf_counter() - began
        return errors

    problem.features(problem.cheapest())  # whole tables are prepared once, not by every search
    began = time.perf_counter()
    run_search(SEARCHES[search](problem, config, seed), evaluate, evaluations)
    overhead_s = time.perf_counter() - began - table_s
    shares[evaluations] = problem.share(told)
    return Run(shares, problem.share(told, reported=True), overhead_s)


def suitable(problem: TableProblem) -> list[str]:
    """Return the searches that this problem has data for: only one has two fidelities."""
    return [name for name in SEARCHES if name != "halving" or problem.low is not None]


def compare(problem: TableProblem, evaluations: int, seeds: int, jobs: int) -> list[dict[str, Any]]:
    """Run every search with paired seeds; a row each, and NSGA-II with four times as many."""
    plans = {name: (name, evaluations, POPULATION) for name in suitable(problem)} | {
        f"nsga2 x{LONG}": ("nsga2", LONG * evaluations, LONG_POPULATION)
    }
    calls = (
        delayed(run_one)(problem, *plan, seed) for plan in plans.values() for seed in range(seeds)
    )
    runs = Parallel(n_jobs=jobs, max_nbytes=None)(calls)  # no files to leave behind
    by_plan = {name: runs[i * seeds : (i + 1) * seeds] for i, name in enumerate(plans)}
    plain = [one.shares[evaluations] for one in by_plan["nsga2"]]
    rows = []
    for name, ones in by_plan.items():
        last = [one.shares[max(one.shares)] for one in ones]
        rows.append(
            {
                "search": name,
                "evaluations": plans[name][1],
                "mean_share": statistics.fmean(last),
                "std_share": statistics.stdev(last) if seeds > 1 else 0.0,
                "wins_against_nsga2": sum(a > b for a, b in zip(last, plain, strict=True)),
                "seeds": seeds,
                "overhead_s": statistics.fmean(one.overhead_s for one in ones),
                "mean_test_share": statistics.fmean(one.test_share for one in ones),
                "curve": {
                    count: statistics.fmean(one.shares[count] for one in ones)
                    for count in sorted(ones[0].shares)
                    if all(count in one.shares for one in ones)
                },
            }
        )
    return rows


def overhead(problem: TableProblem, repeats: int = 5) -> list[tuple[str, float, float]]:
    """Time generations of 100: pymoo's own loop in two recipes, then ours; (name, ms, std)."""
    upper = problem.genes.upper

    class Lookup(PymooProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=len(upper), n_obj=2, xl=0, xu=upper, vtype=int)

        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            rows = problem.row([tuple(row) for row in x.astype(int).tolist()])
            out["F"] = np.column_stack([problem.errors[rows], problem.table_costs[rows]])

    def pymoo_ms(seed: int, **operators: Any) -> float:
        algorithm = NSGA2(100, sampling=IntegerRandomSampling(), **operators)
        began = time.perf_counter()
        minimize(Lookup(), algorithm, ("n_gen", 10), seed=seed, verbose=False)
        return (time.perf_counter() - began) * 100

    def ours_ms(search: str, seed: int) -> float:
        generations = 10 if search == "nsga2" else 4
        return run_one(problem, search, 100 * generations, 100, seed).overhead_s * 1e3 / generations

    integer = {"repair": RoundingRepair()}
    ways = {
        "pymoo, SBX and PM (its integer recipe)": lambda seed: pymoo_ms(
            seed, crossover=SBX(**integer), mutation=PM(**integer)
        ),
        "pymoo, uniform crossover and PM": lambda seed: pymoo_ms(
            seed, crossover=UX(prob=0.9), mutation=PM(**integer)
        ),
        **{name: lambda seed, name=name: ours_ms(name, seed) for name in suitable(problem)},
    }
    for way in ways.values():
        way(0)
    times = {name: [] for name in ways}
    for seed in range(repeats):
        for name, way in ways.items():
            times[name].append(way(seed))
    return [(name, statistics.fmean(ms), statistics.stdev(ms)) for name, ms in times.items()]


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the curves of every problem, a panel each."""
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines + 0.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    colours = {name: f"C{number}" for number, name in enumerate(LABELS)}
    labels: dict[str, Any] = {}
    for panel, (title, table) in zip(panels, tables.items(), strict=False):
        for row in table:
            name, counts, shares = row["search"], [*row["curve"]], [*row["curve"].values()]
            label = LABELS.get(name, "NSGA-II, population 40")
            colour = colours.get(name, colours["nsga2"])
            style = "-" if name in LABELS else "--"
            (labels[label],) = panel.plot([*map(int, counts)], shares, style, color=colour, lw=1.8)
        bottom = min(row["mean_share"] for row in table if row["search"] == "nsga2")
        panel.set(title=title, xlabel="evaluations", xscale="log")
        panel.set_ylim(bottom=bottom - 0.6 * (1.0 - bottom), top=1.0)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
        panel.grid(alpha=0.3)
    for panel in panels[len(tables) :]:
        panel.remove()
    figure.supylabel("share of the true hypervolume")
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the tables.")],
    problem: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    evaluations: Annotated[int, typer.Option(min=20)] = 100,
    seeds: Annotated[int, typer.Option(min=1)] = 20,
    jobs: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    picture: Annotated[Path | None, typer.Option(help="Where the curves go, a PNG.")] = None,
    time_overhead: Annotated[bool, typer.Option("--overhead", help="Time generations.")] = False,
) -> None:
    """Compare every search of stage two on tables."""
    try:
        chosen = problems(data, problem or [])
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if time_overhead:
        for name, table in chosen.items():
            print(f"{name}: ms for a generation of 100, mean and std of 5")
            for way, ms, std in overhead(table):
                print(f"  {way:40} {ms:8.1f} +- {std:.1f}")
        return
    tables = {
        name: compare(one, evaluations, seeds, jobs or cpu_count()) for name, one in chosen.items()
    }
    if picture:
        draw(tables, picture)
    if as_json:
        rows = [{"problem": name, **row} for name, table in tables.items() for row in table]
        print(json.dumps(rows, indent=1))
        return
    print(
        f"{platform.machine()}, {cpu_count()} cores, numpy {np.__version__}, {seeds} paired seeds"
    )
    for name, table in tables.items():
        print(
            f"\n{name}\n{'search':12}{'evaluations':>12}{'share':>18}{'wins':>7}{'test':>8}{'s':>8}"
        )
        for row in table:
            share = f"{row['mean_share']:.4f} +- {row['std_share']:.4f}"
            wins = f"{row['wins_against_nsga2']}/{seeds}"
            numbers = f"{row['mean_test_share']:8.4f}{row['overhead_s']:8.2f}"
            print(f"{row['search']:12}{row['evaluations']:12}{share:>18}{wins:>7}{numbers}")


if __name__ == "__main__":
    typer.run(main)
