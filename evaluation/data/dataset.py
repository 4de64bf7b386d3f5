"""Image datasets and their four splits: one uint8 array, read whole and divided from a seed."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evaluation.data.config import OWN, AugmentConfig, DataConfig
from evaluation.data.inspection import (
    contrast_notes,
    copy_notes,
    crop_notes,
    find_copies,
    find_left_out,
    find_levels,
    leave_copies_out,
    name_notes,
    require_images_left,
    spread_notes,
)
from evaluation.data.parts import LEFT_OUT, PARTS, TEST, TRAIN, VALID
from evaluation.data.pictures import DEEPEST, Fit, Pixels, fit, require_images_fit
from evaluation.data.sources import Integers, Source, read_source, source_of
from evaluation.data.splits import divide
from evaluation.errors import InputError, printable, reason_of, require


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, C, H, W) uint8, labels (N,) int64, and the normalisation that all splits share.

    `mean` and `std` (C,) are those of `search_train`, in units of x / 255; std is at least 1 / 255.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """Return this split on `device`."""
        tensors = (self.images, self.labels, self.mean, self.std)
        return Split(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four splits: `train` is `search_train` and `search_valid`, `test` is disjoint from it.

    `fingerprint`, 16 hex digits, changes when an image, a label or the division changes. `fit` and
    `white` are how a picture file becomes such an image, see `pictures.read_picture`; `notes` are
    sentences that a person should read.
    """

    name: str
    class_names: tuple[str, ...]
    search_train: Split
    search_valid: Split
    train: Split
    test: Split
    fingerprint: str
    fit: Fit = "crop"
    white: int = DEEPEST
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def describe(self) -> str:
        """Say in a sentence what the images are."""
        channels, height, width = self.image_shape
        return (
            f"{self.name}: {len(self.train)} train ({len(self.search_train)} for weights, "
            f"{len(self.search_valid)} for the search) and {len(self.test)} test images, "
            f"{self.classes} classes, {channels}x{height}x{width}"
        )

    @classmethod
    def from_arrays(
        cls,
        images: NDArray[Any],
        labels: NDArray[Any],
        *,
        valid: tuple[NDArray[Any], NDArray[Any]] | None = None,
        test: tuple[NDArray[Any], NDArray[Any]] | None = None,
        class_names: Sequence[str] | None = None,
        valid_fraction: float = 0.25,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> "Dataset":
        """Return images that are in memory, inspected and divided as those of an .npz file.

        Args:
            images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), integers from 0 to 255.
            labels: (N,), integers from 0 up without a gap.
            valid: Images and labels that become `search_valid`; None draws them from `images`.
            test: Likewise `test`.
            class_names: In the order of the labels; None gives the labels themselves.
            valid_fraction: Of the training images, where `valid` is drawn.
            test_fraction: Of all images, where `test` is drawn.
            seed: Of what is drawn.

        Raises:
            InputError: If an array has another type or shape, or they cannot be divided.
        """
        parts = {"train": (images, labels), "val": valid, "test": test}
        given = {part: arrays for part, arrays in parts.items() if arrays is not None}
        fractions = {"valid_fraction": valid_fraction, "test_fraction": test_fraction}
        for key, part in fractions.items():
            require(0 < part < 1, f"{key}: expected more than 0 and less than 1, got {part}")
        config = DataConfig(name=OWN, **fractions)
        return _divided(source_of(given, class_names), config, seed)

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the four splits on `device`."""
        return replace(
            self,
            search_train=self.search_train.to(device),
            search_valid=self.search_valid.to(device),
            train=self.train.to(device),
            test=self.test.to(device),
        )


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read a set and divide it; the same files, config and seed give the same splits.

    Parts that the source has are kept. Each class needs one train image for `search_train` and one
    for each of `search_valid` and `test` that the source lacks: 3 if it has a train part only.

    Raises:
        InputError: If the source is missing, damaged or cannot be divided; names file or value.
    """
    return _divided(read_source(config), config, seed)


def _divided(source: Source, config: DataConfig, seed: int) -> Dataset:
    """Return the four splits of a source; `load_dataset` says the rest."""
    where = config.root or config.name
    _check_labels(source, where)
    pixels = _unify(source.images, config)
    notes, copies = _inspect(source, pixels, config)
    lacks_parts = len(np.unique(source.part)) < len(PARTS)
    single = leave_copies_out(copies, source.part, source.labels, once=lacks_parts)
    left_out = find_left_out(copies, source.part, single)
    told = copy_notes(copies, left_out, source.labels, source.name)
    with _telling(told):
        require_images_left(source.part, single, source.labels, source.class_names, where)
        _check_classes(source, single, where)
    drawn = divide(source, single, config, np.random.default_rng(seed))
    part = leave_copies_out(copies, drawn, source.labels, once=False)
    left_out += find_left_out(copies, drawn, part)
    told = copy_notes(copies, left_out, source.labels, source.name)
    with _telling(told):
        require_images_left(drawn, part, source.labels, source.class_names, where)
    notes += told
    order = np.argsort(part, kind="stable")
    valid, test, end = (int(i) for i in np.searchsorted(part[order], [VALID, TEST, LEFT_OUT]))
    _check_padding(config.augment, min(pixels.shape[2:]))
    images = torch.from_numpy(pixels[order[:end]])
    labels = torch.from_numpy(source.labels[order[:end]])
    mean, std = _mean_and_std(images[:valid])
    digest = hashlib.sha256(repr((tuple(images.shape), valid, test)).encode())
    digest.update(images.numpy().data)
    digest.update(labels.numpy().data)
    if source.white != DEEPEST:  # pictures to classify are read by it
        digest.update(str(source.white).encode())
    return Dataset(
        name=config.name,
        class_names=source.class_names,
        search_train=Split(images[:valid], labels[:valid], mean, std),
        search_valid=Split(images[valid:test], labels[valid:test], mean, std),
        train=Split(images[:test], labels[:test], mean, std),
        test=Split(images[test:], labels[test:], mean, std),
        fingerprint=digest.hexdigest()[:16],
        fit=config.fit,
        white=source.white,
        notes=tuple(map(printable, notes)),
    )


@dataclass(frozen=True)
class OwnImages:
    """A user's own images: what returns them, and by which a process knows that it has them."""

    read: Callable[[], Dataset] = field(compare=False)
    key: str = field(default_factory=lambda: uuid4().hex)

    def __call__(self) -> Dataset:
        """Return the images.

        Raises:
            InputError: If that fails, or they are no `Dataset`.
        """
        try:
            found = self.read()
        except InputError:
            raise
        except Exception as error:  # whatever a stranger's code raises
            raise InputError(f"own images: {reason_of(error)}") from error
        if not isinstance(found, Dataset):
            raise InputError(
                f"own images: expected a Dataset, such as Dataset.from_arrays returns, "
                f"got {type(found).__name__}"
            )
        return found


@functools.lru_cache(maxsize=1)
def worker_dataset(
    config: DataConfig, seed: int, device: str, own: OwnImages | None = None
) -> Dataset:
    """Load a dataset, or a user's own images, onto a device, once per process."""
    return (load_dataset(config, seed) if own is None else own()).to(device)


@contextmanager
def _telling(notes: list[str]) -> Iterator[None]:
    """Have an error of the block tell of the copies that led to it."""
    try:
        yield
    except InputError as error:
        raise InputError("; ".join([str(error), *map(printable, notes)])) from error


def _check_labels(source: Source, where: str) -> None:
    names, labels = source.class_names, np.unique(source.labels)
    require(
        len(names) > 1 and np.array_equal(labels, np.arange(len(names))),
        f"{where}: expected at least 2 classes and their labels from 0 up without a gap, "
        f"got {len(names)} classes and the labels {', '.join(map(str, labels[:20]))}",
    )


def _check_classes(source: Source, part: Integers, where: str) -> None:
    """Refuse a class of too few train images; `part` is that of each image, without copies."""
    needed = 1 + len(PARTS) - len(np.unique(source.part))
    counts = np.bincount(source.labels[part == TRAIN], minlength=len(source.class_names))
    rarest = int(counts.argmin())
    require(
        counts[rarest] >= needed,
        f"{where}: class {source.class_names[rarest]!r} needs at least {needed} train images, one "
        f"for each split made of them, got {counts[rarest]}"
        + (", copies not counted" if (part != source.part).any() else ""),
    )


def _check_padding(augment: AugmentConfig, side_px: int) -> None:
    """Refuse a border beyond which crops would see nothing else, and whose memory has no bound."""
    require(
        augment.pad_px <= side_px,
        f"data.augment.pad_px: expected at most {side_px}, the side of the images, "
        f"got {augment.pad_px}",
    )


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Count the levels, since a sum of floats would depend on the number of threads."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    shares = torch.stack(counts).double() / images[:, 0].numel()  # (C, 256)
    mean = (shares * levels).sum(1, keepdim=True)
    std = (shares * (levels - mean).square()).sum(1).sqrt()
    return mean[:, 0].float(), std.clamp(min=1 / 255).float()


def _unify(images: Pixels, config: DataConfig) -> Pixels:
    """Return (N, C, H, W) in the colour and size that `config` asks for."""
    is_grey = images.ndim == 3 or bool((images == images[..., :1]).all())
    mode = {"auto": "L" if is_grey else "RGB", "grey": "L", "rgb": "RGB"}[config.color]
    height, width = images.shape[1:3]
    size = (config.image_size_px or width, config.image_size_px or height)
    if size != (width, height) or mode != ("L" if images.ndim == 3 else "RGB"):
        require_images_fit(len(images), size, channels=len(mode))
        images = np.stack(
            [fit(Image.fromarray(image).convert(mode), size, config.fit) for image in images]
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _inspect(
    source: Source, pixels: Pixels, config: DataConfig
) -> tuple[list[str], list[list[int]]]:
    """Return what a person should know of the pictures, and the groups of equal ones."""
    notes = [*source.notes, *name_notes(source.class_names)]
    if config.fit == "crop":
        notes += crop_notes(source.sizes, (pixels.shape[3], pixels.shape[2]), source.name)
    low, high = find_levels(pixels, source.sizes, config.fit)
    notes += contrast_notes(low, high, source.name) + spread_notes(pixels)
    return notes, find_copies(pixels, np.flatnonzero((low < high).any(1)))
