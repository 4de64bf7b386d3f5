"""Published networks that the headline compares with: DARTS_V2 and CIFAR's ResNets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from blocksearch.space import Cell, Edge
from blocksearch.supernet.stack import PlacedCell, Stack
from evaluation.cost.counts import count_params, measure_cost
from evaluation.records import Cost
from evaluation.training.ready_made import nearest_width

RESNET_WIDTHS = range(2, 33)  # channels of the first stage; 16 in the paper
RESNET_STAGES = 3

# Liu, Simonyan, Yang 2019, `genotypes.py` of quark0/darts: the ops of each node and what they read.
DARTS_V2 = {
    "normal": Cell(
        (
            (Edge(0, "sep_conv_3x3"), Edge(1, "sep_conv_3x3")),
            (Edge(0, "sep_conv_3x3"), Edge(1, "sep_conv_3x3")),
            (Edge(1, "sep_conv_3x3"), Edge(0, "skip_connect")),
            (Edge(0, "skip_connect"), Edge(2, "dil_conv_3x3")),
        )
    ),
    "reduction": Cell(
        (
            (Edge(0, "max_pool_3x3"), Edge(1, "max_pool_3x3")),
            (Edge(2, "skip_connect"), Edge(1, "max_pool_3x3")),
            (Edge(0, "max_pool_3x3"), Edge(2, "skip_connect")),
            (Edge(2, "skip_connect"), Edge(1, "max_pool_3x3")),
        )
    ),
}
DARTS_CELLS = 20
DARTS_WIDTHS = range(2, 37)  # 36 in the paper


def darts_v2(channels: int, image_shape: tuple[int, int, int], classes: int) -> Stack:
    """Return DARTS_V2 of 20 cells in its published layout, without the auxiliary head.

    Args:
        channels: Width C of the first cells, doubled by cells 6 and 13, which reduce.
        image_shape: (C, H, W).
        classes: Number of classes.
    """
    reductions = (DARTS_CELLS // 3, 2 * DARTS_CELLS // 3)
    placed = []
    for number in range(DARTS_CELLS):
        reduces = number in reductions
        channels *= 2 if reduces else 1
        cell = DARTS_V2["reduction" if reduces else "normal"]
        placed.append(PlacedCell(cell, channels, reduces))
    return Stack(tuple(placed), image_shape, classes)


def darts_v2_near(params: int, image_shape: tuple[int, int, int], classes: int) -> Stack:
    """Return the DARTS_V2 whose params are nearest to `params`, on a logarithmic scale."""

    def count(channels: int) -> int:
        return darts_v2(channels, image_shape, classes).cost().params

    return darts_v2(nearest_width(DARTS_WIDTHS, count, params), image_shape, classes)


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


def resnet_near(
    params: int, blocks: int, image_shape: tuple[int, int, int], classes: int
) -> ResNet:
    """Return the ResNet of so many blocks in a stage with about `params`, as `mobilenet_near`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_params(ResNet(blocks, width, image_shape, classes)())

    return ResNet(blocks, nearest_width(RESNET_WIDTHS, count, params), image_shape, classes)
