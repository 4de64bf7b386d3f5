"""From a float ONNX file to one of 8-bit integers: static quantization by ONNX Runtime.

Each weight becomes an 8-bit integer with a scale for each output channel, each activation one with
a scale and a zero point, which the least and the largest value on calibration images decide.
Inputs and outputs of the file stay float32. The integers stand in the file as pairs of
`QuantizeLinear` and `DequantizeLinear` (QDQ), which runtimes fuse with the operators in between.

Weights use 7 of their 8 bits, so that sums of products do not overflow on CPUs without VNNI.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.deploy.onnx_files import finished, quiet
from evaluation.errors import not_installed
from evaluation.files.atomic import write_atomic

CALIBRATION_BATCH = 64


def quantize(source: Path, calibration: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float ONNX file as one of 8-bit integers; the batch stays dynamic.

    Args:
        source: A file as `evaluation.deploy.onnx_files.save_onnx` writes it, of one input.
        calibration: Images (M, C, H, W) as the file takes them.
        path: The file to write; an existing one is replaced.
        metadata: Entries of its `metadata_props`.

    Raises:
        InputError: If the extra is not installed.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise not_installed("onnx", "quantization") from error
    model = onnx.load(source, load_external_data=False)
    reader = _Images(model.graph.input[0].name, calibration)
    with tempfile.TemporaryDirectory() as folder, quiet():
        quantized = Path(folder, "quantized.onnx")
        quantization.quantize_static(
            model,
            quantized,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        model = onnx.load(quantized, load_external_data=False)
    _shorten_names(model.graph)
    write_atomic(path, finished(model, metadata))


class _Images:
    """What ONNX Runtime calls a calibration data reader."""

    def __init__(self, name: str, images: Tensor):
        self._name = name
        self._batches = iter(torch.split(images.cpu(), CALIBRATION_BATCH))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch by the name of the input, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.contiguous().numpy()}


def _shorten_names(graph: Any) -> None:
    """Number the tensors within: in a small network the quantizer's names outweigh the weights."""
    short = {value.name: value.name for value in (*graph.input, *graph.output)}
    short[""] = ""  # an optional input that is not given
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"{len(short)}") for name in names]
    for weight in graph.initializer:
        weight.name = short[weight.name]
