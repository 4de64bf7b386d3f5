"""Batches of a split, shuffled, augmented and normalised on its device, without workers."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.nn import functional

from evaluation.data.config import AugmentConfig
from evaluation.data.dataset import Split

Batch = tuple[Tensor, Tensor]


def batches(
    split: Split,
    batch_size: int,
    generator: Generator | None = None,
    augment: AugmentConfig | None = None,
    *,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield normalised float32 images (B, C, H, W) in channels_last, and labels (B,).

    Without a generator every image comes once, in order. With one, images are shuffled and
    augmented, and a short last batch is dropped unless it is the only one. The generator is a CPU
    one, so that every device sees the same data.

    Args:
        split: The images.
        batch_size: B.
        generator: Draws the order and the changes.
        augment: Random changes to the images.
        start: Batches to pass over, which are not computed; the rest is as without it.

    Raises:
        ValueError: If `augment` asks for changes without a generator.
    """
    augment = augment or AugmentConfig()
    if generator is None and augment != AugmentConfig():
        raise ValueError(f"augmentation needs a generator, got None and {augment}")
    plan = torch.arange(len(split))[None]
    if generator is not None:
        plan = _plan(split, batch_size, augment, generator)
    plan = plan.to(split.images.device)
    mean, std = (255 * statistic[:, None, None] for statistic in (split.mean, split.std))
    for chosen, *changes in torch.split(plan, batch_size, dim=1)[start:]:
        images = _crop_and_flip(split.images[chosen], augment, *changes)
        images = _cutout(images.float().sub_(mean).div_(std), augment.cutout_px, *changes)
        yield images.contiguous(memory_format=torch.channels_last), split.labels[chosen]


def cycle(
    split: Split,
    batch_size: int,
    generator: Generator,
    augment: AugmentConfig | None = None,
    *,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield `batches` for ever, shuffled anew each time round; pass over the first `start`."""
    rounds, start = divmod(start, max(1, len(split) // batch_size))
    for _ in range(rounds):
        _plan(split, batch_size, augment or AugmentConfig(), generator)  # draws what it drew then
    while True:
        yield from batches(split, batch_size, generator, augment, start=start)
        start = 0


def _plan(split: Split, batch_size: int, augment: AugmentConfig, generator: Generator) -> Tensor:
    """Draw all that is random in an epoch: one copy to the device instead of a wait in every step.

    Returns:
        (6, images of all batches) int64: image, top and left of its crop, whether it is mirrored,
        and row and column of the centre of its hole.
    """
    height, width = split.images.shape[2:]
    count = len(split) // batch_size * batch_size or len(split)
    offsets = 2 * augment.pad_px + 1
    ends = (offsets, offsets, 1 + augment.flip, height, width)
    order = torch.randperm(len(split), generator=generator)[:count]
    changes = [torch.randint(end, (count,), generator=generator) for end in ends]
    return torch.stack([order, *changes])


def _crop_and_flip(images: Tensor, augment: AugmentConfig, *changes: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if augment.pad_px:
        padded = functional.pad(images, [augment.pad_px] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, top, left, H, W)
        each = torch.arange(len(images), device=images.device)
        images = windows[each, :, changes[0], changes[1]]
    if augment.flip:
        images = torch.where(changes[2][:, None, None, None] == 1, images.flip(-1), images)
    return images


def _cutout(images: Tensor, side_px: int, *changes: Tensor) -> Tensor:
    """Zero a square centred anywhere in the image (DeVries and Taylor 2017, arXiv:1708.04552)."""
    if side_px == 0:
        return images
    inside = []
    for size, centre in zip(images.shape[2:], changes[3:], strict=True):
        distance = torch.arange(size, device=images.device) - centre[:, None] + side_px // 2
        inside.append((distance >= 0) & (distance < side_px))
    rows, columns = inside  # (B, H), (B, W)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
