"""Cells and spaces: identity, validation, JSON, random cells."""

import json
import random
import subprocess
import sys

import pytest

from blocksearch.space import KINDS, Cell, Edge, SearchSpace

OPS = ("none", "skip_connect", "max_pool_3x3", "ghost_3x3")
SPACE = SearchSpace(OPS, nodes=3)


def cell(*nodes: list[tuple[int, str]]) -> Cell:
    return Cell(tuple(tuple(Edge(*edge) for edge in node) for node in nodes))


VALID = cell(
    [(0, "skip_connect"), (1, "ghost_3x3")],
    [(0, "max_pool_3x3")],
    [(2, "ghost_3x3"), (3, "skip_connect")],
)


def test_the_edges_of_the_darts_space_are_14_grouped_by_target():
    edges = SearchSpace(OPS).edges
    assert len(edges) == 14
    assert edges[:5] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert all(source < target for source, target in edges)


def test_the_kinds_are_normal_then_reduction():
    assert KINDS == ("normal", "reduction")


def test_renumbering_the_nodes_keeps_the_id():
    swapped = cell(
        [(0, "max_pool_3x3")],
        [(1, "ghost_3x3"), (0, "skip_connect")],
        [(2, "skip_connect"), (3, "ghost_3x3")],
    )
    assert swapped != VALID
    assert swapped.id == VALID.id


def test_every_possible_renumbering_of_a_random_cell_keeps_its_id():
    generator = random.Random(0)
    renumbered = 0
    for _ in range(50):
        original = SearchSpace(OPS, nodes=4).random_cell(generator)
        order = generator.sample(range(4), 4)  # new position -> old node
        place = {2 + old: 2 + new for new, old in enumerate(order)}
        other = cell(
            *(
                [(place.get(e.source, e.source), e.op) for e in reversed(original.nodes[old])]
                for old in order
            )
        )
        if all(e.source < 2 + i for i, node in enumerate(other.nodes) for e in node):
            renumbered += other != original
            assert other.id == original.id
    assert renumbered > 5


@pytest.mark.parametrize(
    "other",
    [
        cell(
            [(0, "skip_connect"), (1, "ghost_3x3")],
            [(0, "ghost_3x3")],
            [(2, "ghost_3x3"), (3, "skip_connect")],
        ),
        cell(
            [(0, "skip_connect"), (1, "ghost_3x3")],
            [(1, "max_pool_3x3")],
            [(2, "ghost_3x3"), (3, "skip_connect")],
        ),
        cell(
            [(0, "skip_connect"), (1, "ghost_3x3")],
            [(0, "max_pool_3x3")],
            [(2, "skip_connect"), (3, "ghost_3x3")],
        ),
        cell(
            [(0, "skip_connect"), (1, "ghost_3x3")],
            [(0, "max_pool_3x3")],
            [(2, "ghost_3x3")],
        ),
    ],
    ids=["another op", "another input", "ops swapped", "an edge less"],
)
def test_another_graph_has_another_id(other):
    assert other.id != VALID.id


def test_the_id_is_the_same_in_a_new_process_and_needs_no_torch():
    program = (
        "import json, sys; from blocksearch.space import Cell;"
        "print(Cell.from_json(json.loads(sys.argv[1])).id, 'torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, json.dumps(VALID.to_json())]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert output.split() == [VALID.id, "False"]


def test_json_round_trip_gives_the_same_cell():
    generator = random.Random(1)
    for _ in range(20):
        one = SPACE.random_cell(generator)
        assert Cell.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"nodes": [[[0, "skip_connect"]]]},
        {"inputs": 2, "nodes": None},
        {"inputs": 2, "nodes": [[[0, "skip_connect", 1.0]]]},
        {"inputs": 2, "nodes": [[["first", "skip_connect"]]]},
        [1, 2],
    ],
)
def test_json_of_another_form_is_not_a_cell(data):
    with pytest.raises(ValueError, match="not a cell"):
        Cell.from_json(data)


def test_a_valid_cell_is_accepted():
    SPACE.check(VALID)


GOOD_NODE = [(0, "skip_connect")]


def test_a_node_without_edges_is_left_out_of_the_output():
    pruned = cell(GOOD_NODE, [], GOOD_NODE)
    SPACE.check(pruned)
    assert pruned.outputs == (0, 2) and VALID.outputs == (0, 1, 2)
    assert Cell(VALID.nodes, output="last").outputs == (2,)


def test_what_a_cell_computes_decides_its_id_and_survives_json():
    forms = [VALID, Cell(VALID.nodes, output="last"), Cell(VALID.nodes, one_bit=True)]
    assert len({one.id for one in forms}) == 3
    assert [Cell.from_json(json.loads(json.dumps(one.to_json()))) for one in forms] == forms
    assert set(VALID.to_json()) == {"inputs", "nodes"}


def test_the_last_node_of_a_cell_that_hands_it_on_changes_places_with_no_other():
    one, other = [(0, "skip_connect")], [(0, "ghost_3x3")]
    first, second = (cell(*nodes) for nodes in ((one, other), (other, one)))
    assert first.id == second.id
    assert Cell(first.nodes, output="last").id != Cell(second.nodes, output="last").id


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        (cell(GOOD_NODE, GOOD_NODE), "2 inputs and 3 nodes, got 2 and 2"),
        (Cell(VALID.nodes, inputs=1), "2 inputs and 3 nodes, got 1 and 3"),
        (cell([], [], []), "expected edges"),
        (cell(GOOD_NODE, [], [(3, "ghost_3x3")]), "node 2 reads node 1, which has no edges"),
        (Cell(VALID.nodes, output="last"), "expected edges, and output 'concat'"),
        (cell(GOOD_NODE, GOOD_NODE, [(s, "ghost_3x3") for s in (0, 1, 2)]), "node 2 needs at most"),
        (cell([(1, "ghost_3x3"), (1, "skip_connect")], GOOD_NODE, GOOD_NODE), "different states"),
        (cell(GOOD_NODE, [(0, "none")], GOOD_NODE), "node 1 has unknown op 'none'"),
        (cell(GOOD_NODE, [(0, "conv_7x7")], GOOD_NODE), "node 1 has unknown op 'conv_7x7'"),
        (cell([(2, "ghost_3x3")], GOOD_NODE, GOOD_NODE), "node 0 cannot read state 2"),
        (cell(GOOD_NODE, [(4, "ghost_3x3")], GOOD_NODE), "node 1 cannot read state 4"),
        (cell([(-1, "ghost_3x3")], GOOD_NODE, GOOD_NODE), "node 0 cannot read state -1"),
    ],
)
def test_an_invalid_cell_is_refused_with_the_reason(invalid, message):
    with pytest.raises(ValueError, match=message):
        SPACE.check(invalid)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ops": OPS, "nodes": 0}, "at least 1"),
        ({"ops": OPS, "inputs": 0}, "at least 1"),
        ({"ops": OPS, "edges_per_node": 0}, "at least 1"),
        ({"ops": ()}, "besides 'none'"),
        ({"ops": ("none",)}, "besides 'none'"),
        ({"ops": ("skip_connect", "skip_connect")}, "distinct"),
    ],
)
def test_an_impossible_space_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**settings)


def test_random_cells_are_valid_and_use_every_op_but_none_and_every_edge():
    generator = random.Random(2)
    ops, edges = set(), set()
    for _ in range(300):
        one = SPACE.random_cell(generator)
        SPACE.check(one)
        for index, node in enumerate(one.nodes):
            assert len(node) == 2
            ops |= {edge.op for edge in node}
            edges |= {(edge.source, 2 + index) for edge in node}
    assert ops == set(OPS) - {"none"}
    assert edges == set(SPACE.edges)


def test_random_cells_of_a_space_with_many_edges_per_node_take_what_there_is():
    space = SearchSpace(OPS, nodes=2, edges_per_node=3)
    one = space.random_cell(random.Random(0))
    space.check(one)
    assert [len(node) for node in one.nodes] == [2, 3]


def test_the_seed_decides_the_random_cell():
    drawn = [SPACE.random_cell(random.Random(seed)) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
