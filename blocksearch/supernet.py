"""Supernet: the network with every op on every edge, `supernet(x, gates)`."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blocksearch.cells import MixedCell
from blocksearch.ops import op_cost
from blocksearch.relaxation import Gates
from blocksearch.space import KINDS, SearchSpace

STEM_MULTIPLIER = 3  # as in DARTS: the stem has 3 C channels


def reduction_positions(cells: int, stages: int) -> tuple[int, ...]:
    """Return which of `cells` cells halve the resolution: at L/3 and 2L/3 for three stages."""
    return tuple(sorted({stage * cells // stages for stage in range(1, stages)}))


class Supernet(nn.Module):
    """A stack of mixed cells between a stem and a linear classifier.

    The relaxation is an input: cells of one kind share the gates of that kind. BatchNorm always
    uses the statistics of the batch, so training and evaluation mode compute the same.

    Attributes:
        in_bfloat16: Compute in bfloat16 where autocast allows; the logits stay float32.
    """

    in_bfloat16 = False

    def __init__(
        self,
        space: SearchSpace,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: int,
        cells: int,
        stages: int,
    ):
        """Build the supernet.

        Args:
            space: Ops and edges of every cell.
            image_shape: (C, H, W) of an image.
            classes: Number of classes.
            channels: Width of the first cells; it doubles at every reduction.
            cells: Number of cells L, at least one more than there are reductions.
            stages: Number of resolutions.

        Raises:
            ValueError: If the cells are too few for the stages.
        """
        super().__init__()
        reductions = reduction_positions(cells, stages)
        if len(reductions) != stages - 1 or 0 in reductions:
            raise ValueError(f"{stages} stages need at least {stages} cells, got {cells}")
        self.space = space
        self.kinds = KINDS
        self.image_shape = image_shape
        stem = STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem, track_running_stats=False),
        )
        self.cells = nn.ModuleList()
        self.kind_of_cell: list[int] = []
        in_channels, halve_first = (stem, stem), False
        for position in range(cells):
            reduction = position in reductions
            channels = channels * 2 if reduction else channels
            cell = MixedCell(
                space, in_channels, channels, reduction=reduction, halve_first=halve_first
            )
            self.cells.append(cell)
            self.kind_of_cell.append(int(reduction))
            in_channels, halve_first = (in_channels[1], cell.out_channels), reduction
        self.classifier = nn.Linear(in_channels[1], classes)

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W) under `gates`.

        Raises:
            ValueError: If the gates' shape is not (K, E, O).
        """
        expected = (len(self.kinds), len(self.space.edges), len(self.space.ops))
        if gates.weight.shape != expected:
            raise ValueError(f"gates must be {expected}, got {tuple(gates.weight.shape)}")
        reduced = (
            torch.autocast(x.device.type, torch.bfloat16) if self.in_bfloat16 else nullcontext()
        )
        with reduced:
            s0 = s1 = self.stem(x)
            for kind, cell in zip(self.kind_of_cell, self.cells, strict=True):
                s0, s1 = s1, cell(s0, s1, gates, kind)
            logits: Tensor = self.classifier(s1.mean(dim=(2, 3)))
        return logits.float() if self.in_bfloat16 else logits

    def op_costs(self, cost: str = "params") -> Tensor:
        """Return what each op costs in this supernet, summed over the cells of its kind.

        Counted at the real width and resolution of every edge and with BatchNorm parameters, as
        the op will cost in a found network.

        Args:
            cost: `params` (a count) or `flops` (multiply-adds for one image).

        Returns:
            (K, E, O).
        """
        costs = torch.zeros(len(self.kinds), len(self.space.edges), len(self.space.ops))
        height, width = self.image_shape[1:]
        for kind, cell in zip(self.kind_of_cell, self.cells, strict=True):
            assert isinstance(cell, MixedCell)
            channels = cell.out_channels // self.space.nodes
            halved = ((height + 1) // 2, (width + 1) // 2) if kind else (height, width)
            for e, (source, _) in enumerate(self.space.edges):
                from_input = source < self.space.inputs
                stride = 2 if kind and from_input else 1
                side = (height, width) if from_input else halved
                for o, op in enumerate(self.space.ops):
                    measured = op_cost(op, channels, stride, side)
                    costs[kind, e, o] += measured.count(cost)
            height, width = halved
        return costs
