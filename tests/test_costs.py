"""Costs as data: each against what it stands for, in searches, and a user's own ones."""

import itertools
import json
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import tiny_run
from blocksearch.library import BlockLibrary
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS
from blocksearch.space import SearchSpace
from blocksearch.supernet.stack import PlacedCell, Stack
from configs import FOLDER
from configs.experiment import Config
from configs.own import Own
from evaluation.cost.activation_memory import ACTIVATION_BYTES, peak_bytes
from evaluation.cost.costs import COSTS, cost_of, kind_of, known_kinds
from evaluation.cost.device_latency import LATENCY
from evaluation.cost.flash import FLASH_BYTES
from evaluation.cost.kind import Axis, CostKind
from evaluation.cost.program import Program, Step
from evaluation.deploy.onnx_files import save_onnx
from evaluation.deploy.quantize import quantize
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.pareto.choice import amount_of
from evaluation.pareto.front import Budgets
from evaluation.records import Cost
from evaluation.terminal.amounts import kilobytes
from evaluation.workers.workers import Workers
from graph_rules import flash_of_file, peak_of_file
from netsearch.members.members import Members
from netsearch.search import Outcome, networks_of
from netsearch.space.genome import GenomeSpace, stages_for
from netsearch.space.networks import Networks
from netsearch.space.problem import NetworkProblem, OwnCost
from run_pipeline import Pipeline
from test_stage import stage

SHAPE, CLASSES = (1, 8, 8), 10
QUICKSTART = GenomeSpace(  # with more blocks than its search finds
    stages_for(SHAPE[1:]),
    depths=(1, 2, 3),
    widths=(4, 8, 12, 16, 20),
    normal=("n0", "n1", "n2", "n3"),
    reduction=("r0", "r1", "r2", "r3"),
)


def library(ops=LIGHT_OPS, seed=0, nodes=3, names=(*QUICKSTART.normal, *QUICKSTART.reduction)):
    generator = random.Random(seed)
    return {name: SearchSpace(ops, nodes=nodes).random_cell(generator) for name in names}


def random_stacks(count, cells, shape=SHAPE, seed=0):
    generator = np.random.default_rng(seed)
    problem = NetworkProblem(Networks(QUICKSTART, cells, shape, CLASSES), Budgets())
    return [problem.stack(QUICKSTART.random(generator)) for _ in range(count)]


def trained(stack, seed=0):
    """The network with numbers in its BatchNorms and PReLUs as training leaves them: all differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = stack().eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for numbers in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    numbers.data.uniform_(0.5, 1.5)
            if isinstance(layer, nn.PReLU):
                layer.weight.data.uniform_(0.1, 0.5)
    return network


def exported(stack, folder):
    path = folder / "float.onnx"
    save_onnx(trained(stack), {"image": torch.zeros(1, *stack.image_shape)}, path, {})
    return path


def check_files(stack, folder):
    """Both costs are those of the files that the network is exported to, float and int8."""
    path = exported(stack, folder)
    assert ACTIVATION_BYTES.of(stack) == peak_of_file(path)
    if not any(placed.cell.one_bit for placed in stack.cells):  # no int8 form is known of these
        images = torch.randn(16, *stack.image_shape, generator=torch.Generator().manual_seed(0))
        quantize(path, images, folder / "int8.onnx", {})
        assert FLASH_BYTES.of(stack) == flash_of_file(folder / "int8.onnx")


@pytest.mark.parametrize(  # each seed has other cells
    ("count", "seed"),
    [
        *(pytest.param(1, seed, marks=pytest.mark.slow) for seed in range(2)),
        *(pytest.param(25, seed, marks=pytest.mark.soak) for seed in range(4)),
    ],
)
def test_bytes_of_100_genomes_are_those_of_their_exported_graphs(count, seed, tmp_path):
    for stack in random_stacks(count, library(seed=seed), seed=seed):
        check_files(stack, tmp_path)


def with_every_op(ops, shape, one_bit):
    """A network of three cells, no larger than it must be, in which every op stands."""
    nodes = math.ceil(len(ops) / 6)  # of two edges each
    for seed in itertools.count():
        cells = library(ops, seed, nodes, names=("n0", "r0", "n1"))
        used = {e.op for cell in cells.values() for node in cell.nodes for e in node}
        if used >= {*ops} - {"none"}:
            break
    n0, r0, n1 = (replace(cell, one_bit=one_bit) for cell in cells.values())
    placed = PlacedCell(n0, 4, False), PlacedCell(r0, 8, True), PlacedCell(n1, 8, False)
    return Stack(placed, shape, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "shape", "one_bit"),
    [
        (DARTS_OPS, (3, 9, 13), False),  # odd sides are padded
        (tuple(OPS), (3, 12, 12), False),
        (LIGHT_OPS, SHAPE, True),
    ],
)
def test_bytes_hold_for_every_op_and_shape(ops, shape, one_bit, tmp_path):
    check_files(with_every_op(ops, shape, one_bit), tmp_path)


@pytest.mark.slow
def test_activation_bytes_hold_for_cells_that_hand_on_a_sum(tmp_path):
    space = SearchSpace(("none", "skip_connect", "nor_conv_3x3", "avg_pool_3x3"), 3, inputs=1)
    space = replace(space, kinds=("normal",), output="last", dense=True)
    cell = space.random_cell(random.Random(1))
    cells = PlacedCell(cell, 8, False), PlacedCell(None, 16, True), PlacedCell(cell, 16, False)
    stack = Stack(cells, (3, 8, 8), 10)
    assert ACTIVATION_BYTES.of(stack) == peak_of_file(exported(stack, tmp_path))


def chain(*steps, output):
    """A program of (op, reads, size) on an input of 10 numbers."""
    made = [Step(op, reads, 1 + i, size) for i, (op, reads, size) in enumerate(steps)]
    return Program((10,), tuple(made), output)


@pytest.mark.parametrize(
    ("program", "peak"),
    [
        (chain(("convolution", (0,), 7), output=1), 17),
        # the input is read once more by the second op, so it lives beside both results
        (chain(("convolution", (0,), 7), ("add", (0, 1), 7), output=2), 24),
        # freed behind its last reader
        (chain(("convolution", (0,), 20), ("convolution", (1,), 5), output=2), 30),
        # the ReLU is part of the convolution, but not where another op reads what it reads
        (chain(("convolution", (0,), 7), ("relu", (1,), 7), output=2), 17),
        (chain(("convolution", (0,), 7), ("relu", (1,), 7), ("add", (1, 2), 7), output=3), 21),
        (chain(("cat", (0,), 20), ("relu", (1,), 20), output=2), 40),
        # a result that is read by nothing else lives to the end
        (chain(("convolution", (0,), 9), ("add", (0, 0), 4), ("add", (2, 2), 8), output=1), 23),
    ],
)
def test_the_peak_of_small_programs_is_what_one_counts_by_hand(program, peak):
    assert peak_bytes(program) == peak


def test_flash_bytes_of_1_bit_layers_are_refused():
    cells = {name: replace(cell, one_bit=True) for name, cell in library().items()}
    with pytest.raises(InputError, match="flash_bytes: the weights of .* no known int8 form"):
        FLASH_BYTES.of(random_stacks(1, cells)[0])


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_extremes_of_a_peak_equal_brute_force_over_a_whole_space(seed):
    space = GenomeSpace(2, (1, 3), (4, 20), ("n0", "n1"), ("r0", "r1"))
    cells = library(seed=seed, nodes=1 + seed, names=("n0", "n1", "r0", "r1"))
    names = ("activation_bytes", "flash_bytes")
    problem = NetworkProblem(Networks(space, cells, (3, 9, 9), CLASSES), Budgets(), names)
    genomes = [tuple(g) for g in np.ndindex(*(int(top) + 1 for top in space.upper))]
    costs = problem.costs(genomes)
    assert len(genomes) == 128
    for column, name in zip(costs.T, names, strict=True):
        assert problem.extremes(name) == (column.min(), column.max())


def test_both_are_costs_and_budgets_kept_before_any_training(tmp_path):
    costs = ("activation_bytes", "flash_bytes")
    outcome = stage(tmp_path, costs=costs, max_activation_bytes=2_500, evaluations=6).run()
    records = list(Archive(tmp_path / "archive.jsonl"))
    problem = stage(tmp_path, costs=costs, max_activation_bytes=2_500).problem
    for record in records:
        stack = problem.stack(record.genome)
        assert record.cost.others() == {name: COSTS[name].of(stack) for name in costs}
        assert record.cost.count("activation_bytes") <= 2_500
    assert problem.extremes("activation_bytes")[1] > 2_500  # the budget leaves something out
    assert outcome.box.costs == costs and outcome.box.reference[0] == 2_500
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    least = problem.extremes("activation_bytes")[0]
    message = f"netsearch.max_activation_bytes=100: no network fits; .* has {least} activation"
    with pytest.raises(InputError, match=message):
        stage(tmp_path / "none", costs=costs, max_activation_bytes=100).run()
    assert not (tmp_path / "none").exists()


def test_a_run_that_asks_for_neither_writes_what_it_always_wrote(tmp_path):
    stage(tmp_path, evaluations=4).run()
    for line in (tmp_path / "archive.jsonl").read_text().splitlines():
        assert list(json.loads(line)["cost"]) == ["params", "flops", "latency_ms"]


def energy(network):
    return network.cost().flops * 1e-3 + network.cost().params * 0.5


ENERGY = CostKind("energy_nj", "nJ", Axis("energy", "energy of one image, nJ"), energy, whole=False)


def test_an_own_cost_is_minimised_and_bounded_without_a_fork(tmp_path):
    one = stage(tmp_path, evaluations=6)
    limit = one.problem.cost(one.problem.cheapest()[0]).params * 2.0
    one = replace(stage(tmp_path, evaluations=6), costs=(OwnCost(ENERGY, limit=limit),))
    outcome = one.run()
    assert outcome.box.costs == ("params", "energy_nj") and outcome.box.reference[1] == limit
    for record in Archive(tmp_path / "archive.jsonl"):
        value = record.cost.count("energy_nj")
        assert value == energy(one.problem.stack(record.genome)) <= limit
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    assert pickle.loads(pickle.dumps(one.problem)).kinds["energy_nj"] == ENERGY
    with pytest.raises(InputError, match=r"knows of its networks .*energy_nj.* cannot go on"):
        stage(tmp_path, evaluations=6).run()


@pytest.mark.slow
def test_an_own_cost_goes_through_a_whole_run_of_two_workers(tmp_path):
    own = Own(costs=(OwnCost(ENERGY),))
    config = Config.load(FOLDER / "quickstart.yaml", tiny_run.TINY, own)
    folder, console = RunFolder(tmp_path / "run"), Console(quiet=True)
    run = Pipeline(config, folder, workers=Workers(2), console=console)
    run.run()
    front = Members.open(folder.path).front()
    networks = networks_of(config.netsearch, BlockLibrary.load(folder), run.images)
    for record in front:
        assert record.cost.count("energy_nj") == energy(networks.stack(record.genome))
    assert any(record.test_accuracy for record in front)
    assert "energy_nj" in (folder.path / "report.html").read_text()


def problem_with(kind, **changes):
    own = {"own": (kind,), "cost_names": ("params", kind.name), "budgets": Budgets(), **changes}
    return NetworkProblem(Networks(QUICKSTART, library(), SHAPE, CLASSES), **own)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "much", True, None])
def test_a_value_that_is_no_cost_is_refused_with_the_network_and_the_value(value):
    kind = replace(ENERGY, measure=lambda network: value)
    problem = problem_with(kind)
    genome = (0,) * len(QUICKSTART.upper)
    network = problem.stack(genome).id
    with pytest.raises(InputError, match=f"energy_nj of network {network}: .* got {value!r}"):
        problem.cost(genome)


def test_a_count_is_whole_and_what_is_minimised_is_not_0():
    genome = (0,) * len(QUICKSTART.upper)
    with pytest.raises(InputError, match="expected a whole number .* got 2.5"):
        problem_with(CostKind("parts", "parts", measure=lambda network: 2.5)).cost(genome)
    zero = CostKind("parts", "parts", measure=lambda network: 0)
    with pytest.raises(InputError, match="parts of network .* must be above 0"):
        problem_with(zero).cost(genome)
    assert problem_with(zero, cost_names=("params",)).cost(genome).others() == {}


def test_a_cost_that_is_measured_needs_its_measurement():
    for changes in ({"cost_names": (LATENCY.name,)}, {"budgets": Budgets(max_latency_ms=1.0)}):
        with pytest.raises(InputError, match="latency_ms is not exact but measured"):
            NetworkProblem(
                Networks(QUICKSTART, library(), SHAPE, CLASSES), **{"budgets": Budgets(), **changes}
            )
    with pytest.raises(InputError, match="was not measured here"):
        LATENCY.of(random_stacks(1, library())[0])


def test_an_unknown_cost_is_refused_with_those_that_there_are():
    known = "params, flops, bits, latency_ms, activation_bytes, flash_bytes"
    with pytest.raises(InputError, match=f"one of {known}, energy_nj, got 'watts'"):
        problem_with(ENERGY, cost_names=("watts",))
    with pytest.raises(InputError, match=f"one of {known}, energy_nj, got 'watts'"):
        problem_with(ENERGY, budgets=Budgets(max_watts=3))
    with pytest.raises(InputError, match="flash_byte") as refusal:
        Config.load(FOLDER / "quickstart.yaml", ["netsearch.costs=[flash_byte]"])
    assert "activation_bytes or flash_bytes (did you mean flash_bytes?)" in str(refusal.value)


def test_own_costs_have_names_of_their_own_and_a_purpose():
    with pytest.raises(InputError, match="params: there is a cost of this name already"):
        known_kinds([CostKind("params", "params")])
    with pytest.raises(InputError, match="energy_nj: there is"):
        known_kinds([ENERGY, ENERGY])
    with pytest.raises(ValueError, match="a name such as energy_nj, got '2x'"):
        CostKind("2x", "x")
    with pytest.raises(InputError, match="to be minimised or to have a budget"):
        OwnCost(ENERGY, minimised=False)
    with pytest.raises(InputError, match="positive budget on energy_nj, got -1"):
        OwnCost(ENERGY, limit=-1)


def test_every_cost_has_a_key_for_its_budget_and_old_configs_stay_whole():
    config = Config.load(
        FOLDER / "quickstart.yaml",
        ["netsearch.max_activation_bytes=64k", "netsearch.max_flash_bytes=1M"],
    )
    expected = {"activation_bytes": 64_000, "flash_bytes": 1_000_000}
    assert config.netsearch.budgets.of_costs() == expected
    old = config.model_dump(mode="json")
    for name in COSTS:
        assert f"max_{name}" in old["netsearch"]
    del old["netsearch"]["max_activation_bytes"], old["netsearch"]["max_flash_bytes"]
    assert config.complete(old)["netsearch"]["max_flash_bytes"] is None


def test_amounts_of_every_cost_have_its_unit_and_an_unknown_one_its_name():
    assert amount_of(12_345, "activation_bytes") == "12,345 bytes of RAM"
    assert amount_of(0.123456, "latency_ms") == "0.1235 ms"
    assert amount_of(2.5, "energy_nj", "+") == "+2.5 energy_nj"
    assert kind_of("energy_nj").axis.name == "energy_nj"


def test_values_that_are_known_are_not_measured_again():
    stack = random_stacks(1, library())[0]
    spoilt = replace(COSTS["params"], measure=lambda network: 1 / 0)
    assert cost_of(stack, [spoilt]) == stack.cost()
    assert cost_of(stack, [ENERGY]) == stack.cost().with_values({"energy_nj": energy(stack)})
    assert isinstance(cost_of(stack, [ENERGY]), Cost)


@pytest.mark.parametrize("given", ["-1", "0", "0.0009", "nan", "1e309", "much", "2 kB"])
def test_kilobytes_that_hold_no_byte_are_refused_as_they_were_typed(given):
    assert (kilobytes("0.001"), kilobytes("64", "--max-ram-kb"), kilobytes(None)) == (
        1,
        64_000,
        None,
    )
    with pytest.raises(InputError, match=rf"--max-ram-kb: expected .*, got '{given}'"):
        kilobytes(given, "--max-ram-kb")
