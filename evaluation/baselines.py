"""A ready-made small network, scaled to a given number of params: torchvision's MobileNetV2."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evaluation.cost import count_params, measure_cost
from evaluation.records import Cost
from evaluation.sources import load_torchvision

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


@dataclass(frozen=True)
class MobileNetV2:
    """Builds torchvision's MobileNetV2 with random weights, fitted to small images.

    Departs from the published network where 32x32 or 8x8 images ask for it: the stem does not
    stride, only the last strides stay that leave at least 4x4 pixels, the channels are multiples
    of 4 instead of 8, and the last convolution shrinks with the width.
    """

    width: float
    image_shape: tuple[int, int, int]
    classes: int

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
        last = max(8, round(LAST_CHANNELS * self.width / 8) * 8)
        features[-1] = torchvision.ops.Conv2dNormActivation(
            features[-1][0].in_channels, last, kernel_size=1, activation_layer=nn.ReLU6
        )
        model.classifier = nn.Sequential(nn.Linear(last, self.classes))
        return model

    @property
    def cost(self) -> Cost:
        """Exact params and multiply-adds."""
        return measure_cost(self(), self.image_shape)


def mobilenet_near(params: int, image_shape: tuple[int, int, int], classes: int) -> MobileNetV2:
    """Return the MobileNetV2 whose params are nearest to `params`, on a logarithmic scale."""
    sizes = _mobilenet_sizes(image_shape, classes)
    width = min(sizes, key=lambda w: abs(math.log(sizes[w] / params)))
    return MobileNetV2(width, image_shape, classes)


@functools.cache
def _mobilenet_sizes(image_shape: tuple[int, int, int], classes: int) -> dict[float, int]:
    with torch.device("meta"):
        return {w: count_params(MobileNetV2(w, image_shape, classes)()) for w in WIDTHS}
