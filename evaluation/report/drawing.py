"""A cell drawn as SVG.

A cell is laid out so that op names, nodes and passing wires never share a place: states stand in
columns by their longest path from the inputs, op names in columns between them, and a wire that
skips a column keeps a slot of its own there. The slots of a column are ordered to cross few wires.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean

# The first family with a mark inside the op's name gives the colour; the last one takes the rest.
FAMILIES = {
    "skip": (("skip",), "#6b7280"),
    "pool": (("pool",), "#b45309"),
    "light conv": (("dws", "ghost", "gshuffle"), "#0f8a6a"),
    "conv": (("conv",), "#1d5fbf"),
    "other": (("",), "#8b3a8b"),
}
CONCAT_COLOUR = "#c3c9d2"
STATE_WIDTH, STATE_HEIGHT = 38.0, 26.0
LABEL_HEIGHT, CHARACTER = 18.0, 6.7  # pixels; the advance of one 11 px monospace character
SPACE = 10.0  # between two slots of a column
GAP = 24.0  # between two columns, where the wires bend
MARGIN = 8.0
SWEEPS = 12  # enough for the orders of eight-node cells to stop changing


@dataclass(frozen=True)
class DrawnBlock:
    """A block as plain data.

    Attributes:
        name: For example "normal-3".
        kind: "normal" or "reduction".
        inputs: Input states of the cell.
        nodes: Per inner node its (source state, op name) pairs; the inputs are the first states. A
            node without any is no part of the output, and is drawn only if another one reads it.
        params: Trainable parameters at the library's reference width.
        flops: Multiply-adds for one image, at the same width.
        found_by: Where the cell comes from, for a reader.
    """

    name: str
    kind: str
    inputs: int
    nodes: tuple[tuple[tuple[int, str], ...], ...]
    params: int
    flops: int
    found_by: str


@dataclass(frozen=True)
class _Wire:
    """The slots that an edge passes, from its source state to its target; no op into the output."""

    slots: tuple[int, ...]
    op: str | None


@dataclass(frozen=True)
class _Graph:
    """Slots by number, the states first, as `_states` lists them, and the wires through them."""

    columns: tuple[int, ...]  # of each slot
    heights: tuple[float, ...]  # of each slot
    wires: tuple[_Wire, ...]

    def neighbours(self, step: int) -> list[list[int]]:
        """Return for every slot those it is wired to, one column left (-1) or right (+1)."""
        found: list[list[int]] = [[] for _ in self.columns]
        for wire in self.wires:
            for left, right in pairwise(wire.slots):
                if step < 0:
                    found[right].append(left)
                else:
                    found[left].append(right)
        return found


def family(op: str) -> str:
    """Return the key of `FAMILIES` that an op belongs to."""
    return next(name for name, (marks, _) in FAMILIES.items() if any(m in op for m in marks))


def draw_block(block: DrawnBlock) -> str:
    """Draw a cell as one SVG element, inputs left, output right, an op name on every edge."""
    graph = _graph(block)
    layers = _order(graph)
    y = _heights(graph, layers)
    x, width = _widths(graph, len(layers))
    lines, labels = [], []
    for wire in sorted(graph.wires, key=lambda wire: wire.op is not None):  # the output's below
        colour = CONCAT_COLOUR if wire.op is None else FAMILIES[family(wire.op)][1]
        dash = ' stroke-dasharray="5 3"' if wire.op and family(wire.op) == "skip" else ""
        path = _path([(x[graph.columns[s]], width[graph.columns[s]], y[s]) for s in wire.slots])
        lines.append(f'<path class="wire" d="{path}" fill="none" stroke="{colour}"{dash}/>')
        if wire.op is not None:
            slot = wire.slots[-2]
            labels.append(_label(wire.op, colour, x[graph.columns[slot]], y[slot]))
    states = [
        _state(_state_name(block, state), x[graph.columns[slot]], y[slot])
        for slot, state in enumerate(_states(block))
    ]
    right = x[-1] + width[-1] / 2 + MARGIN
    bottom = max(y[s] + graph.heights[s] / 2 for s in range(len(y))) + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {right:.1f} {bottom:.1f}"'
        f' width="{right:.0f}" height="{bottom:.0f}" aria-label="cell {escape(block.name)}"'
        ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" stroke-width="1.6">'
        + "".join(lines + labels + states)
        + "</svg>"
    )


def _states(block: DrawnBlock) -> list[int]:
    """Return the states that are drawn, in the order of their slots; the output is the last."""
    read = {source for node in block.nodes for source, _ in node}
    nodes = enumerate(block.nodes, start=block.inputs)
    drawn = [state for state, node in nodes if node or state in read]
    return [*range(block.inputs), *drawn, block.inputs + len(block.nodes)]


def _graph(block: DrawnBlock) -> _Graph:
    """Give every drawn state, op name and passing wire its slot."""
    ranks = [0] * block.inputs
    for node in block.nodes:
        ranks.append(1 + max((ranks[source] for source, _ in node), default=0))
    states = _states(block)
    columns = [2 * ranks[state] for state in states[:-1]]
    columns.append(1 + max(columns))  # the output; no op names before it
    heights = [STATE_HEIGHT] * len(columns)
    slot_of = {state: slot for slot, state in enumerate(states)}
    edges: list[tuple[int, int, str | None]] = []
    for state, node in enumerate(block.nodes, start=block.inputs):
        edges += [(slot_of[source], slot_of[state], op) for source, op in node]
    edges += [
        (slot_of[state], len(states) - 1, None)
        for state, node in enumerate(block.nodes, start=block.inputs)
        if node
    ]
    wires = []
    for source, target, op in edges:
        passed = range(columns[source] + 1, columns[target])
        first = len(columns)
        columns += passed
        heights += [0.0] * len(passed)
        if op is not None:
            heights[-1] = LABEL_HEIGHT
        wires.append(_Wire((source, *range(first, len(columns)), target), op))
    return _Graph(tuple(columns), tuple(heights), tuple(wires))


def _order(graph: _Graph) -> list[list[int]]:
    """Order the slots of every column; of all sweeps, the order with the fewest crossings.

    The inputs keep their order. A sweep sorts each column by the mean place of its neighbours in
    the column before, left to right and right to left in turn.
    """
    layers = [
        [slot for slot, column in enumerate(graph.columns) if column == number]
        for number in range(max(graph.columns) + 1)
    ]
    best = layers
    for sweep in range(SWEEPS):
        step = -1 if sweep % 2 == 0 else 1
        neighbours = graph.neighbours(step)
        layers = list(layers)
        inner = range(1, len(layers)) if step < 0 else range(len(layers) - 2, 0, -1)
        for number in inner:
            place = {slot: index for index, slot in enumerate(layers[number + step])}
            wanted = {
                slot: fmean(place[other] for other in neighbours[slot]) if neighbours[slot] else 0.0
                for slot in layers[number]
            }
            layers[number] = sorted(layers[number], key=wanted.__getitem__)
        best = min(best, layers, key=lambda order: _crossings(graph, order))
    return best


def _crossings(graph: _Graph, layers: list[list[int]]) -> int:
    """Count the pairs of wires that cross between two columns."""
    place = {slot: index for layer in layers for index, slot in enumerate(layer)}
    right = graph.neighbours(1)
    total = 0
    for layer in layers:
        ends = [(place[slot], place[other]) for slot in layer for other in right[slot]]
        total += sum(a < c and b > d for a, b in ends for c, d in ends)
    return total


def _heights(graph: _Graph, layers: list[list[int]]) -> list[float]:
    """Return the y of every slot: each column is packed in the given order, around one middle."""
    room = [sum(graph.heights[slot] + SPACE for slot in layer) for layer in layers]
    y = [0.0] * len(graph.columns)
    for layer, height in zip(layers, room, strict=True):
        place = MARGIN + (max(room) - height) / 2
        for slot in layer:
            y[slot] = place + graph.heights[slot] / 2
            place += graph.heights[slot] + SPACE
    return y


def _widths(graph: _Graph, columns: int) -> tuple[list[float], list[float]]:
    """Return the centre x and the width of every column; that of op names fits its longest."""
    width = [0.0 if column % 2 else STATE_WIDTH for column in range(columns - 1)] + [STATE_WIDTH]
    for wire in graph.wires:
        if wire.op is not None:
            column = graph.columns[wire.slots[-2]]
            width[column] = max(width[column], _label_width(wire.op))
    x = [MARGIN + width[0] / 2]
    for before, after in pairwise(width):
        x.append(x[-1] + (before + after) / 2 + GAP)
    return x, width


def _path(stops: Sequence[tuple[float, float, float]]) -> str:
    """Return SVG path data: flat through every stop (x, width, y), a smooth bend between two."""
    bends = []
    for (x, width, y), (next_x, next_width, next_y) in pairwise(stops):
        start, end = x + width / 2, next_x - next_width / 2
        middle = (start + end) / 2
        curve = f"C{middle:.1f} {y:.1f} {middle:.1f} {next_y:.1f} {end:.1f} {next_y:.1f}"
        bends.append(f"{start:.1f} {y:.1f}{curve}")
    return "M" + "L".join(bends)


def _label_width(op: str) -> float:
    """Return the width of the box around an op name."""
    return CHARACTER * len(op) + 10


def _label(op: str, colour: str, x: float, y: float) -> str:
    """Draw an op name on a white box."""
    width = _label_width(op)
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y - LABEL_HEIGHT / 2:.1f}" width="{width:.1f}"'
        f' height="{LABEL_HEIGHT:.0f}" rx="9" fill="#fff" stroke="{colour}" stroke-width="1"/>'
        f'<text class="op" x="{x:.1f}" y="{y + 3.8:.1f}" text-anchor="middle"'
        f' fill="{colour}">{escape(op)}</text>'
    )


def _state(name: str, x: float, y: float) -> str:
    """Draw a state: a rounded box with its name, which is SVG text already."""
    return (
        f'<rect x="{x - STATE_WIDTH / 2:.1f}" y="{y - STATE_HEIGHT / 2:.1f}"'
        f' width="{STATE_WIDTH:.0f}" height="{STATE_HEIGHT:.0f}" rx="6" fill="#eef2f7"'
        ' stroke="#4b5563" stroke-width="1.2"/>'
        f'<text class="state" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle"'
        f' fill="#1f2937">{name}</text>'
    )


def _state_name(block: DrawnBlock, state: int) -> str:
    """Return c_(k-2), c_(k-1) for the inputs, the number of a node, c_k for the output."""
    node = state - block.inputs
    if 0 <= node < len(block.nodes):
        return str(node)
    below = f"k−{-node}" if node < 0 else "k"
    return f'c<tspan dy="3" font-size="9">{below}</tspan>'
