"""Integers: which tensors become them, on what ranges, and in what file."""

import logging
import os

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from evaluation.deploy.onnx_files import onnx_session, run_onnx, save_onnx
from evaluation.deploy.quantize import CALIBRATION_BATCH, _Images, quantize

pytestmark = pytest.mark.slow  # an export takes seconds
WIDTH = 24


class Net(nn.Sequential):
    """Channels of very different scales, as trained networks have."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, 4),
        )
        scales = torch.logspace(-2, 0, WIDTH)[:, None, None, None]
        self[2].weight.data.mul_(scales)
        self[6].weight.data.div_(scales[:, 0, 0, 0])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The float file, that of integers, the images that decided the ranges, and the model."""
    folder = tmp_path_factory.mktemp("integers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = Net().eval(), torch.randn(200, 2, 6, 6)
    whole, integers = folder / "whole.onnx", folder / "integers.onnx"
    save_onnx(model, {"image": images[:1]}, whole, {})
    quantize(whole, images, integers, {"key": "value"})
    return whole, integers, images, model


@pytest.fixture(scope="module")
def graph(made):
    return onnx.load(made[1]).graph


def constants(graph):
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer}


def test_the_file_is_one_sound_dynamic_file_with_our_metadata_alone(made):
    _, path, images, _ = made
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [one.version for one in model.opset_import]) == (8, [18])
    session = onnx_session(path)
    assert session.get_modelmeta().custom_metadata_map == {"key": "value"}
    (into,), (out,) = session.get_inputs(), session.get_outputs()
    assert (into.name, into.shape, into.type) == ("image", ["batch", 2, 6, 6], "tensor(float)")
    assert (out.name, out.shape, out.type) == ("logits", ["batch", 4], "tensor(float)")
    for batch in (1, 2, 5):
        assert run_onnx(path, images[:batch]).shape == (batch, 4)
    assert sorted(one.name for one in path.parent.iterdir()) == ["integers.onnx", "whole.onnx"]


def test_weights_are_integers_of_7_bits_with_a_scale_for_each_channel(graph):
    tensors = constants(graph)
    weights = {
        node.input[0]: tensors[node.input[1]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors
    }
    kernels = {name: scale for name, scale in weights.items() if tensors[name].ndim == 4}
    assert sorted(tensors[name].shape for name in kernels) == [(24, 1, 3, 3), (24, 2, 3, 3)]
    for name, scale in kernels.items():
        assert tensors[name].dtype == np.int8
        assert scale.shape == (WIDTH,)
        # 7 bits: products of 8 and 8 bits overflow the sums of CPUs without VNNI.
        assert np.abs(tensors[name].reshape(WIDTH, -1)).max(axis=1).tolist() == [64] * WIDTH
    assert not [one for one in tensors.values() if one.dtype == np.float32 and one.size > WIDTH]


def test_activations_are_unsigned_integers_whose_range_is_that_of_the_calibration(graph, made):
    tensors = constants(graph)
    (entry,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "image")
    scale, zero = (tensors[name] for name in entry.input[1:])
    low, high = float(made[2].min()), float(made[2].max())
    assert zero.dtype == np.uint8
    assert float(scale) == pytest.approx((high - low) / 255, rel=1e-5)
    assert int(zero) == round(-low / float(scale))


def test_every_convolution_reads_and_gives_integers(graph):
    makers = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2
    for node in convolutions:
        assert {makers[name] for name in node.input} == {"DequantizeLinear"}
        readers = {other.op_type for other in graph.node if node.output[0] in other.input}
        assert readers <= {"QuantizeLinear", "Relu"}


def test_integers_come_close_to_the_float_file(made):
    whole, integers, images, _ = made
    expected, found = run_onnx(whole, images), run_onnx(integers, images)
    off = float((expected - found).square().mean().sqrt() / expected.std())
    assert 0 < off < 0.1


def test_names_within_are_short_and_each_is_given_once(graph):
    names = [name for node in graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert max(map(len, set(names) - {"logits"})) <= 3
    assert {node.name for node in graph.node} == {""}


def test_every_calibration_image_is_read_once():
    images = torch.arange(2 * CALIBRATION_BATCH + 5.0).view(-1, 1, 1, 1)
    reader, seen = _Images("image", images), []
    while (batch := reader.get_next()) is not None:
        assert set(batch) == {"image"}
        seen += batch["image"].flatten().tolist()
    assert seen == images.flatten().tolist()
    assert reader.get_next() is None


def test_quantizing_again_gives_equal_bytes_says_nothing_and_leaves_no_files(
    made, tmp_path, capfd, monkeypatch
):
    whole, integers, images, _ = made
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    handlers, before = [*logging.getLogger().handlers], sorted(os.listdir(whole.parent))
    quantize(whole, images, tmp_path / "again.onnx", {"key": "value"})
    assert (tmp_path / "again.onnx").read_bytes() == integers.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers
    assert sorted(os.listdir(whole.parent)) == before
    assert [*scratch.iterdir()] == []
