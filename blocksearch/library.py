"""Block and BlockLibrary: the unique, measured cells from which stage two chooses."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from blocksearch.space import KINDS, REDUCTION, Cell, OwnOps
from blocksearch.supernet.cells import DiscreteCell
from evaluation.cost.counts import measure_cost
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, checked_name

REFERENCE_CHANNELS = 16


@dataclass(frozen=True)
class FoundCell:
    """A cell as one search found it.

    Attributes:
        cell: The cell.
        kind: One of `KINDS`.
        search: Name of the search: strategy, swept settings, seed.
        score: Accuracy in [0, 1] on the supernet's shared weights; compares cells of one search.
    """

    cell: Cell
    kind: str
    search: str
    score: float


@dataclass(frozen=True)
class Block:
    """A unique cell with its measured cost.

    Attributes:
        name: Kind and number, the cheapest first: `normal-1`.
        cell: The cell.
        kind: One of `KINDS`.
        cost: At `REFERENCE_CHANNELS` channels on images of the run's size.
        score: Best score among the searches that found it.
        searches: Names of the searches that found it.
    """

    name: str
    cell: Cell
    kind: str
    cost: Cost
    score: float
    searches: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "id": self.cell.id,
            "cell": self.cell.to_json(),
            "params": self.cost.params,
            "flops": self.cost.flops,
            "score": self.score,
            "searches": list(self.searches),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], own: OwnOps = ()) -> Self:
        """Rebuild from `to_json`, with a user's own ops.

        Raises:
            ValueError: If the data has another form, or the id is not the cell's.
        """
        try:
            cell = Cell.from_json(data["cell"], own)
            cost = Cost(int(data["params"]), int(data["flops"]))
            block = cls(
                checked_name(data["name"]),
                cell,
                str(data["kind"]),
                cost,
                float(data["score"]),
                tuple(str(search) for search in data["searches"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a block: {str(data)[:200]}") from error
        if min(cost.params, cost.flops) < 0 or not 0 <= block.score <= 1:
            raise ValueError(f"block {block.name}: its costs or score are out of range")
        if data.get("id") != cell.id or block.kind not in KINDS:
            raise ValueError(f"block {block.name}: its id or kind does not fit its cell")
        return block


class BlockLibrary:
    """Unique blocks of every kind, each kind ordered from cheap to dear."""

    def __init__(self, blocks: Iterable[Block]):
        self.blocks = tuple(blocks)
        self._by_name = {block.name: block for block in self.blocks}

    @classmethod
    def from_found(cls, found: Iterable[FoundCell], image_side: tuple[int, int]) -> Self:
        """Keep each cell once per kind, measure it, and name the blocks in the order of cost."""
        unique: dict[tuple[str, str], list[FoundCell]] = {}
        for one in found:
            unique.setdefault((one.kind, one.cell.id), []).append(one)
        blocks = []
        for kind in KINDS:
            same_kind = [group for (k, _), group in unique.items() if k == kind]
            measured = [(reference_cost(g[0].cell, kind, image_side), g) for g in same_kind]
            measured.sort(key=lambda pair: (pair[0].params, pair[0].flops, pair[1][0].cell.id))
            for number, (cost, group) in enumerate(measured, start=1):
                blocks.append(
                    Block(
                        name=f"{kind}-{number}",
                        cell=group[0].cell,
                        kind=kind,
                        cost=cost,
                        score=max(one.score for one in group),
                        searches=tuple(one.search for one in group),
                    )
                )
        return cls(blocks)

    def __getitem__(self, name: str) -> Block:
        """Return the block of that name."""
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self.blocks)

    def names(self, kind: str) -> tuple[str, ...]:
        """Return the names of the blocks of one kind, the cheapest first."""
        return tuple(block.name for block in self.blocks if block.kind == kind)

    @functools.cached_property
    def cells(self) -> dict[str, Cell]:
        """Name to cell, of all blocks."""
        return {block.name: block.cell for block in self.blocks}

    def save(self, folder: RunFolder) -> None:
        """Write `blocks.json` into the folder of a run."""
        folder.write_json(folder.blocks.name, [block.to_json() for block in self.blocks])

    @classmethod
    def load(cls, folder: RunFolder, own: OwnOps = ()) -> Self:
        """Read that of a run, whose cells may have a user's own ops.

        Raises:
            InputError: If the file is missing or damaged.
        """
        return folder.load(
            folder.blocks.name, lambda data: cls([Block.from_json(block, own) for block in data])
        )


def reference_cost(cell: Cell, kind: str, image_side: tuple[int, int]) -> Cost:
    """Return a cell's cost at `REFERENCE_CHANNELS` channels inside a stack of equal cells."""
    wide = len(cell.outputs) * REFERENCE_CHANNELS
    module = DiscreteCell(
        cell,
        (wide, wide),
        REFERENCE_CHANNELS,
        reduction=kind == REDUCTION,
        halve_first=False,
    )
    return measure_cost(module, (wide, *image_side), (wide, *image_side))
