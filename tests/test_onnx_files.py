"""ONNX files: they compute what the module does, whatever it is, and say what cannot be written."""

import logging
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from blocksearch.ops import OPS, ResidualReduction, build_op
from blocksearch.space import Cell, SearchSpace
from blocksearch.supernet.cells import DiscreteCell
from evaluation.deploy.onnx_files import onnx_session, quiet, run_onnx, save_onnx, trace
from evaluation.errors import InputError

pytestmark = pytest.mark.slow  # an export takes seconds
BATCHES = (1, 2, 5)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lived_in(module):
    """Give every BatchNorm statistics, as training does: else sums of 1-bit layers tie at 0."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return module


def saved(module, shapes, folder, metadata=None):
    """Export a module whose inputs have these shapes, without the batch."""
    inputs = {f"s{number}": torch.randn(1, *shape) for number, shape in enumerate(shapes)}
    path = folder / "module.onnx"
    save_onnx(module, inputs, path, metadata or {})
    return path


def assert_same(module, shapes, path):
    session = onnx_session(path)
    for batch in BATCHES:
        inputs = [torch.randn(batch, *shape) for shape in shapes]
        fed = {f"s{number}": one.numpy() for number, one in enumerate(inputs)}
        with torch.no_grad():
            expected = module.eval()(*inputs)
        (found,) = session.run(None, fed)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


class SideBySide(nn.Module):
    """Every op side by side."""

    def __init__(self, stride, one_bit):
        super().__init__()
        self.ops = nn.ModuleList(build_op(name, 8, stride, False, one_bit) for name in OPS)

    def forward(self, x):
        return torch.cat([op(x) for op in self.ops], dim=1)


@pytest.mark.parametrize(
    ("stride", "one_bit"),
    [(2, False), (1, True), (1, False), (2, True)],
)
def test_every_op_is_exported_for_odd_and_even_sides(tmp_path, stride, one_bit):
    module, shapes = lived_in(SideBySide(stride, one_bit)), [(8, 7, 6)]
    assert_same(module, shapes, saved(module, shapes, tmp_path))


def cell(reduction, halve_first, one_bit):
    found = SearchSpace(tuple(OPS), nodes=3).random_cell(random.Random(1))
    found = Cell(found.nodes, found.inputs, found.output, one_bit)
    return DiscreteCell(found, (12, 24), 8, reduction=reduction, halve_first=halve_first)


@pytest.mark.parametrize(
    ("reduction", "halve_first", "one_bit"),
    [
        (True, False, False),
        (False, True, True),
    ],
)
def test_a_cell_is_exported_with_its_two_inputs(tmp_path, reduction, halve_first, one_bit):
    side = 16 if halve_first else 8
    module, shapes = lived_in(cell(reduction, halve_first, one_bit)), [(12, side, side), (24, 8, 8)]
    path = saved(module, shapes, tmp_path)
    assert [one.name for one in onnx_session(path).get_inputs()] == ["s0", "s1"]
    assert_same(module, shapes, path)


def test_an_input_that_the_module_does_not_read_stays_an_input(tmp_path):
    module, shapes = lived_in(ResidualReduction(8, 12, searching=False)), [(8, 6, 6)] * 2
    assert_same(module, shapes, saved(module, shapes, tmp_path))


def small():
    return lived_in(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
    )


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("small")
        return saved(small(), [(3, 6, 6)], folder, {"a": "b c", "paretoblocks.name": "é"})


def test_a_file_is_one_file_that_onnx_runtime_1_20_reads(small_file):
    assert list(small_file.parent.iterdir()) == [small_file]
    model = onnx.load(small_file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    assert {weight.data_location for weight in model.graph.initializer} == {0}


def test_a_file_carries_our_metadata_and_no_path_of_the_machine(small_file):
    stored = onnx_session(small_file).get_modelmeta().custom_metadata_map
    assert stored == {"a": "b c", "paretoblocks.name": "é"}
    data = small_file.read_bytes()
    for place in (Path(__file__), Path(torch.__file__), Path.cwd()):
        assert str(place.parent).encode() not in data
    assert b"stack_trace" not in data


def test_inputs_and_outputs_have_their_names_and_a_dynamic_batch(small_file):
    session = onnx_session(small_file)
    (into,), (out,) = session.get_inputs(), session.get_outputs()
    assert (into.name, into.shape, into.type) == ("s0", ["batch", 3, 6, 6], "tensor(float)")
    assert (out.name, out.shape) == ("logits", ["batch", 5])


def test_equal_modules_give_equal_bytes_and_are_left_as_they_are(small_file, tmp_path):
    torch.manual_seed(0)
    module = small().to(memory_format=torch.channels_last).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    again = saved(module, [(3, 6, 6)], tmp_path, {"a": "b c", "paretoblocks.name": "é"})
    assert again.read_bytes() == small_file.read_bytes()
    assert module.training and all(one.training for one in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_images_are_run_in_batches_and_none_is_lost(small_file):
    torch.manual_seed(0)
    module, images = small().eval(), torch.randn(600, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(small_file, images), module(images))


class Decomposed(nn.Module):
    """An operator that ONNX has nothing for."""

    def forward(self, x):
        return torch.linalg.qr(x.flatten(2))[0].flatten(1)


class Branch(nn.Module):
    """What is computed depends on the data."""

    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class FixedBatch(nn.Module):
    """Takes two images and no other number."""

    def forward(self, x):
        return x + torch.ones(2, 3, 4, 4)


class Summed(nn.Module):
    """One output for all images."""

    def forward(self, x):
        return x.sum()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Decomposed(), r"Sequential does not export to ONNX: .*aten\.linalg_qr"),
        (Branch(), r"Sequential does not export: in Branch \(test_onnx_files\.py, line \d+\)"),
        (FixedBatch(), "Sequential does not export: its batch cannot vary"),
        (Summed(), "expected a first axis of any size, the batch, of 'logits'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_does_not_export_is_named_and_leaves_nothing(tmp_path, capfd, module, words):
    network = nn.Sequential(nn.Identity(), module)
    with pytest.raises(InputError, match=words):
        saved(network, [(3, 4, 4)], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_an_export_says_nothing_and_leaves_logging_as_it_was(tmp_path, capfd):
    handlers, disabled = [*logging.getLogger().handlers], logging.root.manager.disable
    saved(nn.Sequential(nn.ReLU()), [(3, 4, 4)], tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == disabled


def test_quiet_ends_with_an_exception_too(capsys):
    with pytest.raises(KeyError), quiet():
        print("hidden")
        raise KeyError
    print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert logging.root.manager.disable == logging.NOTSET


def test_a_traced_program_takes_any_batch_and_holds_no_path():
    module = small().eval()
    program = trace(module, (torch.randn(1, 3, 6, 6),))
    for batch in BATCHES:
        images = torch.randn(batch, 3, 6, 6)
        assert torch.equal(program.module()(images), module(images))
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_an_export_names_the_missing_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"the extra 'onnx' is not installed; pip install"):
        saved(nn.ReLU(), [(3, 4, 4)], tmp_path)


def test_running_names_the_missing_extra(small_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"the extra 'onnx' is not installed; pip install"):
        onnx_session(small_file)


@pytest.mark.parametrize("damage", ["missing", "no ONNX", "cut", "empty"])
def test_a_file_that_is_no_onnx_file_is_named(small_file, tmp_path, damage):
    path, whole = tmp_path / "damaged.onnx", small_file.read_bytes()
    contents = {"no ONNX": b"words, and no model", "cut": whole[: len(whole) // 2], "empty": b""}
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(InputError, match=r"damaged\.onnx: (not|expected) an ONNX file"):
        onnx_session(path)


def test_threads_are_those_asked_for(small_file):
    options = onnx_session(small_file, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    images = np.zeros((1, 3, 6, 6), np.float32)
    assert onnx_session(small_file).run(None, {"s0": images})[0].shape == (1, 5)
