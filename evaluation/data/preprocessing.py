"""From a picture to the input of a model: what a file that leaves this project must say of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from evaluation.data.dataset import Dataset
from evaluation.data.pictures import DEEPEST, FITS, Fit, Pixels, read_image

GREY, RGB = "grey", "RGB"


@dataclass(frozen=True)
class Preprocessing:
    """How a model's input is made, and what its outputs are.

    The input is (B, C, H, W) float32, (x / 255 - mean) / std for each channel of pictures x in
    0 to 255, brought to the size as `fit` says.

    Attributes:
        image_shape: (C, H, W); one channel is grey, three are red, green, blue.
        mean: Of each channel, in units of x / 255.
        std: Of each channel, likewise, above 0.
        class_names: Of the logits, in their order.
        fit: `crop`: resized until the size is just covered, and the centre taken; `pad`: resized
            until it just fits, centred on black; `squash`: resized to the size.
        white: The value that becomes 255 in pictures of more than 8 bits; larger ones do as well.
    """

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    fit: Fit = "crop"
    white: int = DEEPEST

    @property
    def channel_order(self) -> str:
        """`grey` or `RGB`."""
        return GREY if self.image_shape[0] == 1 else RGB

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Return that of a dataset."""
        mean, std = dataset.train.mean.tolist(), dataset.train.std.tolist()
        return cls(
            dataset.image_shape,
            tuple(mean),
            tuple(std),
            dataset.class_names,
            fit=dataset.fit,
            white=dataset.white,
        )

    def read(self, paths: Sequence[Path]) -> Tensor:
        """Read image files as a model's input, (B, C, H, W) float32.

        Raises:
            InputError: If a file is no undamaged image; names it.
        """
        _, height, width = self.image_shape
        mode = "L" if self.channel_order == GREY else "RGB"
        frame = width, height
        pixels = [read_image(path, frame, mode, self.fit, self.white) for path in paths]
        return self.normalise(np.stack(pixels))

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
            "fit": self.fit,
            "white": self.white,
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from `to_json`; what older files do not say of `fit` and `white` is the default.

        Raises:
            ValueError: If the data has another form.
        """
        try:
            channels, height, width = (int(size) for size in data["image_shape"])
            mean, std = (tuple(float(x) for x in data[name]) for name in ("mean", "std"))
            names = tuple(str(name) for name in data["class_names"])
            how, white = FITS[str(data.get("fit", "crop"))], int(data.get("white", DEEPEST))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a preprocessing: {error!r}") from error
        fits = channels in (1, 3) and len(mean) == len(std) == channels and min(height, width) > 0
        fits = fits and 0 < white <= DEEPEST
        finite = all(map(math.isfinite, (*mean, *std)))
        if not fits or not finite or min(std) <= 0 or len(names) < 2:
            raise ValueError(
                "a preprocessing has 1 or 3 channels, a mean and a positive std for each, at least "
                f"2 class names, and a white from 1 to {DEEPEST}; got {str(data)[:200]}"
            )
        return cls((channels, height, width), mean, std, names, how, white)
