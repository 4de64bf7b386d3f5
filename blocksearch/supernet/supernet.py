"""Supernet: the network with every op on every edge, `supernet(x, gates)`."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blocksearch.ops import ResidualReduction, op_cost
from blocksearch.relaxation import Gates
from blocksearch.space import KINDS, Cell, SearchSpace
from blocksearch.supernet.cells import MixedCell
from blocksearch.supernet.forms import PLAIN, Form
from blocksearch.supernet.recompute import recomputed
from blocksearch.supernet.stack import STEM_MULTIPLIER, PlacedCell, Stack, layout


def reduction_positions(cells: int, stages: int) -> tuple[int, ...]:
    """Return which of `cells` cells halve the resolution: at L/3 and 2L/3 for three stages."""
    return tuple(sorted({stage * cells // stages for stage in range(1, stages)}))


class Supernet(nn.Module):
    """A stack of mixed cells between a stem and a linear classifier.

    The relaxation is an input: cells of one kind share the gates of that kind. BatchNorm always
    uses the statistics of the batch, so training and evaluation mode compute the same.

    Attributes:
        kinds: Of cells; where every cell is a kind of its own, `normal@0` and so on, by position.
        kind_of_cell: Index of the kind of each cell; None for a fixed residual block.
        in_bfloat16: Compute in bfloat16 where autocast allows; the logits stay float32.
        recompute: Keep the insides of no cell for the backward pass, see `recompute`.
    """

    in_bfloat16 = False
    recompute = False

    def __init__(
        self,
        space: SearchSpace,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: int,
        cells: int,
        stages: int,
        form: Form = PLAIN,
    ):
        """Build the supernet.

        Args:
            space: Ops and edges of every cell.
            image_shape: (C, H, W) of an image.
            classes: Number of classes.
            channels: Width of the first cells; it doubles at every reduction.
            cells: Number of cells L, at least one more than there are reductions. Where the space
                has no reduction cells, residual blocks stand in their places.
            stages: Number of resolutions.
            form: How the cells are built.

        Raises:
            ValueError: If the cells are too few for the stages, or cannot be built so.
        """
        super().__init__()
        reductions = reduction_positions(cells, stages)
        if len(reductions) != stages - 1 or 0 in reductions:
            raise ValueError(f"{stages} stages need at least {stages} cells, got {cells}")
        self.space = space
        self.form = form
        self.image_shape = image_shape
        self.classes = classes
        self.widths = [channels * 2 ** sum(r <= p for r in reductions) for p in range(cells)]
        self.reduces = [position in reductions for position in range(cells)]
        self.kinds, self.kind_of_cell = self._kinds()
        stem = (STEM_MULTIPLIER if space.output == "concat" else 1) * channels
        outputs = space.nodes if space.output == "concat" else 1
        fixed = [kind is None for kind in self.kind_of_cell]
        self.places = list(
            layout(
                [
                    (width, 1 if is_fixed else outputs, reduces)
                    for width, is_fixed, reduces in zip(
                        self.widths, fixed, self.reduces, strict=True
                    )
                ],
                stem,
                image_shape[1:],
            )
        )
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(stem, track_running_stats=False),
        )
        self.cells = nn.ModuleList(
            ResidualReduction(place.in_channels[1], place.channels, searching=True)
            if is_fixed
            else MixedCell(
                space,
                place.in_channels,
                place.channels,
                reduction=place.reduction,
                halve_first=place.halve_first,
                form=form,
            )
            for is_fixed, place in zip(fixed, self.places, strict=True)
        )
        last = self.places[-1].out_channels
        self.head: nn.Module | None = None
        if space.output == "last":
            self.head = nn.Sequential(nn.BatchNorm2d(last, track_running_stats=False), nn.ReLU())
        self.classifier = nn.Linear(last, classes)

    def _kinds(self) -> tuple[tuple[str, ...], list[int | None]]:
        """Names of the kinds, and the kind of each cell."""
        names = [KINDS[reduces] for reduces in self.reduces]
        searched = [name in self.space.kinds for name in names]
        if self.form.cell_kinds:
            names = [f"{name}@{position}" for position, name in enumerate(names)]
            kinds = tuple(n for n, is_searched in zip(names, searched, strict=True) if is_searched)
        else:
            kinds = self.space.kinds
        pairs = zip(names, searched, strict=True)
        return kinds, [kinds.index(name) if is_searched else None for name, is_searched in pairs]

    @property
    def searched(self) -> list[int]:
        """Positions of the cells that have ops to choose from."""
        return [p for p, kind in enumerate(self.kind_of_cell) if kind is not None]

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W) under `gates`.

        Args:
            x: Images.
            gates: Of every kind, or of every searched cell, along their first axis.

        Raises:
            ValueError: If the gates' shape is not (K, E, O).
        """
        own = tuple(gates.weight.shape)
        searched = self.searched
        choices = (len(self.space.edges), len(self.space.ops))
        if own == (len(self.kinds), *choices):
            rows = [self.kind_of_cell[position] for position in searched]
        elif own == (len(searched), *choices):
            rows = [*range(len(searched))]
        else:
            raise ValueError(f"gates must be {(len(self.kinds), *choices)}, got {own}")
        row_of = dict(zip(searched, rows, strict=True))
        reduced = (
            torch.autocast(x.device.type, torch.bfloat16) if self.in_bfloat16 else nullcontext()
        )
        with reduced:
            s0 = s1 = self.stem(x)
            for position, cell in enumerate(self.cells):
                chosen = (gates, row_of[position]) if position in row_of else ()
                if self.recompute and torch.is_grad_enabled():
                    s0, s1 = s1, recomputed(cell, s0, s1, *chosen)
                else:
                    s0, s1 = s1, cell(s0, s1, *chosen)
            if self.head is not None:
                s1 = self.head(s1)
            logits: Tensor = self.classifier(s1.mean(dim=(2, 3)))
        return logits.float() if self.in_bfloat16 else logits

    def found(self, cells: Mapping[str, Cell], channels: int | None = None) -> Stack:
        """Return the network that found cells make in the layout of this supernet.

        Args:
            cells: One for every kind, or one for every cell, as `normal@0` and so on.
            channels: Width of the first cells; that of the supernet if None.
        """
        scale = (channels or self.widths[0]), self.widths[0]
        placed = []
        for position, (kind, width) in enumerate(zip(self.kind_of_cell, self.widths, strict=True)):
            name = KINDS[self.reduces[position]]
            own = cells.get(f"{name}@{position}")
            cell = None if kind is None else own or cells[name]
            placed.append(PlacedCell(cell, width * scale[0] // scale[1], self.reduces[position]))
        return Stack(tuple(placed), self.image_shape, self.classes)

    def op_costs(self, cost: str = "params") -> Tensor:
        """Return what each op costs in this supernet, summed over the cells of its kind.

        Counted at the real width and resolution of every edge and with BatchNorm parameters, as
        the op will cost in a found network.

        Args:
            cost: `params` (a count) or `flops` (multiply-adds for one image).

        Returns:
            (K, E, O).
        """
        shape = len(self.kinds), len(self.space.edges), len(self.space.ops)
        costs = torch.zeros(shape, dtype=torch.float64)  # holds every count exactly
        for kind, place in zip(self.kind_of_cell, self.places, strict=True):
            if kind is None:
                continue
            for e, (source, _) in enumerate(self.space.edges):
                from_input = source < self.space.inputs
                stride = 2 if place.reduction and from_input else 1
                side = place.sides[1] if from_input else place.out_side
                for o, op in enumerate(self.space.ops):
                    one = op_cost(
                        op, place.channels, stride, side, self.form.one_bit, self.space.own
                    )
                    costs[kind, e, o] += one.count(cost)
        return costs
