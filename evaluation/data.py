"""Image datasets, their four splits, and whole-set-on-device batches with batched augmentation.

A set is read into uint8 arrays, divided into `search_train`, `search_valid` and `test` by one seed, and kept in
memory; `batches` shuffles, augments and normalises it with tensor operations only, so no worker processes are needed.
"""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from evaluation.errors import InputError

MIN_SIDE_PX = 4
DEFAULT_ROOT = "~/.cache/paretoblocks"  # of the torchvision sets
PART_FOLDERS = ({"train", "test"}, {"train", "val", "test"})

# What Pillow and NumPy raise on damaged files, found by flipping and cutting bytes.
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
UNREADABLE_NPZ = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

Batch = tuple[Tensor, Tensor]
Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]  # (N, H, W) grey or (N, H, W, 3) RGB


class AugmentConfig(BaseModel):
    """Random changes of training images, each drawn anew for every image.

    Attributes:
        pad_px: Black border on each side, of which a random crop keeps the original size.
        flip: Mirror left to right with probability 1/2.
        cutout_px: Side of a square set to the mean colour, its centre anywhere in the image; 0 = off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pad_px: int = Field(default=0, ge=0)
    flip: bool = False
    cutout_px: int = Field(default=0, ge=0)


class DataConfig(BaseModel):
    """Which images, and how they are divided.

    Attributes:
        name: The source.
        root: The file of `npz`, the folder of `folder`; where torchvision's sets are, None = `DEFAULT_ROOT`.
        download: Let torchvision download its set into `root`.
        image_size_px: Shorter side to this, then centre crop; None keeps the size. `folder` needs it.
        color: `auto` is grey only if every image is grey.
        valid_fraction: Part of the train images that becomes `search_valid`, where the source has no such part.
        test_fraction: Part of all images that becomes `test`, where the source has no such part.
        max_train_images: Keep a stratified subset of this many of `train`; None = all.
        max_test_images: The same of `test`.
        augment: For the caller to hand to `batches`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["digits", "cifar10", "cifar100", "fashion_mnist", "mnist", "npz", "folder"] = (
        "digits"
    )
    root: str | None = None
    download: bool = False
    image_size_px: int | None = Field(default=None, ge=MIN_SIDE_PX)
    color: Literal["auto", "grey", "rgb"] = "auto"
    valid_fraction: float = Field(default=0.25, gt=0, lt=1)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_train_images: int | None = Field(default=None, ge=1)
    max_test_images: int | None = Field(default=None, ge=1)
    augment: AugmentConfig = AugmentConfig()


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels on one device, and the normalisation that they are to get.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, classes).
        mean: (C,) float32 in units of x / 255, of `search_train` in every split.
        std: (C,) float32, likewise; at least 1 / 255.
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
    """The four splits: `train` is the union of the disjoint `search_train` and `search_valid`.

    Attributes:
        name: `DataConfig.name`.
        class_names: One for each label.
        search_train: What weights learn on during a search.
        search_valid: What alphas and stage two learn on.
        train: What retraining learns on.
        test: Disjoint from all of the above; read by retraining only.
        fingerprint: 16 hex digits that change when an image, a label or the division changes.
    """

    name: str
    class_names: tuple[str, ...]
    search_train: Split
    search_valid: Split
    train: Split
    test: Split
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

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

    A class needs an image in every split that is cut from the train images: 3 where the source has neither a
    validation nor a test part, 2 where it lacks one of them.

    Raises:
        InputError: If the source is missing, damaged or cannot be divided; the message names the file or value.
    """
    source = _READERS[config.name](config)
    where = config.root or config.name
    _check_labels(source, where)
    source = _unify_images(source, config, where)
    rng = np.random.default_rng(seed)
    train, valid, test = source.train, source.valid, source.test
    if test is None:
        train, test = _cut(train, config.test_fraction, rng)
    if valid is None:
        train, valid = _cut(train, config.valid_fraction, rng)
    kept = _stratified_subset(
        np.concatenate([2 * train.labels, 2 * valid.labels + 1]), config, "max_train_images", rng
    )
    train_size = int((kept < len(train.labels)).sum())
    images = _to_tensor(np.concatenate([train.images, valid.images])[kept])
    labels = torch.from_numpy(np.concatenate([train.labels, valid.labels])[kept])
    test = test.take(_stratified_subset(test.labels, config, "max_test_images", rng))
    mean, std = _mean_and_std(images[:train_size])
    splits = {
        "search_train": Split(images[:train_size], labels[:train_size], mean, std),
        "search_valid": Split(images[train_size:], labels[train_size:], mean, std),
        "test": Split(_to_tensor(test.images), torch.from_numpy(test.labels), mean, std),
    }
    return Dataset(
        name=config.name,
        class_names=source.class_names,
        train=Split(images, labels, mean, std),
        fingerprint=_fingerprint(*splits.values()),
        **splits,
    )


def batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator | None = None,
    augment: AugmentConfig | None = None,
) -> Iterator[Batch]:
    """Yield images (B, C, H, W), normalised float32 in channels_last on the split's device, and labels (B,).

    Without a generator every image comes once and in order. With one they are shuffled and augmented, and a short
    last batch is dropped unless it is the only one. It is a CPU generator, so that every device sees the same data.

    Raises:
        ValueError: On the first batch, if `batch_size` is below 1 or there is augmentation but no generator.
    """
    augment = augment or AugmentConfig()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if generator is None and augment != AugmentConfig():
        raise ValueError(f"augmentation needs a generator, got None with {augment}")
    order, end = torch.arange(len(split)), len(split)
    if generator is not None:
        order = torch.randperm(len(split), generator=generator)
        end = len(split) // batch_size * batch_size or len(split)
    order = order.to(split.images.device)
    for start in range(0, end, batch_size):
        chosen = order[start : start + batch_size]
        images = _crop(split.images[chosen], augment.pad_px, generator)
        if augment.flip:
            images = _flip(images, generator)
        images = _cutout(_normalise(images, split), augment.cutout_px, generator)
        yield images.contiguous(memory_format=torch.channels_last), split.labels[chosen]


def cycle(
    split: Split,
    batch_size: int,
    generator: torch.Generator,
    augment: AugmentConfig | None = None,
) -> Iterator[Batch]:
    """Yield `batches` for ever, shuffled anew each time round."""
    while True:
        yield from batches(split, batch_size, generator, augment)


def _normalise(images: Tensor, split: Split) -> Tensor:
    mean, std = (255 * statistic[:, None, None] for statistic in (split.mean, split.std))
    return (images.float() - mean) / std


def _crop(images: Tensor, pad_px: int, generator: torch.Generator | None) -> Tensor:
    """Shift each image (B, C, H, W) by up to `pad_px` in both directions, black moving in."""
    if pad_px == 0:
        return images
    count, channels, height, width = images.shape
    device = images.device
    offsets = torch.randint(2 * pad_px + 1, (2, count, 1), generator=generator).to(device)
    rows = offsets[0] + torch.arange(height, device=device)  # (B, H)
    columns = offsets[1] + torch.arange(width, device=device)  # (B, W)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    padded = functional.pad(images, [pad_px] * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=generator).bool()
    return torch.where(mirrored.to(images.device), images.flip(-1), images)


def _cutout(images: Tensor, side_px: int, generator: torch.Generator | None) -> Tensor:
    """Set a square of each image to 0, its centre uniform and its sides cut at the border.

    DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552: squares that reach over the border matter.
    """
    if side_px == 0:
        return images
    spans = []
    for size in images.shape[2:]:
        first = torch.randint(size, (len(images), 1), generator=generator) - side_px // 2
        place = torch.arange(size)
        spans.append(((place >= first) & (place < first + side_px)).to(images.device))
    rows, columns = spans  # (B, H), (B, W)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


@dataclass(frozen=True, eq=False)
class _Part:
    """Images (N, H, W) or (N, H, W, 3), labels (N,)."""

    images: Pixels
    labels: Integers

    def take(self, chosen: Integers) -> "_Part":
        return _Part(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class _Source:
    """What a reader finds; None where the source has no such part."""

    class_names: tuple[str, ...]
    train: _Part
    valid: _Part | None = None
    test: _Part | None = None

    @property
    def parts(self) -> list[_Part]:
        return [part for part in (self.train, self.valid, self.test) if part is not None]


def _stratified_order(strata: Integers, rng: np.random.Generator) -> Integers:
    """Shuffle indices so that every prefix has the strata in proportion.

    One of each stratum comes before all others and one of each comes last, so that a cut in between leaves every
    stratum on both sides, which scikit-learn's `train_test_split` does not promise for small ones.
    """
    sizes = np.bincount(strata)
    shuffled = rng.permutation(len(strata))
    grouped = shuffled[np.argsort(strata[shuffled], kind="stable")]
    size = np.repeat(sizes, sizes)
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    key = (rank + 0.5) / size
    key[rank == size - 1] = 2
    key[rank == 0] = -1
    return grouped[np.argsort(key, kind="stable")]


def _cut(part: _Part, fraction: float, rng: np.random.Generator) -> tuple[_Part, _Part]:
    """Return the rest, and a stratified `fraction` with at least one image of each class."""
    order = _stratified_order(part.labels, rng)
    classes = len(np.unique(part.labels))
    count = min(max(round(fraction * len(order)), classes), len(order) - classes)
    return part.take(np.sort(order[count:])), part.take(np.sort(order[:count]))


def _subset(strata: Integers, limit: int | None, key: str, rng: np.random.Generator) -> Integers:
    """Return at most `limit` ascending indices, stratified; `key` names the limit in the error."""
    if limit is None or limit >= len(strata):
        return np.arange(len(strata))
    needed = len(np.unique(strata))
    if limit < needed:
        raise InputError(f"{key}={limit}: expected at least {needed}, one per class and split")
    return np.sort(_stratified_order(strata, rng)[:limit])


def _check_labels(source: _Source, where: str) -> None:
    """Refuse labels other than 0..K-1, a single class, and classes that cannot be in every split."""
    names = source.class_names
    present = np.unique(np.concatenate([part.labels for part in source.parts]))
    if not np.array_equal(present, np.arange(len(names))):
        found = ", ".join(map(str, present[:20]))
        raise InputError(
            f"{where}: expected labels 0 to {len(names) - 1}, each in use, for {len(names)} classes; found {found}"
        )
    if len(names) < 2:
        raise InputError(f"{where}: expected at least 2 classes, found {len(names)}")
    needed = 4 - len(source.parts)
    for name, count in zip(names, np.bincount(source.train.labels, minlength=len(names)), strict=True):
        if count < needed:
            raise InputError(
                f"{where}: class {name!r} has {count} train images, expected at least {needed}, one for each split cut from them"
            )


def _unify(source: _Source, config: DataConfig, where: str) -> _Source:
    """Give all images one size and one number of channels."""
    grey = config.color == "grey" or (
        config.color == "auto" and all(_is_grey(part.images) for part in source.parts)
    )
    train, valid, test = (
        part and _Part(_convert(part.images, "L" if grey else "RGB", config.image_size_px), part.labels)
        for part in (source.train, source.valid, source.test)
    )
    sizes = {part.images.shape[1:3] for part in source.parts}
