"""SearchSpace, Edge and Cell (a genotype): plain, validated data; canonical id; JSON; no torch."""

import hashlib
import json
import random
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Self

NORMAL, REDUCTION = "normal", "reduction"
KINDS = (NORMAL, REDUCTION)


@dataclass(frozen=True, order=True)
class Edge:
    """One chosen op and the state that it reads: 0 and 1 are the cell's inputs, then its nodes."""

    source: int
    op: str


@dataclass(frozen=True)
class Cell:
    """A discrete cell: for every inner node the edges whose outputs it adds up.

    The cell's output is the concatenation of all its nodes. `inputs` states come before the nodes.
    """

    nodes: tuple[tuple[Edge, ...], ...]
    inputs: int = 2

    @property
    def id(self) -> str:
        """Hash of the canonical form; cells that differ only in the order of nodes share it."""
        return hashlib.sha256(repr(self._canonical()).encode()).hexdigest()[:12]

    def _canonical(self) -> tuple[int, tuple[tuple[tuple[int, str], ...], ...]]:
        """Smallest form over every renumbering of the nodes in which sources still come first."""
        forms = []
        for order in permutations(range(len(self.nodes))):
            place = {old + self.inputs: new + self.inputs for new, old in enumerate(order)}
            form = tuple(
                tuple(sorted((place.get(e.source, e.source), e.op) for e in self.nodes[old]))
                for old in order
            )
            if all(s < self.inputs + i for i, node in enumerate(form) for s, _ in node):
                forms.append(form)
        return self.inputs, min(forms)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "inputs": self.inputs,
            "nodes": [[[edge.source, edge.op] for edge in node] for node in self.nodes],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            nodes = tuple(
                tuple(Edge(int(source), str(op)) for source, op in node) for node in data["nodes"]
            )
            return cls(nodes, int(data["inputs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a cell: {json.dumps(data, default=str)[:200]}") from error


@dataclass(frozen=True)
class SearchSpace:
    """All cells with `nodes` inner nodes, each reading earlier states through one of `ops`.

    Attributes:
        ops: Names of the candidate ops, in the order of the last axis of the alphas.
        nodes: Inner nodes N of a cell.
        inputs: Input states of a cell.
        edges_per_node: Most edges that a derived node keeps.
    """

    ops: tuple[str, ...]
    nodes: int = 4
    inputs: int = 2
    edges_per_node: int = 2

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If a count is not positive, or the ops are empty, repeated, or only `none`.
        """
        if min(self.nodes, self.inputs, self.edges_per_node) < 1:
            raise ValueError(f"nodes, inputs and edges_per_node must be at least 1, got {self}")
        if len(set(self.ops)) != len(self.ops) or not set(self.ops) - {"none"}:
            raise ValueError(f"ops must be distinct, with one besides 'none', got {self.ops}")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Every possible (source, target), E of them, grouped by target; the order of alphas."""
        return tuple(
            (source, self.inputs + node)
            for node in range(self.nodes)
            for source in range(self.inputs + node)
        )

    def check(self, cell: Cell) -> None:
        """Accept a cell of this space.

        Raises:
            ValueError: If it is none, saying why.
        """
        if (cell.inputs, len(cell.nodes)) != (self.inputs, self.nodes):
            raise ValueError(
                f"expected {self.inputs} inputs and {self.nodes} nodes, "
                f"got {cell.inputs} and {len(cell.nodes)}"
            )
        for index, node in enumerate(cell.nodes):
            sources = [edge.source for edge in node]
            if not 1 <= len(node) <= self.edges_per_node or len(set(sources)) != len(node):
                raise ValueError(
                    f"node {index} needs 1 to {self.edges_per_node} edges from different states, "
                    f"got {node}"
                )
            for edge in node:
                if edge.op == "none" or edge.op not in self.ops:
                    raise ValueError(f"node {index} has unknown op {edge.op!r}")
                if not 0 <= edge.source < self.inputs + index:
                    raise ValueError(f"node {index} cannot read state {edge.source}")

    def random_cell(self, generator: random.Random) -> Cell:
        """Draw a cell: per node `edges_per_node` different sources, each with any op but `none`."""
        useful = [op for op in self.ops if op != "none"]
        nodes = []
        for node in range(self.nodes):
            count = min(self.edges_per_node, self.inputs + node)
            sources = sorted(generator.sample(range(self.inputs + node), count))
            nodes.append(tuple(Edge(source, generator.choice(useful)) for source in sources))
        return Cell(tuple(nodes), self.inputs)
