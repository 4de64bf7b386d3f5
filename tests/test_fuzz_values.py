"""Configs, genomes, cells, amounts and budgets, drawn at random: what must hold for all of them."""

import json
import math
import os

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from blocksearch.ops import DARTS_OPS, LIGHT_OPS
from blocksearch.space import Cell, SearchSpace
from configs.experiment import Config
from evaluation.errors import InputError
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.choice import Wishes, choose
from evaluation.pareto.front import Budgets
from evaluation.records import Cost, ModelRecord
from evaluation.terminal.amounts import amount, read_number, read_whole
from fuzzing import quickstart
from mutations import changed, names_a_key, places, text_of, values
from netsearch.forecast.checks import check_run
from netsearch.space.genome import GenomeSpace, NetworkSpec
from run_pipeline import Pipeline

EXAMPLES = int(os.environ.get("PARETOBLOCKS_FUZZ_EXAMPLES", "20"))
EASY = settings(
    max_examples=EXAMPLES,
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    suppress_health_check=[*HealthCheck],
)
CONFIG = quickstart()
WRONG = (None, -1, "never a value", {"unknown": 1})
MORE_WRONG = (1e308, [], True, 1.5, "", [None], [[1]], {})
JARGON = ("Input should", "valid ", "Field required", "Extra inputs", "Value error", "unable to")
ascending = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def spaces(draw):
    names = [[f"{kind}{i}" for i in range(draw(st.integers(1, 4)))] for kind in "nr"]
    widths = tuple(4 * width for width in draw(ascending))
    stages = draw(st.integers(2, 4))
    return GenomeSpace(stages, tuple(draw(ascending)), widths, *map(tuple, names))


@st.composite
def cells(draw):
    ops, nodes = draw(st.sampled_from((LIGHT_OPS, DARTS_OPS))), draw(st.integers(1, 5))
    space = SearchSpace(ops, nodes, edges_per_node=draw(st.integers(1, 3)))
    return space, space.random_cell(draw(st.randoms(use_true_random=False)))


@EASY
@given(st.data(), spaces())
def test_a_genome_in_bounds_is_its_network_and_back(data, space):
    genome = tuple(data.draw(st.integers(0, top)) for top in space.upper.tolist())
    spec = space.decode(genome)
    assert space.encode(spec) == genome
    assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert len(spec.stages) == space.stages and len(spec.reductions) == space.stages - 1


@EASY
@given(spaces(), st.lists(st.integers(-3, 2**70), max_size=16))
def test_a_genome_out_of_bounds_is_refused_with_a_value_error(space, genome):
    upper = space.upper.tolist()
    inside = len(genome) == len(upper) and all(
        0 <= gene <= top for gene, top in zip(genome, upper, strict=True)
    )
    assume(not inside)
    with pytest.raises(ValueError, match="gene"):
        space.decode(genome)


@EASY
@given(st.data(), spaces())
def test_ids_of_networks_tell_structures_apart_and_not_names(data, space):
    draw = [data.draw(cells())[1] for _ in (*space.normal, *space.reduction)]
    names = [*space.normal, *space.reduction]
    table = dict(zip(names, draw, strict=True))
    one, other = (
        space.decode([data.draw(st.integers(0, top)) for top in space.upper.tolist()])
        for _ in range(2)
    )

    def structure(spec):
        stages = [(table[s.block].id, s.repeats, s.channels) for s in spec.stages]
        return stages, [table[name].id for name in spec.reductions]

    assert (one.id(table) == other.id(table)) == (structure(one) == structure(other))


@EASY
@given(cells())
def test_a_cell_survives_json_with_its_id_and_stays_in_its_space(pair):
    space, cell = pair
    again = Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert again == cell and again.id == cell.id
    space.check(again)


@EASY
@given(cells().flatmap(lambda pair: values(pair[1].to_json())))
def test_junk_in_a_cell_is_a_value_error_or_a_cell_with_an_id(data):
    try:
        cell = Cell.from_json(data)
    except ValueError:
        return
    assert len(cell.id) == 12


@pytest.mark.parametrize(
    "data",
    [
        {"inputs": 2, "nodes": [[[0, "none"]]] * 9},
        {"inputs": 2, "nodes": [[[0, "none"]] * 17]},
        {"inputs": 2, "nodes": [[[2, "none"]]]},
        {"inputs": 2, "nodes": [[[-1, "none"]]]},
        {"inputs": 0, "nodes": [[]]},
        {"inputs": 2, "nodes": [[], []]},
    ],
    ids=["many nodes", "many edges", "reads itself", "reads nothing", "no inputs", "no edges"],
)
def test_a_cell_that_could_not_be_built_in_a_moment_is_refused(data):
    with pytest.raises(ValueError, match="not a cell"):
        Cell.from_json(data)


@EASY
@given(st.one_of(st.text(max_size=12), st.from_regex(r"-?\d{1,400}(\.\d*)?(e-?\d+)?[kKMG]*")))
def test_an_amount_is_a_positive_integer_or_an_input_error(text):
    try:
        value = amount(text)
    except InputError as error:
        assert "positive amount" in str(error)
    else:
        assert isinstance(value, int) and value >= 1


@EASY
@given(st.integers(0, 10**30), st.integers(0, 3))
def test_a_number_is_read_as_it_is_printed(count, decimals):
    assert read_number(f"{count:,}") == read_number(f"{count:_}") == read_whole(f"{count}") == count
    text = f"{count / 7:,.{decimals}f}"
    assert read_number(text) == float(text.replace(",", ""))


@EASY
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_survives_its_text_to_the_bit(value):
    read = read_number(repr(value))
    assert abs(value) > 1e300 or repr(float(read)) == repr(value)


@EASY
@given(st.from_regex(r"[-+0-9.,_ekKMG]{1,12}", fullmatch=True))
def test_commas_never_move_a_point(text):
    value = read_number(text)
    if value is not None and "," in text:
        first, *groups = text.lstrip("+-").partition(".")[0].split(",")
        assert first[0] != "0" and 1 <= len(first) <= 3
        assert all(len(group) == 3 for group in groups[:-1]) and groups[-1][:3].isdigit()


@EASY
@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9)]))
def test_an_amount_means_what_it_says(count, unit):
    assert amount(f"{count}{unit[0]}") == count * unit[1]


counts = st.integers(1, 10**9)
fractions = st.floats(0, 1)
numbers = st.one_of(counts, st.floats(), st.integers(-5, 5), st.just(math.inf), st.just(math.nan))


@st.composite
def records(draw):
    found = []
    for index in range(draw(st.integers(1, 6))):
        latency = draw(st.one_of(st.none(), st.floats(1e-3, 1e6)))
        cost = Cost(draw(counts), draw(counts), latency)
        tests = tuple(draw(st.lists(fractions, max_size=3)))
        found.append(
            ModelRecord(f"id{index}", (0,), (), cost, 0, draw(fractions), tests, tuple(range(3)))
        )
    return found


@settings(EASY, max_examples=2 * EXAMPLES)
@given(records(), st.data())
def test_a_choice_keeps_every_budget_or_says_which_it_misses(models, data):
    drawn = [data.draw(st.one_of(st.none(), numbers)) for _ in range(5)]
    rules = data.draw(st.sampled_from(({}, {"strict": True}, {"knee": True})))
    try:
        names = ("max_params", "max_flops", "max_latency_ms", "max_bits")
        budgets = Budgets(**dict(zip(names, drawn[:4], strict=True)))
        wishes = Wishes(budgets, None, drawn[4], **rules)
        chosen = choose(models, wishes)
    except InputError:
        return
    assert chosen.record in models and chosen.record.test_accuracy
    assert chosen.fits == (not chosen.misses)
    for name, top in wishes.limits().items():
        kept = name in chosen.costs and chosen.costs[name] <= top
        assert kept != any(miss.name == name for miss in chosen.misses)
    json.dumps(chosen.to_json(), allow_nan=False)
    assert all(isinstance(line, str) for line in chosen.lines())


@pytest.mark.parametrize(
    "wrong", [WRONG, pytest.param(MORE_WRONG, marks=pytest.mark.slow)], ids=["some", "more"]
)
@pytest.mark.parametrize("path", places(CONFIG)[1:], ids=lambda path: ".".join(map(str, path)))
def test_a_config_with_a_wrong_value_is_refused_by_the_name_of_its_key_in_plain_words(
    path, wrong, tmp_path
):
    file = tmp_path / "own.yaml"
    refused = 0
    for junk in wrong:
        file.write_text(text_of(changed(CONFIG, path, "replace", junk)))
        try:
            Config.load(file)
        except InputError as error:
            refused += 1
            words = [str(part) for part in path if isinstance(part, str)]
            assert names_a_key(str(error), {words[-1], words[0]}), error
            assert not any(words in str(error) for words in JARGON), error
    assert refused > 0


@EASY
@given(values(CONFIG))
def test_a_random_config_is_an_input_error_or_survives_its_yaml(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("config") / "own.yaml"
    file.write_text(text_of(data))
    try:
        config = Config.load(file)
    except InputError as error:
        assert "own.yaml" in str(error)
        return
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert Config.load(file) == config


small = st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True).map(sorted)
DRY = {  # key -> values that are in range, whatever comes of them together
    "blocksearch.nodes": st.integers(1, 4),
    "blocksearch.edges_per_node": st.integers(1, 4),
    "blocksearch.channels": st.sampled_from((4, 8, 12)),
    "blocksearch.cells": st.integers(2, 5),
    "blocksearch.batch_size": st.integers(2, 64),
    "netsearch.max_params": st.one_of(st.none(), st.integers(1, 10**9)),
    "netsearch.max_flops": st.one_of(st.none(), st.integers(1, 10**12)),
    "netsearch.depths": small,
    "netsearch.widths": small.map(lambda sizes: [4 * size for size in sizes]),
    "netsearch.search": st.sampled_from(("random", "nsga2", "surrogate", "smem", "halving")),
    "retrain.members": st.integers(1, 9),
    "data.valid_fraction": st.floats(0.01, 0.99),
    "data.test_fraction": st.floats(0.01, 0.99),
    "data.image_size_px": st.one_of(st.none(), st.integers(4, 12)),
    "data.max_train_images": st.one_of(st.none(), st.integers(1, 300)),
}


@pytest.mark.slow
@settings(EASY, max_examples=20)
@given(st.fixed_dictionaries({}, optional=DRY))
def test_a_valid_config_runs_a_dry_step_or_names_the_key(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("dry")
    given_ = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    base = ["retrain.baselines=0", "blocksearch.epochs=1"]
    base += ["blocksearch.ops=[none, skip_connect, dws_conv_3x3]"]
    try:
        config = Config.load(_quickstart(folder), base + given_)
        pipeline = Pipeline(config, RunFolder(folder), console=Console(quiet=True))
        check_run(pipeline.dataset, pipeline.plan(), pipeline.folder, pipeline.device)
    except InputError as error:
        keys = {part for key in changes for part in key.split(".")} | {"data", "search", "digits"}
        assert names_a_key(str(error), keys), error


def _quickstart(folder):
    path = folder / "own.yaml"
    path.write_text(json.dumps(CONFIG))
    return path
