"""SearchSpace, Edge and Cell (a genotype): plain, validated data; canonical id; JSON; no torch."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Literal, Self

NORMAL, REDUCTION = "normal", "reduction"
KINDS = (NORMAL, REDUCTION)
MAX_NODES = 8  # of a cell in a file; 8! orders are hashed in about a second
MAX_EDGES = 16  # of a node, likewise
Output = Literal["concat", "last"]
OpBuilder = Callable[[int, int, bool], Any]  # (channels, stride, searching) -> module
OwnOps = tuple[tuple[str, OpBuilder], ...]  # a user's own, by name


def base_kind(kind: str) -> str:
    """Return `normal` for `normal@3`, the kind of the cell at position 3."""
    return kind.partition("@")[0]


@dataclass(frozen=True, order=True)
class Edge:
    """One chosen op and the state that it reads: 0 and 1 are the cell's inputs, then its nodes."""

    source: int
    op: str


@dataclass(frozen=True)
class Cell:
    """A discrete cell: for every inner node the edges whose outputs it adds up.

    Attributes:
        nodes: The edges of each inner node. A node without edges is zero, and is left out where
            nodes are concatenated.
        inputs: Input states, which come before the nodes.
        output: Whether the cell's output is the concatenation of its nodes or the last of them.
        one_bit: Whether its convolutions have 1-bit weights and inputs.
        own: What builds those of its ops that are a user's own; of those given, it keeps these.
    """

    nodes: tuple[tuple[Edge, ...], ...]
    inputs: int = 2
    output: Output = "concat"
    one_bit: bool = False
    own: OwnOps = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Keep the builders that it needs."""
        used = {edge.op for node in self.nodes for edge in node}
        needed = tuple(sorted((pair for pair in self.own if pair[0] in used), key=lambda p: p[0]))
        object.__setattr__(self, "own", needed)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The nodes that make up the cell's output, by number."""
        if self.output == "last":
            return (len(self.nodes) - 1,)
        return tuple(number for number, node in enumerate(self.nodes) if node)

    @property
    def id(self) -> str:
        """Hash of the canonical form; cells that differ only in the order of nodes share it."""
        own = [
            name for name, has in (("last", self.output == "last"), ("1-bit", self.one_bit)) if has
        ]
        return hashlib.sha256(repr((*self._canonical(), *own)).encode()).hexdigest()[:12]

    def _canonical(self) -> tuple[int, tuple[tuple[tuple[int, str], ...], ...]]:
        """Smallest form over every renumbering of the nodes in which sources still come first."""
        forms = []
        for order in permutations(range(len(self.nodes))):
            if self.output == "last" and order[-1] != len(self.nodes) - 1:
                continue
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
        data: dict[str, Any] = {
            "inputs": self.inputs,
            "nodes": [[[edge.source, edge.op] for edge in node] for node in self.nodes],
        }
        if self.output != "concat":
            data["output"] = self.output
        if self.one_bit:
            data["one_bit"] = True
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any], own: OwnOps = ()) -> Self:
        """Rebuild from `to_json`, with a user's own ops, of which a file knows but the names.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            nodes = tuple(
                tuple(Edge(int(source), str(op)) for source, op in node) for node in data["nodes"]
            )
            output, one_bit = data.get("output", "concat"), data.get("one_bit", False)
            if output not in ("concat", "last") or not isinstance(one_bit, bool):
                raise ValueError("unknown output or one_bit")
            cell = cls(nodes, int(data["inputs"]), output, one_bit, own)
            cell._check_size()
            return cell
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a cell: {str(data)[:200]} ({error})") from error

    def _check_size(self) -> None:
        """Accept what could be built in a moment: the id looks at every order of the nodes.

        Raises:
            ValueError: If there are too many nodes, inputs or edges, or an edge reads what is not
                before it.
        """
        if not 1 <= len(self.nodes) <= MAX_NODES or not 1 <= self.inputs <= MAX_NODES:
            raise ValueError(f"expected 1 to {MAX_NODES} nodes and inputs")
        for number, node in enumerate(self.nodes):
            if len(node) > MAX_EDGES:
                raise ValueError(f"expected at most {MAX_EDGES} edges of a node")
            if any(not 0 <= edge.source < self.inputs + number for edge in node):
                raise ValueError(f"node {number} reads what does not come before it")
        if not any(self.nodes):
            raise ValueError("expected an edge")


@dataclass(frozen=True)
class SearchSpace:
    """All cells with `nodes` inner nodes, each reading earlier states through one of `ops`.

    Attributes:
        ops: Names of the candidate ops, in the order of the last axis of the alphas.
        nodes: Inner nodes N of a cell.
        inputs: Input states of a cell.
        edges_per_node: Most edges that a derived node keeps.
        kinds: Kinds of cells; without reduction cells, fixed residual blocks halve the resolution.
        output: Whether a cell's output is the concatenation of its nodes or the last of them.
        dense: Whether a found cell keeps one op on every edge, `none` among the choices; otherwise
            `none` is no choice, and a node keeps its `edges_per_node` strongest edges.
        own: What builds those of the ops that are a user's own.
    """

    ops: tuple[str, ...]
    nodes: int = 4
    inputs: int = 2
    edges_per_node: int = 2
    kinds: tuple[str, ...] = KINDS
    output: Output = "concat"
    dense: bool = False
    own: OwnOps = field(default=(), repr=False)

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

    def cell(self, nodes: Iterable[tuple[Edge, ...]]) -> Cell:
        """Return the cell of these nodes in the form of this space's cells."""
        return Cell(tuple(nodes), self.inputs, self.output, own=self.own)

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
        if cell.output != self.output or not any(cell.nodes):
            raise ValueError(f"expected edges, and output {self.output!r}, got {cell}")
        for index, node in enumerate(cell.nodes):
            sources = [edge.source for edge in node]
            if len(node) > self.edges_per_node or len(set(sources)) != len(node):
                raise ValueError(
                    f"node {index} needs at most {self.edges_per_node} edges from different "
                    f"states, got {node}"
                )
            for edge in node:
                if edge.op == "none" or edge.op not in self.ops:
                    raise ValueError(f"node {index} has unknown op {edge.op!r}")
                if not 0 <= edge.source < self.inputs + index:
                    raise ValueError(f"node {index} cannot read state {edge.source}")
                read = edge.source - self.inputs
                if not self.dense and read >= 0 and not cell.nodes[read]:
                    raise ValueError(f"node {index} reads node {read}, which has no edges")

    def random_cell(self, generator: random.Random) -> Cell:
        """Draw a cell.

        Per node `edges_per_node` different sources, each with any op but `none`; where the space is
        dense, any op on every edge, but not `none` on all of them.
        """
        if self.dense:
            return self._random_dense_cell(generator)
        useful = [op for op in self.ops if op != "none"]
        nodes = []
        for node in range(self.nodes):
            count = min(self.edges_per_node, self.inputs + node)
            sources = sorted(generator.sample(range(self.inputs + node), count))
            nodes.append(tuple(Edge(source, generator.choice(useful)) for source in sources))
        return self.cell(nodes)

    def _random_dense_cell(self, generator: random.Random) -> Cell:
        while True:
            drawn = [
                [Edge(source, generator.choice(self.ops)) for source in range(self.inputs + node)]
                for node in range(self.nodes)
            ]
            nodes = tuple(tuple(e for e in node if e.op != "none") for node in drawn)
            if any(nodes):
                return self.cell(nodes)
