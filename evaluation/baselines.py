"""Ready-made small networks, scaled to a number of params: MobileNetV2 and CIFAR's ResNets."""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
RESNET_WIDTHS = range(2, 33)  # channels of the first stage; 16 in the paper
RESNET_STAGES = 3
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


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: strided, its new channels zero."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.more = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + pad(shortcut, (0, 0, 0, 0, 0, self.more)))


@dataclass(frozen=True)
class ResNet:
    """Builds the ResNet for CIFAR of He et al. 2016, section 4.2, https://arxiv.org/abs/1512.03385.

    Three stages of `blocks` residual blocks with C, 2C and 4C channels, shortcuts of option A.

    Attributes:
        blocks: Of each stage; the network has 6 `blocks` + 2 layers: 3 is ResNet-20, 9 ResNet-56.
        width: C; 16 in the paper.
        image_shape: (C, H, W).
        classes: Number of classes.
    """

    blocks: int
    width: int
    image_shape: tuple[int, int, int]
    classes: int

    @property
    def depth(self) -> int:
        """Layers with weights, as in the network's name."""
        return 2 * RESNET_STAGES * self.blocks + 2

    def __call__(self) -> nn.Module:
        """Return the network, its convolutions drawn as He et al. 2015 do."""
        layers: list[nn.Module] = [
            nn.Conv2d(self.image_shape[0], self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
        ]
        channels = self.width
        for stage in range(RESNET_STAGES):
            for block in range(self.blocks):
                first = stage > 0 and block == 0
                wide = channels * 2 if first else channels
                layers.append(_ResidualBlock(channels, wide, 2 if first else 1))
                channels = wide
        model = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, self.classes)
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
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
    sizes = _mobilenet_sizes(image_shape, classes, last_channels)
    width = min(sizes, key=lambda w: abs(math.log(sizes[w] / params)))
    return MobileNetV2(width, image_shape, classes, last_channels)


def resnet_near(
    params: int, blocks: int, image_shape: tuple[int, int, int], classes: int
) -> ResNet:
    """Return the ResNet of so many blocks in a stage with about `params`, as `mobilenet_near`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_params(ResNet(blocks, width, image_shape, classes)())

    return ResNet(blocks, nearest_width(RESNET_WIDTHS, count, params), image_shape, classes)


def nearest_width(widths: Sequence[Width], count: Callable[[Width], int], params: int) -> Width:
    """Return the width whose count of params is nearest to `params`, on a logarithmic scale.

    Args:
        widths: Ascending.
        count: Of a network of that width; grows with it.
        params: A count.
    """
    above = bisect.bisect_left(widths, params, key=count)
    around = widths[max(0, above - 1) : above + 1]
    return min(around, key=lambda width: abs(math.log(count(width) / params)))


@functools.cache
def _mobilenet_sizes(
    image_shape: tuple[int, int, int], classes: int, last_channels: int
) -> dict[float, int]:
    with torch.device("meta"):
        networks = {w: MobileNetV2(w, image_shape, classes, last_channels) for w in WIDTHS}
        return {w: count_params(network()) for w, network in networks.items()}
