"""A trained member of the front as a file for a device, in each of the formats."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocksearch.space import OwnOps
from blocksearch.supernet.stack import CellNetwork
from evaluation.cost.device_latency import Timing
from evaluation.cost.latency import measure_onnx_ms
from evaluation.data.batches import batches
from evaluation.data.dataset import Split
from evaluation.data.preprocessing import Preprocessing
from evaluation.deploy.export import (
    Exported,
    check_parity,
    draft,
    export_int8,
    export_onnx,
    export_pt2,
    logits_of,
    onnx_accuracy,
    publish,
)
from evaluation.deploy.formats import Format
from evaluation.errors import InputError
from evaluation.training.loop import accuracy
from netsearch.members.saved import load_network

COMPARED = 512  # images on which a file is compared with the model, where there are so many
CALIBRATED = 256  # images that decide the ranges of integers, likewise


@dataclass(frozen=True)
class Delivered:
    """An exported file, with what a user asks first.

    Attributes:
        id: Of the member.
        file: The file, and how it agrees with the model.
        latency: In ONNX Runtime on this device, one thread, batch 1; None of other formats.
        accuracies: On the validation split, of the model and of the integers; None of floats.
    """

    id: str
    file: Exported
    latency: Timing | None = None
    accuracies: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"id": self.id, **asdict(self.file), "path": str(self.file.path)} | {
            "latency_ms": self.latency and self.latency.median_ms,
            "latency_spread_ms": self.latency and self.latency.spread_ms,
            "accuracy_before": self.accuracies and self.accuracies[0],
            "accuracy_after": self.accuracies and self.accuracies[1],
        }


def deliver(
    weights: Path,
    valid: Split,
    form: Format,
    path: Path,
    *,
    name: str,
    overwrite: bool,
    own: OwnOps = (),
) -> Delivered:
    """Export a member from the file of its weights, compared with the model on real images.

    Args:
        weights: As a retraining leaves them.
        valid: The validation split; retraining learned from it too, so its accuracies are for
            comparing two files, not for judging one.
        form: Of the file.
        path: The file; nothing is left there if it cannot be written or computes something else.
        name: Id of the member.
        overwrite: Whether a file that exists is replaced.
        own: A user's own ops.

    Raises:
        InputError: If a file cannot be read or written, an operator does not export, an extra is
            not installed, or the file computes something else.
    """
    network, preprocessing = load_network(weights, own)
    images = _images(valid)
    about = (network, preprocessing, images[:COMPARED])
    if form is Format.WEIGHTS:
        return Delivered(name, _export_weights(weights, *about, path, overwrite, own))
    if form is Format.PT2:
        return Delivered(name, export_pt2(*about, path, name=name, overwrite=overwrite))
    if form is Format.ONNX:
        file = export_onnx(*about, path, name=name, overwrite=overwrite)
        return Delivered(name, file, measure_onnx_ms(path))
    calibration, called = images[-CALIBRATED:], form.name_of(name)
    file = export_int8(*about, calibration, path, name=called, overwrite=overwrite)
    accuracies = accuracy(network, valid.to("cpu")), onnx_accuracy(path, images, valid.labels)
    return Delivered(name, file, measure_onnx_ms(path), accuracies)


def check_images(
    weights: Path, given: Preprocessing, place: str, hint: str, own: OwnOps = ()
) -> None:
    """Refuse images of another form than those that a member has learned from.

    Args:
        weights: Of the member.
        given: Of the images at hand.
        place: Where they are, for the message.
        hint: With which the message ends.
        own: A user's own ops.

    Raises:
        InputError: If shape or classes differ.
    """
    learned = load_network(weights, own)[1]
    if (learned.image_shape, learned.class_names) != (given.image_shape, given.class_names):
        raise InputError(
            f"{place}: expected images of {learned.image_shape} and the classes "
            f"{', '.join(learned.class_names)}, got {given.image_shape} and "
            f"{', '.join(given.class_names)}{hint}"
        )


def lines(delivered: Delivered) -> list[str]:
    """Return what came out, for people."""
    file = delivered.file
    said = [
        f"{file.path}: {file.file_bytes / 1000:,.1f} kB",
        f"on {file.images} validation images its logits differ from the model's by up to "
        f"{file.max_difference:.1e}, the class is the same for {file.same_top1}",
    ]
    if delivered.accuracies:
        before, after = delivered.accuracies
        size = (file.float_bytes or 0) / 1000
        said.append(
            f"float to int8: accuracy {before:.4f} to {after:.4f} on the validation images (which "
            f"retraining learned from, too), size {size:,.1f} to {file.file_bytes / 1000:,.1f} kB"
        )
    if delivered.latency:
        said.append(
            f"latency here: {delivered.latency.median_ms:.3f} ms, quartiles "
            f"{delivered.latency.spread_ms:.3f} apart; ONNX Runtime, one thread, batch 1"
        )
    return said


def _images(split: Split) -> Tensor:
    """Return all images of a split as a model takes them, on the CPU."""
    return torch.cat([images.cpu() for images, _ in batches(split, COMPARED)])


def _export_weights(
    weights: Path,
    network: CellNetwork,
    preprocessing: Preprocessing,
    images: Tensor,
    path: Path,
    overwrite: bool,
    own: OwnOps,
) -> Exported:
    """Copy a file of weights, which holds all that is needed, and see that it works elsewhere."""
    with draft(path, overwrite) as copied, torch.no_grad():
        copied.write_bytes(weights.read_bytes())
        again, inputs = load_network(copied, own)
        if inputs != preprocessing:
            raise InputError(f"{weights}: changed while it was copied")
        reference = logits_of(network, images)
        return publish(copied, path, reference, check_parity(reference, logits_of(again, images)))
