"""NAS-Bench-201: its search space, and tables of what its 15,625 cells reach and cost.

Dong and Yang, 2020, https://arxiv.org/abs/2001.00326. A cell has one input and three nodes, every
edge one of five ops (`none` among them), and hands on its last node; stages of equal cells stand
between residual blocks. A cell that a search finds is looked up instead of trained.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from blocksearch.space import NORMAL, Cell, Edge, SearchSpace
from blocksearch.supernet.stack import PlacedCell, Stack
from evaluation.errors import InputError
from evaluation.files.bounded import read_bounded

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
SPACE = SearchSpace(
    ops=OPS,
    nodes=3,
    inputs=1,
    edges_per_node=3,
    kinds=(NORMAL,),
    output="last",
    dense=True,
)
MAX_TABLE_BYTES = 16 * 2**20  # compressed; the largest of ours has 1.5 million
MAX_TABLE_CHARACTERS = 64 * 2**20  # the largest of ours has 3.5 million
CELLS = len(OPS) ** len(SPACE.edges)


def digits(cell: Cell) -> str:
    """Return the op of each edge of `SPACE` as a digit, its place in `OPS`: `403210`.

    Raises:
        ValueError: If the cell is not of the space.
    """
    SPACE.check(cell)
    return _digits(cell)


def _digits(cell: Cell) -> str:
    chosen = {
        (edge.source, SPACE.inputs + node): edge.op
        for node, edges in enumerate(cell.nodes)
        for edge in edges
    }
    return "".join(str(OPS.index(chosen.get(place, "none"))) for place in SPACE.edges)


def cell_of(code: str) -> Cell:
    """Return the cell of six digits.

    Raises:
        ValueError: If they are not six digits below 5.
    """
    if len(code) != len(SPACE.edges) or not set(code) <= set("01234"):
        raise ValueError(f"expected {len(SPACE.edges)} digits from 0 to 4, got {code!r}")
    nodes: list[list[Edge]] = [[] for _ in range(SPACE.nodes)]
    for digit, (source, target) in zip(code, SPACE.edges, strict=True):
        op = OPS[int(digit)]
        if op != "none":
            nodes[target - SPACE.inputs].append(Edge(source, op))
    return SPACE.cell(tuple(node) for node in nodes)


def arch_string(cell: Cell) -> str:
    """Return the cell as NAS-Bench-201 writes it: `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
    code = iter(digits(cell))
    nodes = [
        "".join(f"|{OPS[int(next(code))]}~{source}" for source in range(node + 1)) + "|"
        for node in range(SPACE.nodes)
    ]
    return "+".join(nodes)


def benchmark_network(cell: Cell, classes: int = 10) -> Stack:
    """Return the network that the tables speak of: C = 16, five cells in each of three stages."""
    stages = [PlacedCell(cell, width, reduction=False) for width in (16, 32, 64) for _ in range(5)]
    for position, width in ((5, 32), (11, 64)):
        stages.insert(position, PlacedCell(None, width, reduction=True))
    return Stack(tuple(stages), (3, 32, 32), classes)


class Table:
    """Numbers of all cells of the space, read from the project's data files.

    Attributes:
        rows: Digits of a cell -> column -> number.
    """

    def __init__(self, rows: Mapping[str, Mapping[str, float]]):
        self.rows = rows

    @classmethod
    def read(cls, folder: Path, columns: Sequence[str]) -> "Table":
        """Read accuracies (percent, made fractions) and latencies (ms).

        Args:
            folder: Where `nb201_accuracy.csv.gz` and `nb201_latency_help.csv.gz` are.
            columns: Names of columns of either file.

        Raises:
            InputError: If a file is missing or lacks a column or a cell.
        """
        accuracy = read_rows(folder / "nb201_accuracy.csv.gz")
        latency = read_rows(folder / "nb201_latency_help.csv.gz")
        rows = {}
        try:
            for one, other in zip(accuracy, latency, strict=True):
                if one["index"] != other["index"]:
                    raise ValueError(f"rows {one['index']} and {other['index']} side by side")
                rows[one["ops"]] = {
                    name: float(one[name]) / 100 if name in one else float(other[name])
                    for name in columns
                }
        except KeyError as error:
            raise InputError(f"{folder}: no column {error} in the tables") from error
        except ValueError as error:
            raise InputError(f"{folder}: the tables are damaged: {error}") from error
        if len(rows) != CELLS:
            raise InputError(f"{folder}: expected {CELLS} cells, got {len(rows)}")
        return cls(rows)

    def __getitem__(self, cell: Cell) -> Mapping[str, float]:
        """Return the numbers of a cell, one that lacks every edge included."""
        return self.rows[_digits(cell)]

    def best(self, column: str) -> str:
        """Return the digits of the cell with the largest number in a column."""
        return max(self.rows, key=lambda code: self.rows[code][column])


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a compressed CSV file, a mapping of column to text per row.

    Raises:
        InputError: If it is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    try:
        packed = io.BytesIO(read_bounded(path, MAX_TABLE_BYTES))
        with gzip.open(packed, "rt", newline="") as file:
            text = file.read(MAX_TABLE_CHARACTERS + 1)
        if len(text) > MAX_TABLE_CHARACTERS:
            raise InputError(f"{path}: expected at most {MAX_TABLE_CHARACTERS:,} characters")
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except (EOFError, OSError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{path}: damaged: {error}") from error
