"""A trained model as a file for a device: ONNX, ONNX of 8-bit integers, or a PyTorch program.

Every file is compared with the model, on real images, before it gets its name. What its input is
and what its outputs mean stands in it as `paretoblocks.preprocessing`, the JSON of `Preprocessing`:
among the metadata of an ONNX file, among the extra files of a `.pt2`.

A `.pt2` is for PyTorch alone, whose `torch.export.load` unpickles: load only files of people whom
you trust. Here only the file is loaded that was written a moment before.
"""

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.data.preprocessing import Preprocessing
from evaluation.deploy.onnx_files import RUN_BATCH, run_onnx, save_onnx, trace
from evaluation.deploy.quantize import quantize
from evaluation.errors import InputError
from evaluation.files.atomic import write_atomic

TOLERANCE = 1e-3  # of the largest |logit|; float32 in another order of summation gives about 1e-6
NAME, PREPROCESSING = "paretoblocks.name", "paretoblocks.preprocessing"
INPUT = "image"


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how its logits agree with the model's.

    Attributes:
        path: The file.
        file_bytes: Its size.
        images: How many images were compared.
        max_difference: Largest difference of two logits.
        same_top1: Of how many images the class is the same.
        float_bytes: Size of the float file that integers were made of; None of other files.
    """

    path: Path
    file_bytes: int
    images: int
    max_difference: float
    same_top1: int
    float_bytes: int | None = None


def export_onnx(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    path: Path,
    *,
    name: str,
    overwrite: bool = False,
) -> Exported:
    """Write a model as ONNX, if the file computes what the model does.

    Args:
        model: Maps (B, C, H, W) to logits (B, classes); on any device, and stays as it is.
        preprocessing: Of its images.
        images: (N, C, H, W) as `preprocessing` makes them, to compare on.
        path: The file.
        name: What the file is called by those who measure it.
        overwrite: Whether a file that exists is replaced.

    Raises:
        InputError: If the file exists, the extra is not installed, an operator does not export, or
            the file computes something else; no file is left then.
    """
    with draft(path, overwrite) as made:
        reference = _reference(model, preprocessing, images)
        save_onnx(model, {INPUT: images[:1]}, made, _metadata(preprocessing, name))
        found = check_parity(reference, run_onnx(made, images))
        return publish(made, path, reference, found)


def export_pt2(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    path: Path,
    *,
    name: str,
    overwrite: bool = False,
) -> Exported:
    """Write a model as a PyTorch program for CPUs; otherwise as `export_onnx`."""
    with draft(path, overwrite) as made:
        reference = _reference(model, preprocessing, images)
        file = io.BytesIO()
        program = trace(model, (images[:1],))
        torch.export.save(program, file, extra_files=_metadata(preprocessing, name))
        write_atomic(made, file.getvalue())
        # By a buffer: a path of another ending than .pt2 brings a warning.
        loaded = torch.export.load(io.BytesIO(made.read_bytes())).module()
        found = check_parity(reference, logits_of(loaded, images.cpu()))
        return publish(made, path, reference, found)


def export_int8(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Tensor,
    calibration: Tensor,
    path: Path,
    *,
    name: str,
    overwrite: bool = False,
) -> Exported:
    """Write a model as ONNX of 8-bit integers, see `evaluation.deploy.quantize`.

    Integers are not what the model computes: the agreement is stated, none is demanded. The float
    file that they are made of is compared as `export_onnx` does. `onnx_accuracy` tells the loss.

    Args:
        model: As in `export_onnx`, and so are the others.
        preprocessing: Of its images.
        images: (N, C, H, W), to compare on.
        calibration: (M, C, H, W), likewise made; they decide the ranges of the integers.
        path: The file.
        name: What the file is called by those who measure it.
        overwrite: Whether a file that exists is replaced.

    Raises:
        InputError: As `export_onnx`.
    """
    metadata = _metadata(preprocessing, name)
    with draft(path, overwrite) as made:
        reference = _reference(model, preprocessing, images)
        whole = made.with_name("float.onnx")
        save_onnx(model, {INPUT: images[:1]}, whole, metadata)
        check_parity(reference, run_onnx(whole, images))
        quantize(whole, calibration, made, metadata)
        found = compare_logits(reference, run_onnx(made, images))
        float_bytes = whole.stat().st_size
        return replace(publish(made, path, reference, found), float_bytes=float_bytes)


def onnx_accuracy(path: Path, images: Tensor, labels: Tensor) -> float:
    """Return the fraction in [0, 1] of images (N, C, H, W) that an ONNX file classifies rightly."""
    right = run_onnx(path, images).argmax(dim=1) == labels.cpu()
    return float(right.double().mean())


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, classes) of a model, or of a program, as it is, computed in batches."""
    return torch.cat([model(batch) for batch in torch.split(images, RUN_BATCH)])


def compare_logits(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Return the largest difference, and of how many images the class is the same.

    Raises:
        InputError: If the logits have another shape, or are not finite.
    """
    if logits.shape != reference.shape:
        raise InputError(
            f"the exported file gives logits {tuple(logits.shape)}, "
            f"the model {tuple(reference.shape)}"
        )
    for whose, values in (("model", reference), ("exported file", logits)):
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the logits of the {whose} are not all finite")
    same = reference.argmax(dim=1) == logits.argmax(dim=1)
    return float((reference - logits).abs().max()), int(same.sum())


def check_parity(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Compare the logits (N, classes) of a file with those of the model that it was made of.

    Returns:
        As `compare_logits`: the largest difference, and N.

    Raises:
        InputError: If the largest difference is above `TOLERANCE` times the largest |logit| of the
            model, the class of an image is another, or logits are not finite.
    """
    difference, same = compare_logits(reference, logits)
    allowed = TOLERANCE * float(reference.abs().max())
    if difference > allowed or same < len(reference):
        raise InputError(
            f"the exported file does not compute what the model does: on {len(reference)} images "
            f"logits differ by up to {difference:.2g} (at most {allowed:.2g} is allowed), and the "
            f"class of {len(reference) - same} is another"
        )
    return difference, same


@contextlib.contextmanager
def draft(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the path of a file beside `path` that vanishes unless `publish` renames it.

    Raises:
        InputError: If `path` is a folder, exists and may not be replaced, or cannot be written.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path} exists; give another name, or --force to replace a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    with folder as name:
        yield Path(name, path.name)


def publish(made: Path, path: Path, reference: Tensor, found: tuple[float, int]) -> Exported:
    """Give a draft its name; `found` is what the comparison with `reference` found."""
    made.replace(path)
    return Exported(path, path.stat().st_size, len(reference), *found)


def _reference(model: nn.Module, preprocessing: Preprocessing, images: Tensor) -> Tensor:
    """Return the model's own logits, computed on the CPU as the file's are."""
    expected = preprocessing.image_shape
    if len(images) == 0 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"expected images (N, *{expected}), got {tuple(images.shape)}")
    logits = logits_of(copy.deepcopy(model).eval().cpu(), images.cpu())
    classes = len(preprocessing.class_names)
    if logits.shape != (len(images), classes):
        raise ValueError(f"expected logits of {classes} classes, got {tuple(logits.shape)}")
    return logits


def _metadata(preprocessing: Preprocessing, name: str) -> dict[str, str]:
    return {NAME: name, PREPROCESSING: json.dumps(preprocessing.to_json())}
