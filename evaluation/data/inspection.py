"""What a person should know of a set: pictures cut off, without contrast, or there twice."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.data.parts import LEFT_OUT, PARTS, TRAIN
from evaluation.data.pictures import Fit, Pixels, Size, box_in
from evaluation.errors import InputError
from evaluation.words import counted, named

MIN_SPAN = 16  # of 256 levels, below which a set is said to have hardly any contrast
LOOKED_AT, RARE = 500, 0.005  # images of a set; part of the pixels at either end
MIN_KEPT = 0.5  # part of a picture's area
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
NameOf = Callable[[int], str]


def name_notes(class_names: Sequence[str]) -> list[str]:
    """Say which names of classes differ in small and capital letters alone, or not at all."""
    folded: dict[str, list[str]] = {}
    for name in class_names:
        folded.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    alike = [" and ".join(map(repr, names)) for names in folded.values() if len(names) > 1]
    return [f"these names of classes are alike: {named(alike)}"] if alike else []


def crop_notes(sizes: Integers, frame: Size, name: NameOf) -> list[str]:
    """Say which pictures lose most of their area when their centre is cropped.

    Args:
        sizes: (N, 2), width and height, px.
        frame: (width, height) that they are cropped to.
        name: Index -> picture.
    """
    ratios = sizes[:, 0] * frame[1] / (sizes[:, 1] * frame[0])
    kept = np.minimum(ratios, 1 / ratios)
    lost = int((kept < MIN_KEPT).sum())
    if not lost:
        return []
    worst = int(kept.argmin())
    width, height = sizes[worst]
    verb = "loses" if lost == 1 else "lose"
    return [
        f"{counted(lost, 'picture')} {verb} more than half of the area to the crop, most of all "
        f"{name(worst)} of {width} x {height} px; data.fit=pad or data.fit=squash keeps all of it"
    ]


def find_levels(images: Pixels, sizes: Integers, how: Fit) -> tuple[Pixels, Pixels]:
    """Return the smallest and the largest level of every channel of every image, (N, C) each.

    Args:
        images: (N, C, H, W), fitted.
        sizes: (N, 2), width and height before that, px.
        how: How they were fitted; black bars are not looked at.
    """
    if how != "pad":
        flat = images.reshape(*images.shape[:2], -1)
        return flat.min(2), flat.max(2)
    frame = images.shape[3], images.shape[2]
    boxes = (box_in(frame, (width, height), how) for width, height in sizes.tolist())
    inner = [
        image[:, top:bottom, left:right]
        for image, (left, top, right, bottom) in zip(images, boxes, strict=True)
    ]
    return (
        np.stack([one.min((1, 2)) for one in inner]),
        np.stack([one.max((1, 2)) for one in inner]),
    )


def contrast_notes(low: Pixels, high: Pixels, name: NameOf) -> list[str]:
    """Say which images, or whether the whole set, have no contrast.

    Args:
        low: The smallest levels, (N, C).
        high: The largest ones.
        name: Index -> image.
    """
    blank = np.flatnonzero((low == high).all(1))
    notes = []
    if len(blank) == len(low):
        notes.append("no picture has any contrast: in each of them all pixels are equal")
    elif len(blank):
        names = named([name(index) for index in blank.tolist()])
        verb = "is" if len(blank) == 1 else "are"
        notes.append(
            f"{counted(len(blank), 'picture')} {verb} without contrast, all pixels equal: {names}"
        )
    if (high.max(0) - low.min(0)).max() < MIN_SPAN:
        notes.append(
            f"the whole set has hardly any contrast: its levels lie between {low.min()} and "
            f"{high.max()} of 255"
        )
    return notes


def spread_notes(images: Pixels) -> list[str]:
    """Say that hardly a pixel is outside a few levels, as where one that is broken is white.

    Args:
        images: (N, C, H, W), of which some, evenly spread, are looked at.
    """
    some = images[:: max(1, len(images) // LOOKED_AT)]
    low, high = (int(level) for level in np.quantile(some, (RARE, 1 - RARE), method="nearest"))
    if high - low >= MIN_SPAN or int(some.max()) - int(some.min()) < MIN_SPAN:
        return []
    return [
        f"the whole set has hardly any contrast: {1 - 2 * RARE:.0%} of its levels lie between "
        f"{low} and {high} of 255"
    ]


def find_copies(images: Pixels, chosen: Integers) -> list[list[int]]:
    """Return the groups of those chosen images whose pixels are the same, by their indices.

    Args:
        images: (N, C, H, W).
        chosen: Indices.
    """
    groups: dict[bytes, list[int]] = {}
    for index in chosen.tolist():
        digest = hashlib.sha256(images[index].data).digest()
        groups.setdefault(digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def leave_copies_out(
    copies: Sequence[Sequence[int]], part: Integers, labels: Integers, *, once: bool
) -> Integers:
    """Return the parts, LEFT_OUT for an image that a later part has too: test, val, train.

    Args:
        copies: Groups of equal images.
        part: (N,).
        labels: (N,).
        once: Whether of equal train images of one class only the first is kept, since they are yet
            to be divided.
    """
    kept = part.copy()
    for group in copies:
        present = [index for index in group if part[index] != LEFT_OUT]
        last, seen = max(part[present], default=TRAIN), set()
        for index in present:
            again = once and part[index] == TRAIN and labels[index] in seen
            if part[index] < last or again:
                kept[index] = LEFT_OUT
            seen.add(labels[index])
    return kept


def require_images_left(
    before: Integers, after: Integers, labels: Integers, class_names: Sequence[str], where: str
) -> None:
    """Refuse a set in which a class has lost all images of a part to later parts.

    Args:
        before: Parts, (N,).
        after: The same, without the copies.
        labels: (N,).
        class_names: In the order of the labels.
        where: The set, for the message.

    Raises:
        InputError: Names class and part.
    """
    for spelled, number in PARTS.items():
        had, has = (
            np.bincount(labels[part == number], minlength=len(class_names))
            for part in (before, after)
        )
        for label in np.flatnonzero((had > 0) & (has == 0))[:1].tolist():
            raise InputError(
                f"{where}: class {class_names[label]!r}: all its pictures in {spelled} have "
                f"copies in a later part and would be left out, {had[label]:,} in all"
            )


def find_left_out(
    copies: Sequence[Sequence[int]], before: Integers, after: Integers
) -> list[tuple[int, int]]:
    """Return each image that was left out as a copy, and one that is kept instead of it."""
    pairs = []
    for group in copies:
        kept = max(group, key=lambda one: (after[one] != LEFT_OUT, after[one]))
        pairs += [(index, kept) for index in group if before[index] != after[index]]
    return pairs


def copy_notes(
    copies: Sequence[Sequence[int]],
    left_out: Sequence[tuple[int, int]],
    labels: Integers,
    name: NameOf,
) -> list[str]:
    """Say which images are left out as copies, and which stand in more than one class.

    Args:
        copies: Groups of equal images.
        left_out: See `find_left_out`.
        labels: (N,).
        name: Index -> image.
    """
    notes = []
    pairs = [f"{name(index)} = {name(kept)}" for index, kept in left_out]
    if pairs:
        verb, what = ("is", "another has") if len(pairs) == 1 else ("are", "others have")
        notes.append(
            f"{counted(len(pairs), 'picture')} {verb} left out, as {what} the same pixels: "
            f"{named(pairs, separator='; ')}"
        )
    mixed = [
        named([name(index) for index in group], separator=" = ")
        for group in copies
        if len({*labels[list(group)].tolist()}) > 1
    ]
    if mixed:
        verb = "stands" if len(mixed) == 1 else "stand"
        notes.append(
            f"{counted(len(mixed), 'picture')} {verb} in more than one class: "
            f"{named(mixed, separator='; ')}"
        )
    return notes
