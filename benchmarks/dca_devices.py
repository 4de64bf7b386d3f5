"""DCA-NAS under real latency budgets: NAS-Bench-201 and the measured latencies of its cells.

`python benchmarks/dca_devices.py [--device NAME ...] [--json]` fits an additive latency model per
device (a least-squares cost per edge and op, on a sample of cells), lets the production constraint
(`Budget`, Adam on the alphas, the budgeted derivation) choose cells under ten budgets, the 5th to
the 95th percentile of the device's latencies, and looks their true latency up. The loss stands
still: an additive fit of the 12-epoch validation accuracy. Searches differ by the sample of cells
under that fit and by the initial alphas.

A point of the look-up graph is the dearest cell of three searches; the runs are other searches.
Their search budget is what the graph gives, or the device's own budget if that is smaller.

Printed per device, without and with the graph: in how many runs the cell's latency in the table is
within the budget, the mean accuracy of those cells (200 epochs, CIFAR-10 test) beside that of the
best cells within the same budgets, and Spearman's correlation of search budgets and latencies in
the graph.
"""

import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from blocksearch.nas_bench_201 import OPS, SPACE, Table  # noqa: E402
from blocksearch.space import NORMAL, Cell  # noqa: E402
from blocksearch.strategies.budget import Budget, most_probable_cells  # noqa: E402
from evaluation.errors import InputError  # noqa: E402
from lookup_graph import LookupGraph  # noqa: E402

DEVICES = ("eyeriss", "fpga", "raspi4", "pixel3")
UTILITY, ACCURACY = "c10_val_12", "c10_test_200"
STEPS, LEARNING_RATE = 200, 0.05
GRAPH_SEEDS, RUN_SEEDS = (0, 1, 2), (3, 4, 5)


def one_hot(codes: Sequence[str]) -> Tensor:
    """Return the cells of some digits as ones and zeros, (n, 1, E, O) float64."""
    choice = torch.tensor([[int(digit) for digit in code] for code in codes])
    return torch.nn.functional.one_hot(choice, len(OPS)).double()[:, None]


def additive(codes: Sequence[str], values: Sequence[float]) -> tuple[Tensor, float]:
    """Fit value = constant + a term per edge and op; return the terms (1, E, O) and the constant.

    The cheapest op of an edge has the term 0, which makes the fit unique.
    """
    chosen = one_hot(codes).flatten(1).numpy()
    design = np.concatenate([chosen, np.ones((len(codes), 1))], axis=1)
    solution = np.linalg.lstsq(design, np.array(values), rcond=None)[0]
    terms = torch.from_numpy(solution[:-1]).reshape(1, len(SPACE.edges), len(OPS))
    least = terms.amin(dim=-1, keepdim=True)
    return terms - least, float(solution[-1] + least.sum())


@dataclass(frozen=True)
class Task:
    """A frozen search: gain and cost of every op, (1, E, O), and what every cell costs besides."""

    gains: Tensor
    costs: Tensor
    fixed: float

    def search(self, limit: float, seed: int) -> Cell | None:
        """Return the cell that a whole search within `limit` derives; None if none is within."""
        generator = torch.Generator().manual_seed(seed)
        alphas = (1e-3 * torch.randn(self.gains.shape, generator=generator)).requires_grad_()
        adam = torch.optim.Adam([alphas], lr=LEARNING_RATE, betas=(0.5, 0.999))
        budget = Budget(self.costs, self.fixed, limit)
        for _ in range(STEPS):
            p = alphas.softmax(dim=-1)
            loss = budget.penalty(p) - (p * self.gains).sum()
            (alphas.grad,) = torch.autograd.grad(loss, [alphas])
            adam.step()
            budget.ascend(alphas.detach().softmax(dim=-1))
        log_p = alphas.detach().double().log_softmax(dim=-1)
        cells = most_probable_cells(log_p, [budget], [NORMAL], SPACE)
        return cells[NORMAL] if cells else None


@dataclass(frozen=True)
class Device:
    """A device with its additive latency model.

    Attributes:
        name: Column of the table.
        table: Latencies and accuracies.
        samples: Cells under each fit.
        costs: Milliseconds of each op on each edge, (1, E, O).
        fixed: Milliseconds of every cell.
    """

    name: str
    table: Table
    samples: int
    costs: Tensor
    fixed: float

    @classmethod
    def fit(cls, name: str, table: Table, samples: int = 1000) -> "Device":
        """Fit the model on random cells."""
        return cls(name, table, samples, *_fit(table, name, samples, seed=0))

    def search(self, limit: float, seed: int) -> Cell | None:
        """Search with gains from a sample of cells of its own."""
        gains, _ = _fit(self.table, UTILITY, self.samples, seed)
        return Task(gains / gains.amax(), self.costs, self.fixed).search(limit, seed)

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return the latencies below which these shares of all cells lie."""
        latencies = [row[self.name] for row in self.table.rows.values()]
        return [float(value) for value in np.quantile(latencies, shares)]

    def graph(self, points: int) -> LookupGraph:
        """Return the look-up graph: latency of the dearest cell of three searches per budget."""

        def latency(limit: float) -> float:
            cells = [self.search(limit, seed) for seed in GRAPH_SEEDS]
            return max(self.table[cell][self.name] for cell in cells if cell is not None)

        grid = self.quantiles([i / points for i in range(1, points + 1)])
        return LookupGraph.measure(latency, grid, dataset="cifar10", metric=self.name)

    def runs(self, seeds: Sequence[int], graph: LookupGraph | None = None) -> dict[str, Any]:
        """Search under ten budgets; return how many cells kept theirs, and their accuracy."""
        found, best = [], []
        for budget in self.quantiles([0.05 + 0.1 * i for i in range(10)]):
            for seed in seeds:
                cell = self._within(budget, seed, graph)
                if cell is not None:
                    found.append(self.table[cell][ACCURACY])
                    best.append(self._best(budget))
        return {
            "runs": 10 * len(seeds),
            "met": len(found),
            "accuracy": statistics.fmean(found),
            "best": statistics.fmean(best),
        }

    def _within(self, budget: float, seed: int, graph: LookupGraph | None) -> Cell | None:
        try:
            limit = min(budget, graph.search_budget(budget)) if graph else budget
        except InputError:  # below all that the graph knows
            return None
        cell = self.search(limit, seed)
        return cell if cell is not None and self.table[cell][self.name] <= budget else None

    def _best(self, budget: float) -> float:
        rows = self.table.rows.values()
        return max(row[ACCURACY] for row in rows if row[self.name] <= budget)


def _fit(table: Table, column: str, samples: int, seed: int) -> tuple[Tensor, float]:
    codes = random.Random(seed).sample(sorted(table.rows), samples)
    return additive(codes, [table.rows[code][column] for code in codes])


def read_table(folder: Path, devices: Sequence[str]) -> Table:
    """Return the columns that the runs need."""
    return Table.read(folder, [UTILITY, ACCURACY, *devices])


def main(
    device: Annotated[list[str] | None, typer.Option(help="column of the latencies")] = None,
    points: Annotated[int, typer.Option(help="search budgets in a graph")] = 40,
    data: Annotated[Path, typer.Option(help="folder of the tables")] = ROOT.parent / "shared/data",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run every device and print its figures."""
    torch.set_num_threads(1)
    names = device or DEVICES
    table = read_table(data, names)
    results = {}
    for name in names:
        one = Device.fit(name, table)
        graph = one.graph(points)
        results[name] = {
            "without": one.runs(RUN_SEEDS),
            "with": one.runs(RUN_SEEDS, graph),
            "spearman": graph.monotony,
        }
        if not as_json:
            show(name, results[name])
    if as_json:
        print(json.dumps(results, indent=1))


def show(name: str, result: dict[str, Any]) -> None:
    """Print the two lines of a device."""
    for way in ("without", "with"):
        one = result[way]
        print(
            f"{name:8} {way:7} graph: met {one['met']:2} of {one['runs']}, "
            f"accuracy {100 * one['accuracy']:.2f} %, best within {100 * one['best']:.2f} %, "
            f"Spearman {result['spearman']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
