"""From a picture to the input of a model: what a file that leaves this project must say of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from evaluation.data.dataset import Dataset
from evaluation.data.pictures import DEEPEST, Fit, Pixels, read_image
from evaluation.parsing import Finite, Positive, Size, parsed

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

    image_shape: tuple[Size, Size, Size]
    mean: tuple[Finite, ...]
    std: tuple[Positive, ...]
    class_names: Annotated[tuple[str, ...], Field(min_length=2)]
    fit: Fit = "crop"
    white: Annotated[int, Field(ge=1, le=DEEPEST)] = DEEPEST

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
        found = parsed(cls, data, "a preprocessing")
        channels = found.image_shape[0]
        if channels not in (1, 3) or not len(found.mean) == len(found.std) == channels:
            raise ValueError(
                "not a preprocessing: expected 1 or 3 channels, and a mean and a std for each, got "
                f"{str(data)[:200]}"
            )
        return found
