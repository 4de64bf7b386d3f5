"""Tabular benchmarks: whole spaces whose every network was trained by somebody else.

NAS-Bench-201 (Dong and Yang, 2020, https://arxiv.org/abs/2001.00326), latencies of HELP (Lee et
al., 2021, https://arxiv.org/abs/2106.08630), and the size space of NATS-Bench (Dong et al., 2021,
https://arxiv.org/abs/2009.00437). A search that runs on one of them answers in milliseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV

from blocksearch import nas_bench_201
from blocksearch.nas_bench_201 import read_rows
from evaluation.errors import InputError
from evaluation.pareto.front import non_dominated
from netsearch.searches.protocol import Batch
from netsearch.space.genome import KINDS, SIZES, Floats, Genes, Genome

DATASETS = {"cifar10": "c10", "cifar100": "c100", "imagenet16": "in16"}
COUNTS = ("params", "flops")
NATS_WIDTHS = 8
LOW_FIDELITY = 1 / 17  # 12 of 200 epochs, about


@dataclass(frozen=True)
class TableProblem:
    """A `Problem` whose every answer stands in a table, for comparing searches.

    Attributes:
        genes: The genes.
        genomes: All of the space, (N, G).
        errors: The error that is searched, a fraction in [0, 1], (N,).
        table_costs: What is minimised beside it, (N, M - 1).
        reported: Another error, which steers nothing; None where there is none.
        low: Fidelity and error of a cheaper training, None where there is none.
        effective: Genomes without genes that change nothing in the network, for regressions.
    """

    genes: Genes
    genomes: NDArray[np.int64]
    errors: Floats
    table_costs: Floats
    reported: Floats | None = None
    low: tuple[float, Floats] | None = None
    effective: NDArray[np.int64] | None = None

    def row(self, genomes: Sequence[Genome]) -> NDArray[np.int64]:
        """Return where genomes stand in the table, (N,)."""
        rows: NDArray[np.int64] = self._index[
            np.ravel_multi_index(np.array(genomes).T, self.genes.upper + 1)
        ]
        return rows

    @cached_property
    def _index(self) -> NDArray[np.int64]:
        index = np.zeros(len(self.genomes), dtype=np.int64)
        index[np.ravel_multi_index(self.genomes.T, self.genes.upper + 1)] = np.arange(len(index))
        return index

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """Least and largest of each cost in the table."""
        return self.table_costs.min(axis=0), self.table_costs.max(axis=0)

    def costs(self, genomes: Sequence[Genome]) -> Floats:
        """Return the costs of genomes, (N, M - 1)."""
        return self.table_costs[self.row(genomes)]

    def excess(self, genomes: Sequence[Genome]) -> Floats:
        """Return zeros: the whole table is allowed."""
        return np.zeros(len(genomes))

    def id(self, genome: Genome) -> str:
        """Return the genes as text."""
        return repr(genome)

    def cheapest(self) -> list[Genome]:
        """Return for each cost the genome with the least of it."""
        rows = self.table_costs.argmin(axis=0)
        return [tuple(row) for row in self.genomes[rows].tolist()]

    @cached_property
    def _features(self) -> Floats:
        genomes = self.genomes if self.effective is None else self.effective
        logs = np.log(self.table_costs)
        span = np.maximum(np.ptp(logs, axis=0), 1e-12)
        return np.hstack([self.genes.features(genomes), (logs - logs.min(axis=0)) / span])

    def features(self, genomes: Sequence[Genome]) -> Floats:
        """Return the features of the genes and the logarithms of the costs, (N, D)."""
        return self._features[self.row(genomes)]

    def evaluate(self, batch: Batch) -> Floats:
        """Return the errors of a batch at its fidelity, (N,).

        Raises:
            ValueError: If the table has no such fidelity.
        """
        errors = self.errors
        if batch.fidelity < 1:
            if self.low is None or batch.fidelity != self.low[0]:
                raise ValueError(f"the table has no fidelity {batch.fidelity}")
            errors = self.low[1]
        return errors[self.row(batch.genomes)]

    def share(self, genomes: Sequence[Genome], *, reported: bool = False) -> float:
        """Return the hypervolume of genomes as a share of that of the whole table's front.

        The reference point holds the table's worst error and largest costs; axes are linear.
        """
        steers = self.reported is None or not reported
        points, scale, whole = self._steering if steers else self._reporting
        found = HV(ref_point=np.ones(len(scale)))(points[self.row(genomes)] / scale)
        return float(found) / whole

    @cached_property
    def _steering(self) -> tuple[Floats, Floats, float]:
        return _measured(self.errors, self.table_costs)

    @cached_property
    def _reporting(self) -> tuple[Floats, Floats, float]:
        assert self.reported is not None
        return _measured(self.reported, self.table_costs)


def _measured(errors: Floats, costs: Floats) -> tuple[Floats, Floats, float]:
    """Return all points (N, M), their largest values, and the hypervolume of their front."""
    points = np.column_stack([errors, costs])
    scale = points.max(axis=0)
    return points, scale, float(HV(ref_point=np.ones(len(scale)))(_front(points) / scale))


def _front(points: Floats) -> Floats:
    """Return the non-dominated points, without comparing all pairs of a large table."""
    front = points[:0]
    for part in np.array_split(points[np.argsort(points.sum(axis=1))], max(1, len(points) // 500)):
        both = np.unique(np.vstack([front, part]), axis=0)
        front = both[non_dominated(both)]
    return front


def nats_size(folder: Path, costs: Sequence[str] = ("params",)) -> TableProblem:
    """Read the NATS-Bench size space: five widths, CIFAR-10 accuracy, params.

    The accuracies are on CIFAR-10's test images: this compares searches, it finds no network.

    Args:
        folder: Where `nats_size_cifar10.csv.gz` is.
        costs: Only `params` is known.

    Raises:
        InputError: If the table is missing or has other columns, or a cost has no data.
    """
    if tuple(costs) != ("params",):
        raise InputError(f"nats_size: no data on {', '.join(costs)}; expected params")
    path = folder / "nats_size_cifar10.csv.gz"
    names = [f"c{layer}" for layer in range(5)]
    table = _columns(read_rows(path), path, [*names, "accuracy"])
    widths = table[:, :5].astype(np.int64)
    genes = Genes(np.full(5, NATS_WIDTHS - 1), ((SIZES, 5),))
    genomes = widths // 8 - 1
    if len({tuple(row) for row in genomes.tolist()}) != NATS_WIDTHS**5:
        raise InputError(f"{path}: expected {NATS_WIDTHS**5} different widths, got {len(genomes)}")
    params = nats_params(*widths.T.astype(float))[:, None]
    return TableProblem(genes, genomes, 1.0 - table[:, 5] / 100.0, params)


def nats_params(c0: Floats, c1: Floats, c2: Floats, c3: Floats, c4: Floats) -> Floats:
    """Return the params of networks of the NATS-Bench size space.

    Cells stand at 0, 2, 4 and residual blocks at 1, 3. The cell, from memory of the literature, has
    five 3x3 convolutions and a skip, which is a 1x1 one where the widths differ.
    """

    def conv(inputs: Floats | float, outputs: Floats, kernel: int) -> Floats:
        counted: Floats = inputs * outputs * kernel**2 + 2 * outputs
        return counted

    def cell(inputs: Floats, outputs: Floats) -> Floats:
        skip = np.where(inputs != outputs, conv(inputs, outputs, 1), 0)
        return 2 * conv(inputs, outputs, 3) + 3 * conv(outputs, outputs, 3) + skip

    def residual(inputs: Floats, outputs: Floats) -> Floats:
        return conv(inputs, outputs, 3) + conv(outputs, outputs, 3) + inputs * outputs

    body = cell(c0, c0) + residual(c0, c1) + cell(c1, c2) + residual(c2, c3) + cell(c3, c4)
    return conv(3.0, c0, 3) + body + 2 * c4 + 10 * c4 + 10


def nb201(
    folder: Path,
    dataset: str = "cifar10",
    costs: Sequence[str] = ("params",),
    *,
    epochs: int = 12,
) -> TableProblem:
    """Read NAS-Bench-201: accuracies on three datasets, counts, latencies of 27 devices.

    With `epochs=12` the error searched is that on validation images after 12 epochs, the one
    reported that on test images after 200. With `epochs=200` the error searched is the latter, as
    there is no other, and 12 epochs are its cheaper fidelity: fit to compare searches, no more.

    Args:
        folder: Where `nb201_accuracy.csv.gz` and `nb201_latency_help.csv.gz` are.
        dataset: `cifar10`, `cifar100` or `imagenet16`.
        costs: `params`, `flops` (multiply-adds of the network with C = 16 and five cells a stage),
            or the device of a latency.
        epochs: 12 or 200.

    Raises:
        InputError: If a table is missing or has other columns, or a name has no data.
    """
    if dataset not in DATASETS:
        raise InputError(f"nb201: no data on {dataset!r}; expected {', '.join(DATASETS)}")
    path = folder / "nb201_accuracy.csv.gz"
    rows, prefix = read_rows(path), DATASETS[dataset]
    columns = [f"{prefix}_val_12", f"{prefix}_test_200"]
    short, long = 1.0 - _columns(rows, path, columns).T / 100.0
    codes = [row.get("ops", "") for row in rows]
    if len(set(codes)) != nas_bench_201.CELLS or any(len(code) != 6 for code in codes):
        raise InputError(f"{path}: expected {nas_bench_201.CELLS} cells in the column ops")
    genomes = np.array([[int(digit) for digit in code] for code in codes])
    genes = Genes(np.full(6, len(nas_bench_201.OPS) - 1), ((KINDS, 6),))
    error, reported, low = (
        (short, long, None) if epochs == 12 else (long, None, (LOW_FIDELITY, short))
    )
    table_costs = _costs(folder, genomes, costs)
    return TableProblem(genes, genomes, error, table_costs, reported, low, _without_dead(genomes))


def _costs(folder: Path, genomes: NDArray[np.int64], names: Sequence[str]) -> Floats:
    columns: dict[str, Floats] = {}
    devices = [name for name in names if name not in COUNTS]
    if devices:
        path = folder / "nb201_latency_help.csv.gz"
        table = _columns(read_rows(path), path, devices)
        columns = dict(zip(devices, table.T, strict=True))
    if len(devices) < len(names):
        columns |= _counts(genomes)
    return np.column_stack([columns[name] for name in names])


def _counts(genomes: NDArray[np.int64]) -> Mapping[str, Floats]:
    """Count params and FLOPs: they depend on how often each op stands in the cell alone."""
    ops = np.sort(genomes, axis=1)
    unique, inverse = np.unique(ops, axis=0, return_inverse=True)
    cells = [nas_bench_201.cell_of("".join(map(str, row))) for row in unique.tolist()]
    costs = [nas_bench_201.benchmark_network(cell).cost() for cell in cells]
    return {
        name: np.array([cost.count(name) for cost in costs], dtype=float)[inverse.ravel()]
        for name in COUNTS
    }


def _without_dead(genomes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Set ops to `none` that nothing reaches, or that reach nothing: the network is the same."""
    live = genomes.copy()
    first, second, middle, _, from_first, from_second = live.T  # views: 01 02 12 03 13 23
    middle[first == 0] = from_first[first == 0] = 0
    from_second[(second == 0) & (middle == 0)] = 0
    second[from_second == 0] = middle[from_second == 0] = 0
    first[(middle == 0) & (from_first == 0)] = 0
    return live


def _columns(rows: Sequence[Mapping[str, str]], path: Path, names: Sequence[str]) -> Floats:
    """Return columns as numbers, (rows, names)."""
    there = list(rows[0]) if rows else []
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"{path}: no data on {', '.join(missing)}; columns: {', '.join(there)}")
    try:
        return np.array([[float(row[name]) for name in names] for row in rows])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
