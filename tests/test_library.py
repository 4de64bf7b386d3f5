"""The block library: unique cells, their names and costs, and what is refused on loading."""

import json
from pathlib import Path

import pytest

from blocksearch.library import REFERENCE_CHANNELS, BlockLibrary, FoundCell, reference_cost
from blocksearch.space import NORMAL, REDUCTION, Cell, Edge
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder


def cell(op: str, *, mirrored: bool = False) -> Cell:
    """Two nodes that read different inputs; mirrored, they stand in the other order."""
    nodes = ((Edge(0, op),), (Edge(1, "skip_connect"),))
    return Cell(nodes[::-1] if mirrored else nodes)


FOUND = [
    FoundCell(cell("sep_conv_3x3"), NORMAL, "a-s0", 0.5),
    FoundCell(cell("skip_connect"), NORMAL, "a-s0", 0.3),
    FoundCell(cell("sep_conv_3x3", mirrored=True), NORMAL, "b-s1", 0.7),
    FoundCell(cell("dws_conv_3x3"), NORMAL, "b-s1", 0.1),
    FoundCell(cell("sep_conv_3x3"), REDUCTION, "b-s1", 0.2),
]


@pytest.fixture
def library() -> BlockLibrary:
    return BlockLibrary.from_found(FOUND, (8, 8))


def test_blocks_are_unique_per_kind_and_named_from_cheap_to_dear(library):
    assert library.names(NORMAL) == ("normal-1", "normal-2", "normal-3")
    assert library.names(REDUCTION) == ("reduction-1",)
    assert len(library) == 4
    ops = [library[name].cell.nodes[0][0].op for name in library.names(NORMAL)]
    assert ops == ["skip_connect", "dws_conv_3x3", "sep_conv_3x3"]
    costs = [library[name].cost.params for name in library.names(NORMAL)]
    assert costs[0] < costs[1] < costs[2]


def test_a_block_remembers_every_search_that_found_it_and_the_best_score(library):
    block = library["normal-3"]
    assert block.searches == ("a-s0", "b-s1")
    assert block.score == 0.7
    assert library["reduction-1"].searches == ("b-s1",)


def test_the_order_in_which_cells_were_found_names_no_block(library):
    other = BlockLibrary.from_found(FOUND[::-1], (8, 8))
    assert [(b.name, b.cell.id, b.cost) for b in other.blocks] == [
        (b.name, b.cell.id, b.cost) for b in library.blocks
    ]


def test_cells_maps_names_to_cells(library):
    assert library.cells["reduction-1"] == cell("sep_conv_3x3")
    assert list(library.cells) == [block.name for block in library.blocks]


def test_the_reference_cost_is_the_hand_count():
    c = REFERENCE_CHANNELS
    inputs = 2 * (2 * c * c + 2 * c)  # each brings 2 C channels to C, with a BatchNorm
    separable = 2 * (9 * c + c * c)
    normal = reference_cost(cell("sep_conv_3x3"), NORMAL, (8, 6))
    assert normal.params == inputs + separable + 2 * 2 * c
    assert normal.flops == 48 * (4 * c * c + separable)
    reduction = reference_cost(cell("sep_conv_3x3"), REDUCTION, (8, 6))
    assert reduction.params == normal.params + c * c + 2 * c  # its skip is a FactorizedReduce
    assert reduction.flops == 48 * 4 * c * c + 12 * (separable + c * c)


def test_a_saved_library_loads_as_it_was(library, tmp_path: Path):
    library.save(RunFolder(tmp_path))
    assert BlockLibrary.load(RunFolder(tmp_path)).blocks == library.blocks


def test_a_missing_library_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"blocks\.json"):
        BlockLibrary.load(RunFolder(tmp_path))


@pytest.mark.parametrize("text", ["", "[{]", "{}x", "7", "null", "[1]", "[null]", '[{"name": 1}]'])
def test_a_damaged_library_is_refused_naming_the_file(text, tmp_path: Path):
    path = tmp_path / "blocks.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"blocks\.json"):
        BlockLibrary.load(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "0123456789ab"}, "id or kind does not fit"),
        ({"cell": cell("dws_conv_5x5").to_json()}, "id or kind does not fit"),
        ({"kind": "normale"}, "id or kind does not fit"),
        ({"cell": {"nodes": []}}, "not a cell"),
        ({"params": "many"}, "many"),
        ({"score": None}, "not a block"),
        ({"searches": 3}, "not a block"),
    ],
)
def test_a_changed_block_is_refused(change, message, library, tmp_path: Path):
    path = tmp_path / "blocks.json"
    library.save(RunFolder(tmp_path))
    data = json.loads(path.read_text())
    data[1] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"blocks.json.*{message}"):
        BlockLibrary.load(RunFolder(tmp_path))
