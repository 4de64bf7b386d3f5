"""A ready-made small network, scaled to a number of params: MobileNetV2."""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from evaluation.cost.counts import count_params, measure_cost
from evaluation.data.sources import load_torchvision
from evaluation.records import Cost

# Expansion, channels, repeats, stride: table 2 of Sandler et al. 2018, as in torchvision.
INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_CHANNELS = 1280
WIDTHS = tuple(step / 40 for step in range(1, 61))  # 0.025 to 1.5
Width = TypeVar("Width", int, float)


@dataclass(frozen=True)
class MobileNetV2:
    """Builds torchvision's MobileNetV2 with random weights, fitted to small images.

    Departs from the published network where 32x32 or 8x8 images ask for it: the stem does not
    stride, only the last strides stay that leave at least 4x4 pixels, the channels are multiples
    of 4 instead of 8, and the last convolution shrinks with the width.

    Attributes:
        width: Factor on all channels.
        image_shape: (C, H, W).
        classes: Number of classes.
        last_channels: Of the last convolution at width 1; the published one has 1,280 there, and at
            smaller widths too.
    """

    width: float
    image_shape: tuple[int, int, int]
    classes: int
    last_channels: int = LAST_CHANNELS

    def __call__(self) -> nn.Module:
        """Return the network."""
        torchvision = load_torchvision()
        halvings = max(0, int(math.log2(min(self.image_shape[1:]) / 4)))
        strided = [i for i, row in enumerate(INVERTED_RESIDUALS) if row[3] == 2]
        keep = set(strided[-halvings:] if halvings else [])
        model: nn.Module = torchvision.models.mobilenet_v2(
            num_classes=self.classes,
            width_mult=self.width,
            round_nearest=4,
            dropout=0.0,
            inverted_residual_setting=[
                [t, c, n, 2 if i in keep else 1]
                for i, (t, c, n, _) in enumerate(INVERTED_RESIDUALS)
            ],
        )
        features: Any = model.get_submodule("features")
        stem = features[0][0]
        features[0][0] = nn.Conv2d(self.image_shape[0], stem.out_channels, 3, padding=1, bias=False)
        last = max(8, round(self.last_channels * self.width / 8) * 8)
        features[-1] = torchvision.ops.Conv2dNormActivation(
            features[-1][0].in_channels, last, kernel_size=1, activation_layer=nn.ReLU6
        )
        model.classifier = nn.Sequential(nn.Linear(last, self.classes))
        return model

    @property
    def cost(self) -> Cost:
        """Exact params and multiply-adds."""
        return measure_cost(self(), self.image_shape)


def mobilenet_near(
    params: int,
    image_shape: tuple[int, int, int],
    classes: int,
    last_channels: int = LAST_CHANNELS,
) -> MobileNetV2:
    """Return the MobileNetV2 whose params are nearest to `params`, on a logarithmic scale."""
    count = functools.partial(_mobilenet_size, image_shape, classes, last_channels)
    width = nearest_width(WIDTHS, count, params)
    return MobileNetV2(width, image_shape, classes, last_channels)


def nearest_width(widths: Sequence[Width], count: Callable[[Width], int], params: int) -> Width:
    """Return the width whose count of params is nearest to `params`, on a logarithmic scale.

    Args:
        widths: Ascending.
        count: Of a network of that width; grows with it.
        params: A count.
    """
    above = bisect.bisect_left(widths, params, key=count)
    around = list(widths[above : above + 1])
    if above > 0:  # of equal counts the first
        around.insert(0, widths[bisect.bisect_left(widths, count(widths[above - 1]), key=count)])
    return min(around, key=lambda width: abs(math.log(count(width) / params)))


@functools.cache
def _mobilenet_size(
    image_shape: tuple[int, int, int], classes: int, last_channels: int, width: float
) -> int:
    with torch.device("meta"):
        return count_params(MobileNetV2(width, image_shape, classes, last_channels)())
