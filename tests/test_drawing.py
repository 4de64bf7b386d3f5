"""A cell drawn as SVG: an op name for every edge, no box over another, left to right."""

import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations

import pytest

from evaluation.report.drawing import DrawnBlock, draw_block
from test_report import BLOCKS

SVG = "{http://www.w3.org/2000/svg}"


def random_cell(seed: int) -> DrawnBlock:
    draw = random.Random(seed)
    ops = ("skip_connect", "avg_pool_3x3", "dws_conv_5x5", "sep_conv_3x3", "ghost_3x3")
    nodes = tuple(
        tuple((source, draw.choice(ops)) for source in draw.sample(range(2 + node), 2))
        for node in range(draw.randint(1, 6))
    )
    return DrawnBlock("cell", "normal", 2, nodes, 1, 1, "")


@pytest.mark.parametrize("seed", range(20))
def test_drawn_cell_has_one_label_per_edge_and_one_wire_per_edge_and_output(seed: int):
    block = random_cell(seed)
    root = ElementTree.fromstring(draw_block(block))
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "op"]
    assert sorted(map(str, labels)) == sorted(op for node in block.nodes for _, op in node)
    assert len(list(root.iter(f"{SVG}path"))) == len(labels) + len(block.nodes)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_of_a_drawn_cell_stay_inside_and_never_overlap(seed: int):
    root = ElementTree.fromstring(draw_block(random_cell(seed)))
    boxes = [
        [float(rect.get(name, "nan")) for name in ("x", "y", "width", "height")]
        for rect in root.iter(f"{SVG}rect")
    ]
    for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations(boxes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    assert all(
        x >= 0 and y >= 0 and x + w <= float(root.get("width", "0")) + 0.5 for x, y, w, _ in boxes
    )


def test_drawn_cell_reads_from_left_to_right():
    root = ElementTree.fromstring(draw_block(BLOCKS[0]))
    states = [text for text in root.iter(f"{SVG}text") if text.get("class") == "state"]
    place = {"".join(text.itertext()): float(text.get("x", "nan")) for text in states}
    assert list(place) == ["ck−2", "ck−1", "0", "1", "2", "ck"]
    assert place["ck−2"] == place["ck−1"] < place["0"] < place["1"] < place["2"] < place["ck"]


def test_a_node_without_edges_is_not_drawn_and_the_others_keep_their_numbers():
    nodes = (((0, "skip_connect"),), (), ((0, "sep_conv_3x3"), (2, "ghost_3x3")), ())
    root = ElementTree.fromstring(draw_block(replace(BLOCKS[0], nodes=nodes)))
    states = [text for text in root.iter(f"{SVG}text") if text.get("class") == "state"]
    assert ["".join(text.itertext()) for text in states] == ["ck−2", "ck−1", "0", "2", "ck"]
    assert len(list(root.iter(f"{SVG}path"))) == 3 + 2  # its edges, and nodes 0 and 2 into ck


def test_a_node_without_edges_that_another_reads_is_drawn_but_not_as_output():
    nodes = ((), ((0, "nor_conv_3x3"), (1, "skip_connect")))  # as in the dense space
    root = ElementTree.fromstring(draw_block(replace(BLOCKS[0], inputs=1, nodes=nodes)))
    states = [text for text in root.iter(f"{SVG}text") if text.get("class") == "state"]
    assert ["".join(text.itertext()) for text in states] == ["ck−1", "0", "1", "ck"]
    assert len(list(root.iter(f"{SVG}path"))) == 2 + 1
