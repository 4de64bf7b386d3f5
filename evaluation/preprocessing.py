"""From a picture to the input of a model: what a file that leaves this project must say of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from evaluation.data import Dataset
from evaluation.sources import Pixels, read_image

GREY, RGB = "grey", "RGB"


@dataclass(frozen=True)
class Preprocessing:
    """How a model's input is made, and what its outputs are.

    The input is (B, C, H, W) float32, (x / 255 - mean) / std for each channel of pictures x in
    0 to 255, resized until the size is just covered and cropped to its centre.

    Attributes:
        image_shape: (C, H, W); one channel is grey, three are red, green, blue.
        mean: Of each channel, in units of x / 255.
        std: Of each channel, likewise, above 0.
        class_names: Of the logits, in their order.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def channel_order(self) -> str:
        """`grey` or `RGB`."""
        return GREY if self.image_shape[0] == 1 else RGB

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Return that of a dataset."""
        mean, std = dataset.train.mean.tolist(), dataset.train.std.tolist()
        return cls(dataset.image_shape, tuple(mean), tuple(std), dataset.class_names)

    def read(self, paths: Sequence[Path]) -> Tensor:
        """Read image files as a model's input, (B, C, H, W) float32.

        Raises:
            InputError: If a file is no undamaged image; names it.
        """
        _, height, width = self.image_shape
        mode = "L" if self.channel_order == GREY else "RGB"
        pixels = np.stack([read_image(path, (width, height), mode) for path in paths])
        return self.normalise(pixels)

    def normalise(self, pixels: Pixels) -> Tensor:
        """Map pictures (B, H, W) or (B, H, W, C) of 0 to 255 to a model's input."""
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        mean, std = (255 * torch.tensor(one)[:, None, None] for one in (self.mean, self.std))
        images = torch.from_numpy(np.ascontiguousarray(pixels)).float()
        return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, the channel order in words beside the shape."""
        return {
            "image_shape": list(self.image_shape),
            "channel_order": self.channel_order,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from `to_json`.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            channels, height, width = (int(size) for size in data["image_shape"])
            mean, std = (tuple(float(x) for x in data[name]) for name in ("mean", "std"))
            names = tuple(str(name) for name in data["class_names"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a preprocessing: {error!r}") from error
        fits = channels in (1, 3) and len(mean) == len(std) == channels and min(height, width) > 0
        finite = all(map(math.isfinite, (*mean, *std)))
        if not fits or not finite or min(std) <= 0 or len(names) < 2:
            raise ValueError(
                "a preprocessing has 1 or 3 channels, a mean and a positive std for each, and "
                f"at least 2 class names; got {str(data)[:200]}"
            )
        return cls((channels, height, width), mean, std, names)
