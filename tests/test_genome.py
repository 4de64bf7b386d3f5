"""Genomes and specs: one to one, in bounds, and an id that depends on structure alone."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from blocksearch.ops import LIGHT_OPS
from blocksearch.space import Cell, Edge, SearchSpace
from netsearch.space.genome import GenomeSpace, NetworkSpec, Stage, stages_for

SPACE = GenomeSpace(
    stages=3,
    depths=(1, 2, 4),
    widths=(8, 12, 16, 32),
    normal=("n0", "n1", "n2"),
    reduction=("r0", "r1"),
)
TINY = GenomeSpace(2, depths=(1, 3), widths=(4, 8), normal=("n0",), reduction=("r0", "r1"))


def cells(seed=0):
    generator = random.Random(seed)
    space = SearchSpace(LIGHT_OPS, nodes=2)
    return {name: space.random_cell(generator) for name in (*SPACE.normal, *SPACE.reduction)}


@pytest.mark.parametrize(
    ("side", "stages"), [(4, 2), (8, 2), (9, 2), (16, 2), (28, 3), (32, 3), (33, 4), (64, 4)]
)
def test_the_number_of_stages_brings_the_resolution_to_8_pixels(side, stages):
    assert stages_for((side, side)) == stages
    assert stages_for((side, 1000)) == stages_for((1000, side)) == stages


def test_a_genome_is_read_as_depths_widths_normal_and_reduction_blocks():
    assert SPACE.decode((0, 1, 2, 3, 2, 1, 2, 0, 1, 1, 0)) == NetworkSpec(
        (Stage("n2", 1, 32), Stage("n0", 2, 16), Stage("n1", 4, 12)), ("r1", "r0")
    )
    assert SPACE.upper.tolist() == [2, 2, 2, 3, 3, 3, 2, 2, 2, 1, 1]
    assert SPACE.size == 3**3 * 4**3 * 3**3 * 2**2


def test_encoding_undoes_decoding_on_random_genomes():
    generator = np.random.default_rng(0)
    genomes = {SPACE.random(generator) for _ in range(300)}
    assert len(genomes) > 295
    for genome in genomes:
        assert SPACE.encode(SPACE.decode(genome)) == genome
        assert all(type(gene) is int for gene in genome)  # JSON knows no numpy integers


def test_every_genome_of_a_space_is_another_network():
    genomes = list(itertools.product(*(range(top + 1) for top in TINY.upper)))
    assert len({TINY.decode(genome) for genome in genomes}) == len(genomes) == TINY.size == 32


def test_random_genomes_reach_every_choice_of_every_gene_and_nothing_else():
    generator = np.random.default_rng(1)
    drawn = np.array([SPACE.random(generator) for _ in range(2000)])
    for gene, top in enumerate(SPACE.upper):
        values, counts = np.unique(drawn[:, gene], return_counts=True)
        assert values.tolist() == list(range(top + 1))
        assert counts.min() > 0.8 * 2000 / (top + 1)


@pytest.mark.parametrize("gene", range(11))
@pytest.mark.parametrize("value", ["above", -1])
def test_a_gene_out_of_bounds_is_refused(gene, value):
    genome = [0] * 11
    genome[gene] = int(SPACE.upper[gene]) + 1 if value == "above" else -1
    with pytest.raises(ValueError, match="genes must lie in 0"):
        SPACE.decode(genome)


@pytest.mark.parametrize("genes", [0, 10, 12])
def test_a_genome_of_another_length_is_refused(genes):
    with pytest.raises(ValueError, match=f"a genome has 11 genes, got {genes}"):
        SPACE.decode([0] * genes)


@pytest.mark.parametrize(
    "change", [{"repeats": 3}, {"channels": 20}, {"block": "n9"}], ids=["depth", "width", "block"]
)
def test_a_network_outside_the_space_has_no_genome(change):
    spec = SPACE.decode([0] * 11)
    outside = replace(spec, stages=(replace(spec.stages[0], **change), *spec.stages[1:]))
    with pytest.raises(ValueError):
        SPACE.encode(outside)


def test_the_blocks_of_a_spec_are_named_once_normal_ones_first():
    spec = NetworkSpec((Stage("b", 1, 8), Stage("a", 1, 8), Stage("b", 2, 8)), ("r", "r"))
    assert spec.blocks == ("b", "a", "r")


def test_the_id_does_not_depend_on_the_names_of_blocks_but_on_their_cells():
    library = cells()
    spec = SPACE.decode((0, 1, 2, 3, 2, 1, 2, 0, 1, 1, 0))
    renamed = NetworkSpec(
        tuple(replace(stage, block=f"new-{stage.block}") for stage in spec.stages),
        tuple(f"new-{name}" for name in spec.reductions),
    )
    assert renamed.id({f"new-{name}": cell for name, cell in library.items()}) == spec.id(library)
    for name in spec.blocks:
        other = {**library, name: cells(seed=1)[name]}
        assert spec.id(other) != spec.id(library)


def test_two_names_of_one_cell_give_one_id():
    library = cells()
    library["n1"] = library["n0"]
    ids = {SPACE.decode((0,) * 6 + (n, 0, n, 0, 0)).id(library) for n in (0, 1)}
    assert len(ids) == 1


def test_cells_that_differ_in_the_order_of_their_nodes_give_one_id():
    one = Cell(((Edge(0, "skip_connect"),), (Edge(1, "dws_conv_3x3"),)))
    other = Cell(((Edge(1, "dws_conv_3x3"),), (Edge(0, "skip_connect"),)))
    spec = NetworkSpec((Stage("n", 1, 8), Stage("n", 1, 8)), ("n",))
    assert spec.id({"n": one}) == spec.id({"n": other})


def test_every_genome_of_a_space_with_different_cells_has_its_own_id():
    library = cells()
    assert len({cell.id for cell in library.values()}) == len(library)
    genomes = itertools.product(*(range(top + 1) for top in TINY.upper))
    assert len({TINY.decode(genome).id(library) for genome in genomes}) == TINY.size
    generator = np.random.default_rng(0)
    drawn = {SPACE.random(generator) for _ in range(300)}
    assert len({SPACE.decode(genome).id(library) for genome in drawn}) == len(drawn)
