"""`Own`: a user's parts reach the search by reference, and what cannot work is refused at once."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import tiny_run
from blocksearch import batch_norm
from blocksearch.library import BlockLibrary
from blocksearch.ops import Op
from blocksearch.own_op import check_own_op
from blocksearch.space import Cell, Edge, SearchSpace
from blocksearch.supernet.cells import DiscreteCell
from blocksearch.supernet.stack import PlacedCell, Stack
from configs import FOLDER
from configs.experiment import Config
from configs.own import Own
from evaluation.cost.kind import CostKind
from evaluation.data.config import DataConfig
from evaluation.data.dataset import Dataset, OwnImages
from evaluation.deploy.formats import Format
from evaluation.errors import InputError
from evaluation.files.archive import Archive
from evaluation.files.run_folder import RunFolder
from evaluation.records import Cost, ModelRecord
from evaluation.training.context import RunContext
from netsearch.estimators.own import judge
from netsearch.members.saved import load_network
from netsearch.space.problem import OwnCost
from run_pipeline import Pipeline

QUICKSTART = FOLDER / "quickstart.yaml"


class Twice(nn.Module):
    """Doubles what comes, at the resolution that the stride asks for."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return 2 * x[:, :, :: self.stride, :: self.stride]


class Change(nn.Module):
    """Applies a function, whatever the stride."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def no_backward(x):
    y = x * 1.0
    y.register_hook(fail)
    return y


def fail(grad):
    raise RuntimeError("no way back")


ENERGY = CostKind("energy_nj", "nJ", measure=lambda network: network.cost().flops / 2, whole=False)


def twice(channels, stride, searching):
    return Twice(stride)


def by_size(network, context, seed):
    return 1 - 1 / network.cost().params


def images():
    labels = np.arange(60) % 3
    return Dataset.from_arrays(
        np.full((60, 8, 8), 40 * labels[:, None, None], np.uint8) + noise(), labels
    )


def noise():
    return np.random.default_rng(0).integers(0, 40, (60, 8, 8), dtype=np.uint8)


OPS = {"twice": twice}


def conv(channels, stride, searching):
    return nn.Conv2d(channels, channels, 3, stride, 1)


def test_a_cell_keeps_the_builders_of_its_own_ops_and_only_those():
    space = SearchSpace(("none", "twice", "skip_connect"), nodes=1, own=tuple(OPS.items()))
    cell = space.cell([(Edge(0, "twice"), Edge(1, "skip_connect"))])
    assert cell.own == (("twice", twice),)
    assert space.cell([(Edge(0, "skip_connect"),)]).own == ()
    assert Cell.from_json(cell.to_json(), space.own) == cell
    assert "own" not in repr(cell) and "own" not in json.dumps(cell.to_json())
    found = DiscreteCell(cell, (4, 4), 4, reduction=False, halve_first=False)
    assert isinstance(found.edges[0].body, Twice)
    with pytest.raises(ValueError, match=r"or an own one, got 'twice'"):
        DiscreteCell(Cell.from_json(cell.to_json()), (4, 4), 4, reduction=False, halve_first=False)


def test_two_builders_of_one_name_make_two_networks():
    def thrice(channels, stride, searching):
        return nn.Sequential(Twice(stride), nn.Conv2d(channels, channels, 1))

    spaces = [SearchSpace(("twice",), nodes=1, own=(("twice", one),)) for one in (twice, thrice)]
    one, other = (space.cell([(Edge(0, "twice"),)]) for space in spaces)
    assert one != other and hash(one) != hash(other) and one.id == other.id


def whole_run(folder):
    """Run with an own op, own images and an own estimator."""
    own = Own(ops=OPS, estimators={"by_size": by_size}, data=images)
    changes = [
        *tiny_run.TINY,
        "data.name=own",
        "blocksearch.ops=[none, twice, ghost_3x3]",
        "netsearch.estimate=by_size",
        "retrain.train.epochs=1",
    ]
    config = Config.load(QUICKSTART, changes, own)
    console = Console(file=io.StringIO())
    run = Pipeline(config, RunFolder(folder), "own", console=console)
    run.run()
    return run


@pytest.mark.slow
def test_a_whole_run_of_own_parts_is_opened_again_with_them(tmp_path):
    run = whole_run(tmp_path / "run")
    library = BlockLibrary.load(run.folder, tuple(OPS.items()))
    assert any(cell.own for cell in library.cells.values())
    networks = {r.id: r for r in Archive(run.folder.path / "archive.jsonl")}
    assert all(r.valid_accuracy == 1 - 1 / r.cost.params for r in networks.values())
    (record,) = run.members.retrained()
    weights = run.members.weights(record)
    again = Pipeline.open(
        run.folder.path, own=Own(ops=OPS, estimators={"by_size": by_size}, data=images)
    )
    assert again.dataset.fingerprint == run.dataset.fingerprint
    assert again.export(record, Format.WEIGHTS, tmp_path / "out.safetensors").file.same_top1
    used = {
        edge.op for name in record.blocks for node in library.cells[name].nodes for edge in node
    }
    if "twice" in used:
        with pytest.raises(InputError, match="or an own one, got 'twice'"):
            load_network(weights)
    network, preprocessing = load_network(weights, ops=OPS)
    assert network(torch.zeros(1, *preprocessing.image_shape)).shape == (1, 3)
    with pytest.raises(InputError, match=r"of its own \(op twice, estimator by_size, data\)"):
        Pipeline.open(run.folder.path)
    assert "Pipeline.open(folder, own=own)" in run.members.export_command(record)
    more = Own(ops=OPS, estimators={"by_size": by_size}, data=images, costs=(OwnCost(ENERGY),))
    other = Pipeline(Config.load(run.folder.config, own=more), run.folder, console=run.console)
    with pytest.raises(InputError, match=r"own parts: .*; now .*cost energy_nj \(minimised\)"):
        other.run()
    thrice = Own(ops={"twice": conv}, estimators={"by_size": by_size}, data=images)
    changed = Pipeline.open(run.folder.path, own=thrice)
    if "twice" in used:
        library = BlockLibrary.load(run.folder, thrice.builders)
        with pytest.raises(InputError, match="an own op has changed"):
            changed.retrain(list(run.members.outcome.front), library)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": {"none": twice}}, "own op none: this name is taken"),
        ({"ops": {"a/b": twice}}, r"own op: expected a name such as wide_conv_3x3 .*'a/b'"),
        ({"ops": {"twice": 3}}, "own op twice: expected a callable, got 3"),
        ({"strategies": {"darts": int}}, "own strategy darts: this name is taken"),
        ({"estimators": {"proxy": by_size}}, "own estimator proxy: this name is taken"),
        ({"data": 3}, "own data: expected a callable, got 3"),
        ({"ops": {"true": twice}}, "own op: expected a name such as .*, got 'true'"),
        ({"ops": [twice]}, "own ops: expected a table of names and parts"),
        ({"strategies": {"mine": twice}}, "own strategy mine: expected a class of the protocol"),
        ({"costs": [ENERGY]}, "own costs: expected a tuple of OwnCost"),
        ({"costs": (OwnCost(replace(ENERGY, name="params")),)}, "params: there is a cost of this"),
    ],
)
def test_a_wrong_name_or_part_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Own(**changes)


def test_what_cannot_travel_is_refused_with_the_reason():
    lock = (one for one in "generators do not pickle")
    for changes in ({"ops": {"locked": lambda *size: lock}}, {"data": lambda: lock}):
        with pytest.raises(InputError, match=r"own (op locked|data): it cannot be pickled.*Type"):
            Own(**changes)


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (
            lambda c, stride, searching: nn.Conv2d(c, c, 3, 1, 1),
            r"\(2, 8, 9, 7\), expected \(2, 8, 5, 4\)",
        ),
        (
            lambda c, stride, searching: nn.Conv2d(c, 4, 1, stride),
            r"\(2, 4, 9, 7\), expected \(2, 8",
        ),
        (lambda c, stride: nn.Identity(), "TypeError: .* takes 2 positional"),
        (lambda c, stride, searching: None, r"op odd\(8, 1, True\): expected an nn.Module"),
        (
            lambda c, stride, searching: nn.Conv2d(c, c, 1, stride),
            r"8, 2, .* blocksearch.GridConv2d",
        ),
        (
            lambda c, stride, searching: Change(lambda x: x.double()),
            "float32 on cpu, got .*float64",
        ),
        (lambda c, stride, searching: Change(lambda x: x / 0), "its output is not finite"),
        (lambda c, stride, searching: Change(lambda x: x.mul_(2)), "it changes its input"),
        (lambda c, stride, searching: Change(lambda x: 1), "expected to return a tensor, got int"),
        (lambda c, stride, searching: Change(no_backward), "RuntimeError: no way back"),
        (
            lambda c, stride, searching: Op(Twice(stride), nn.BatchNorm2d(c), relu=True),
            r"must be batch_norm\(channels, searching\)",
        ),
    ],
)
def test_an_op_that_breaks_the_rules_is_refused_before_the_search(builder, message):
    with pytest.raises(InputError, match=message):
        check_own_op("odd", builder, 8)
    check_own_op("fine", twice, 8)
    check_own_op(
        "norm", lambda c, s, searching: Op(Twice(s), batch_norm(c, searching), relu=True), 8
    )


def test_own_images_and_data_name_own_go_together():
    with pytest.raises(InputError, match=r"data.name: own goes with images .*; got none"):
        Config.load(QUICKSTART, ["data.name=own"])
    with pytest.raises(InputError, match=r"got data.name: digits in the config"):
        Config.load(QUICKSTART, [], Own(data=images))


def test_images_that_are_none_are_refused():
    with pytest.raises(InputError, match="own images: expected a Dataset, such as .*, got list"):
        OwnImages(lambda: [])()
    with pytest.raises(InputError, match="own images: ZeroDivisionError"):
        OwnImages(lambda: 1 / 0)()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((9, 8, 8))},
            r"train_images: expected uint8 .*got float64 \(9, 8, 8\)",
        ),
        ({"labels": np.zeros(8, int)}, r"train_labels: expected an integer for each of 9 images"),
        ({"valid_fraction": 1.0}, "valid_fraction: expected more than 0 and less than 1, got 1.0"),
        ({"labels": np.arange(9) % 3 * 2}, "labels from 0 up without a gap"),
    ],
)
def test_arrays_that_are_no_images_are_refused(changes, message):
    given = {
        "images": np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8),
        "labels": np.arange(9) % 3,
    }
    with pytest.raises(InputError, match=message):
        Dataset.from_arrays(**{**given, **changes})


def test_arrays_are_divided_as_a_file_of_them_is():
    whole = Dataset.from_arrays(
        noise(), np.arange(60) % 3, test=(noise()[:6] // 2, np.arange(6) % 3)
    )
    assert len(whole.test) == 6 and len(whole.train) == 60 and len(whole.search_valid) == 15
    assert whole.class_names == ("0", "1", "2") and whole.image_shape == (1, 8, 8)


def test_an_own_estimator_gives_an_accuracy_or_fails_for_that_network(tmp_path):
    context = RunContext(DataConfig(), 0, "cpu", tmp_path / "metrics.jsonl")
    record = ModelRecord("a", (1,), ("n",), Cost(1, 2), 0)
    for found in (0.5, np.float32(0.5), torch.tensor(0.5)):
        assert judge(record, None, context, lambda *_, f=found: f).valid_accuracy == 0.5
    for found, why in ((math.nan, "ValueError: the accuracy is NaN"), (None, "TypeError")):
        assert judge(record, None, context, lambda *_, f=found: f).failure.startswith(why)
    with pytest.raises(InputError, match=r"network a: expected an accuracy in \[0, 1\], got 1.5"):
        judge(record, None, context, lambda *_: 1.5)


def test_a_cost_that_raises_is_named_with_its_network():
    kind = replace(ENERGY, measure=lambda network: network.nothing)
    with pytest.raises(InputError, match="energy_nj of network .*: AttributeError"):
        kind.of(Stack((PlacedCell(None, 4, True),), (1, 8, 8), 2))


def test_an_unknown_estimator_is_told_with_those_that_there_are():
    with pytest.raises(InputError, match=r"estimate: expected proxy or shared_weights, got 'size'"):
        Config.load(QUICKSTART, ["netsearch.estimate=size"])
    own = Own(estimators={"by_size": by_size})
    with pytest.raises(InputError, match=r"proxy, shared_weights or by_size \(did you mean"):
        Config.load(QUICKSTART, ["netsearch.estimate=bysize"], own)


def test_own_names_survive_the_copies_of_a_config():
    own = Own(ops=OPS)
    config = Config.load(QUICKSTART, ["blocksearch.ops=[none, twice]"], own)
    assert config.comparing("darts", 2).blocksearch.space.own == tuple(OPS.items())
    assert config.with_images("elsewhere").own is own
    assert config.complete(config.model_dump(mode="json")) == config.model_dump(mode="json")
