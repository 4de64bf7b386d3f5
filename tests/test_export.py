"""Exported files compute what the model does, say what their input is, and never stay half-made."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from blocksearch.nas_bench_201 import SPACE as NAS_BENCH_201
from blocksearch.ops import DARTS_OPS, LIGHT_OPS, OPS
from blocksearch.space import Cell, SearchSpace
from blocksearch.supernet.stack import PlacedCell, Stack
from evaluation.data.preprocessing import Preprocessing
from evaluation.deploy import export
from evaluation.deploy.export import (
    TOLERANCE,
    Exported,
    check_parity,
    compare_logits,
    export_int8,
    export_onnx,
    export_pt2,
    onnx_accuracy,
)
from evaluation.deploy.onnx_files import onnx_session, run_onnx, save_onnx, trace
from evaluation.errors import InputError
from netsearch.space.genome import NetworkSpec, Stage
from netsearch.space.network import builder

BATCHES = (1, 2, 5)
SPACES = {
    "light": SearchSpace(LIGHT_OPS, nodes=2),
    "DARTS": SearchSpace(DARTS_OPS, nodes=2),
    "all": SearchSpace(tuple(OPS), nodes=1),  # an export takes seconds
    "NAS-Bench-201": NAS_BENCH_201,
}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(image_shape, classes, space, one_bit):
    """A network of random cells, with statistics in its BatchNorms as after training."""
    draw = random.Random(0)
    cells = {name: SPACES[space].random_cell(draw) for name in ("n0", "n1", "r0")}
    cells = {name: Cell(one.nodes, one.inputs, one.output, one_bit) for name, one in cells.items()}
    if space == "NAS-Bench-201":  # its cells never reduce
        normal = [PlacedCell(cells["n0"], 4, False), PlacedCell(cells["n1"], 8, False)]
        placed = (normal[0], PlacedCell(None, 8, True), normal[1])
        model = Stack(placed, image_shape, classes)()
    else:
        spec = NetworkSpec((Stage("n0", 1, 4), Stage("n1", 1, 8)), ("r0",))
        model = builder(spec, cells, image_shape, classes)()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model


def preprocessing_of(image_shape, classes):
    channels = image_shape[0]
    names = tuple(f"class {number}" for number in range(classes))
    return Preprocessing(image_shape, (0.4,) * channels, (0.2,) * channels, names)


def onnx_logits(path, images):
    return run_onnx(path, images)


def pt2_logits(path, images):
    return torch.export.load(path).module()(images)


FORMATS = {"model.onnx": (export_onnx, onnx_logits), "model.pt2": (export_pt2, pt2_logits)}
SHAPES = ((1, 8, 8), (3, 9, 11), (3, 96, 96))
EXPORTED = [  # every shape with all ops, every space, both formats, and 1-bit layers in each
    *((shape, 100, "all", False, "model.onnx") for shape in SHAPES),
    ((3, 32, 32), 2, "NAS-Bench-201", False, "model.onnx"),
    ((3, 32, 32), 7, "DARTS", False, "model.onnx"),
    ((3, 32, 32), 10, "light", False, "model.onnx"),
    ((3, 32, 32), 10, "light", False, "model.pt2"),
    ((3, 32, 32), 101, "all", True, "model.onnx"),
    ((3, 32, 32), 10, "all", True, "model.pt2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "classes", "space", "one_bit", "form"), EXPORTED)
def test_a_network_is_exported_and_equal(tmp_path, shape, classes, space, one_bit, form):
    to_file, logits_of = FORMATS[form]
    model, images = network(shape, classes, space, one_bit), torch.randn(16, *shape)
    inputs = preprocessing_of(shape, classes)
    done = to_file(model, inputs, images, tmp_path / "new" / form, name="an id")
    assert [*done.path.parent.iterdir()] == [tmp_path / "new" / form] == [done.path]
    assert done.file_bytes == done.path.stat().st_size
    assert (done.images, done.same_top1) == (16, 16)
    model.eval()
    for batch in BATCHES:
        fresh = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = model(fresh)
        found = logits_of(done.path, fresh).detach()
        assert found.shape == (batch, classes)
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


SHAPE, CLASSES = (1, 8, 8), 2
INPUTS = preprocessing_of(SHAPE, CLASSES)


class Plain(nn.Sequential):
    """A small network with enough weights for integers to pay."""

    def __init__(self, width=48):
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, CLASSES),
        )


@pytest.fixture(scope="module")
def trained(period_batch):
    """A model that learned to tell rows from columns; images and labels that it did not see."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Plain()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(40):
            images, labels = period_batch(128, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model, *period_batch(400, 1000)


@pytest.fixture(scope="module")
def untrained(period_batch):
    """A model that is asked to be written and is not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(), *period_batch(400, 1000)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory, period_batch):
    """What each format makes of the trained model, by its suffix."""
    model, images, _ = trained
    folder, calibration = tmp_path_factory.mktemp("files"), period_batch(128, 2000)[0]
    about = model, INPUTS, images
    return {
        "onnx": export_onnx(*about, folder / "a.onnx", name="an id"),
        "pt2": export_pt2(*about, folder / "a.pt2", name="an id"),
        "int8": export_int8(*about, calibration, folder / "a.int8.onnx", name="an id"),
    }


@pytest.mark.slow
def test_the_accuracy_of_a_file_is_that_of_its_model(files, trained):
    model, images, labels = trained
    with torch.no_grad():
        right = (model.eval()(images).argmax(dim=1) == labels).double().mean()
    assert float(right) > 0.9
    assert onnx_accuracy(files["onnx"].path, images, labels) == float(right)
    assert onnx_accuracy(files["onnx"].path, images, 1 - labels) == pytest.approx(1 - float(right))


@pytest.mark.slow
def test_integers_make_a_smaller_file_that_still_classifies(files, trained):
    _, images, labels = trained
    integers, whole = files["int8"], files["onnx"]
    assert integers.float_bytes == whole.file_bytes
    assert integers.file_bytes < 0.45 * whole.file_bytes
    before = onnx_accuracy(whole.path, images, labels)
    assert onnx_accuracy(integers.path, images, labels) > before - 0.03
    agree = run_onnx(whole.path, images).argmax(1) == run_onnx(integers.path, images).argmax(1)
    assert integers.same_top1 == int(agree.sum()) > 0.97 * len(images)
    assert integers.max_difference > whole.max_difference


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "int8"])
def test_an_onnx_file_says_what_its_input_and_outputs_are(files, form):
    session = onnx_session(files[form].path)
    stored = session.get_modelmeta().custom_metadata_map
    assert set(stored) == {"paretoblocks.name", "paretoblocks.preprocessing"}
    assert stored["paretoblocks.name"] == "an id"
    assert Preprocessing.from_json(json.loads(stored["paretoblocks.preprocessing"])) == INPUTS
    (into,), (out,) = session.get_inputs(), session.get_outputs()
    assert (into.name, into.shape, into.type) == ("image", ["batch", *SHAPE], "tensor(float)")
    assert (out.name, out.shape, out.type) == ("logits", ["batch", CLASSES], "tensor(float)")


@pytest.mark.slow
def test_a_program_says_what_its_input_and_outputs_are(files):
    stored = {"paretoblocks.name": "", "paretoblocks.preprocessing": ""}
    torch.export.load(files["pt2"].path, extra_files=stored)
    assert stored["paretoblocks.name"] == "an id"
    assert Preprocessing.from_json(json.loads(stored["paretoblocks.preprocessing"])) == INPUTS


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_integers_take_any_batch_and_give_each_image_the_same(files, trained, batch):
    session = onnx_session(files["int8"].path)
    images = trained[1][:5].numpy()
    (together,) = session.run(None, {"image": images})
    (some,) = session.run(None, {"image": images[:batch]})
    np.testing.assert_allclose(some, together[:batch], rtol=1e-5, atol=1e-5)


def wrong_weights(model):
    model[-1].weight.data[0, :3] += 1.0


def not_a_number(model):
    model[-1].bias.data[0] = float("nan")


def damaged(monkeypatch, damage):
    """What is written is not the model."""

    def changed(model):
        other = Plain()
        other.load_state_dict(model.state_dict())
        damage(other)
        return other

    monkeypatch.setattr(export, "save_onnx", lambda model, *rest: save_onnx(changed(model), *rest))
    monkeypatch.setattr(export, "trace", lambda model, *rest: trace(changed(model), *rest))


def calls(trained):
    """Each format as a function of a path and keywords."""
    about = trained[0], INPUTS, trained[1]
    return {
        "onnx": lambda path, **more: export_onnx(*about, path, name="an id", **more),
        "pt2": lambda path, **more: export_pt2(*about, path, name="an id", **more),
        "int8": lambda path, **more: export_int8(*about, about[2], path, name="an id", **more),
    }


OTHER_CLASSES = r"not compute what the model does: on 400 images .* class of \d+ is another"
NOT_FINITE = "the logits of the exported file are not all finite"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "damage", "words"),
    [
        ("onnx", wrong_weights, OTHER_CLASSES),
        ("pt2", wrong_weights, OTHER_CLASSES),
        ("int8", wrong_weights, OTHER_CLASSES),
        ("onnx", not_a_number, NOT_FINITE),
    ],
)
def test_a_wrong_file_does_not_stay(trained, tmp_path, monkeypatch, form, damage, words):
    damaged(monkeypatch, damage)
    with pytest.raises(InputError, match=words):
        calls(trained)[form](tmp_path / "new")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_wrong_file_leaves_the_one_before_as_it_is(trained, tmp_path, monkeypatch):
    damaged(monkeypatch, wrong_weights)
    kept = tmp_path / "kept"
    kept.write_text("the file before")
    with pytest.raises(InputError, match=OTHER_CLASSES):
        calls(trained)["pt2"](kept, overwrite=True)
    assert [*tmp_path.iterdir()] == [kept]
    assert kept.read_text() == "the file before"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2", "int8"])
def test_a_file_that_exists_is_replaced_only_if_asked_and_nothing_is_said(
    trained, tmp_path, capfd, form
):
    path = tmp_path / "there"
    path.write_text("precious")
    with pytest.raises(InputError, match=f"{path} exists; .*--force"):
        calls(trained)[form](path)
    assert path.read_text() == "precious"
    done = calls(trained)[form](path, overwrite=True)
    assert path.stat().st_size == done.file_bytes > 1000
    assert [*tmp_path.iterdir()] == [path]
    assert capfd.readouterr() == ("", "")


def test_a_folder_is_never_replaced(untrained, tmp_path):
    with pytest.raises(InputError, match="exists"):
        calls(untrained)["onnx"](tmp_path, overwrite=True)


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"file/a\.onnx: cannot be written"):
        calls(trained)["onnx"](tmp_path / "file" / "a.onnx")


@pytest.mark.slow
def test_a_model_that_does_not_export_leaves_nothing(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(*Plain(), Branch())
    for to_file in (export_onnx, export_pt2):
        with pytest.raises(InputError, match=r"in Branch \(test_export\.py"):
            to_file(model, INPUTS, torch.randn(4, *SHAPE), tmp_path / "a", name="x")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "package"), [("onnx", "onnxscript"), ("int8", "onnx"), ("int8", "onnxruntime")]
)
def test_the_missing_extra_is_named(untrained, tmp_path, monkeypatch, form, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match="the extra 'onnx' is not installed"):
        calls(untrained)[form](tmp_path / "a")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("images", "classes"), [(torch.ones(4, 3, 8, 8), 2), (torch.ones(0, *SHAPE), 2), (None, 3)]
)
def test_what_is_said_of_a_model_must_fit_it(untrained, tmp_path, images, classes):
    images = untrained[1] if images is None else images
    with pytest.raises(ValueError, match="expected"):
        export_onnx(
            untrained[0], preprocessing_of(SHAPE, classes), images, tmp_path / "a", name="x"
        )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_the_model_is_left_as_it_is(trained, tmp_path):
    model = Plain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_pt2(model, INPUTS, trained[1], tmp_path / "a.pt2", name="x")
    assert all(one.training for one in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_equal_models_give_equal_files(trained, files, tmp_path):
    again = calls(trained)["onnx"](tmp_path / "b.onnx")
    assert again.path.read_bytes() == files["onnx"].path.read_bytes()
    assert calls(trained)["pt2"](tmp_path / "a.pt2") == Exported(
        tmp_path / "a.pt2", files["pt2"].file_bytes, 400, 0.0, 400
    )


REFERENCE = torch.tensor([[10.0, 0.0, -3.0], [1.0, 1.001, -10.0]])


def test_parity_is_the_largest_difference_and_how_many_classes_are_the_same():
    other = REFERENCE + torch.tensor([[0.0, 0.002, 0.0], [0.0, 0.0, -0.005]])
    difference, same = check_parity(REFERENCE, other)
    assert (difference, same) == (pytest.approx(0.005, rel=1e-3), 2)
    other[0] = torch.tensor([0.0, 20.0, -3.0])
    assert compare_logits(REFERENCE, other) == (20.0, 1)


def changed(row, column, by):
    logits = REFERENCE.clone()
    logits[row, column] += by
    return logits


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (changed(0, 2, 2 * 10 * TOLERANCE), r"by up to 0\.02 \(at most 0\.01 .* of 0 is another"),
        (changed(1, 0, 0.002), r"by up to 0\.002 .* of 1 is another"),
        (changed(0, 1, float("nan")), "exported file are not all finite"),
        (changed(0, 1, float("inf")), "exported file are not all finite"),
        (REFERENCE[:1], r"gives logits \(1, 3\), the model \(2, 3\)"),
    ],
    ids=["too far", "another class", "NaN", "infinity", "another shape"],
)
def test_a_file_of_other_logits_fails(logits, words):
    assert check_parity(REFERENCE, REFERENCE) == (0.0, 2)
    with pytest.raises(InputError, match=words):
        check_parity(REFERENCE, logits)


def test_a_model_without_finite_logits_fails_too():
    logits = changed(0, 1, float("nan"))
    with pytest.raises(InputError, match="logits of the model are not all finite"):
        check_parity(logits, logits)
