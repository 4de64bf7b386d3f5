"""Weights that all networks of a space share: trained once, then any network is scored in seconds.

`SharedWeights` is a store, not a network: for every place (stage and position, or reduction) and
every block it holds the parameters of the block at its largest width. A network of the space is the
`CellNetwork` that `builder` makes of its spec, run on slices of the store, so that no forward pass
is written twice and gradients flow into the slices. A stage of n blocks uses its first n positions.

A cell's C channels are four quarters, and a narrower cell takes the first C / 4 channels of each,
not the first C of all. For `factorized_reduce` and `ghost_3x3` concatenate halves, and grouped
convolutions work on quarters: so a channel keeps its meaning at every width, and a narrow network
is the wide one with the other channels held at zero (exactly, for every op but `gshuffle_3x3`,
whose groups after the shuffle mix other channels at another width, and the 1-bit ones, which have
no zero). What reads N concatenated nodes takes the quarters of each; the stem counts as 3 nodes.

How they are trained and what they are good for: `shared_training.py`.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from blocksearch.space import Cell, OwnOps
from blocksearch.supernet.cells import DiscreteCell
from blocksearch.supernet.stack import STEM_MULTIPLIER, CellNetwork, PlacedCell, Stack
from evaluation.errors import InputError
from evaluation.files.bounded import check_file, parse_json
from netsearch.space.genome import GenomeSpace, NetworkSpec
from netsearch.space.networks import Networks

QUARTERS = 4
FIRST, SECOND, OWN = range(3)  # the width that an axis follows: an input's, older first, or C
PROBE = (24, 24, 8)  # those three widths of a small cell

Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class _Entry:
    """A parameter in the store: its beginning, its shape, the width that each axis follows."""

    offset: int
    shape: tuple[int, ...]
    axes: Axes


@dataclass(frozen=True)
class _Part:
    """A part of a network: its name there and in the store, and what it reads.

    `nodes` and `widths` are those of the older and of the newer input; `widths` ends with C.
    """

    name: str
    key: str
    nodes: tuple[int, int]
    widths: tuple[int, int, int]


class SharedWeights:
    """The store: one vector of weights, and which of them a network takes.

    Attributes:
        networks: Those that share.
        space: Of their genomes.
        cells: Block name to cell.
        weights: All weights, (P,), a leaf of autograd.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        seed: int = 0,
    ):
        """Draw initial weights from `seed` alone, as PyTorch does for the largest networks.

        Raises:
            InputError: If a width is no multiple of 4, or a block is a cell of NAS-Bench-201, which
                hands on a sum or has a single input.
        """
        space, cells = networks.space, networks.cells
        _check(space, cells)
        used = {name: cells[name] for name in (*space.normal, *space.reduction)}
        self.networks, self.space, self.cells = replace(networks, cells=used), space, used
        self._entries: dict[str, dict[str, _Entry]] = {}
        values: list[Tensor] = []
        count = 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._frame = self._ends()
            for key, module, axes in self._modules():
                self._entries[key] = {}
                for name, parameter in module.named_parameters():
                    entry = _Entry(count, tuple(parameter.shape), axes[name])
                    self._entries[key][name] = entry
                    values.append(parameter.detach().flatten())
                    count += parameter.numel()
        self.weights = torch.cat(values).requires_grad_()
        self._part_index = functools.lru_cache(maxsize=2048)(self._index_of_part)
        self._body = functools.lru_cache(maxsize=2048)(_body)

    def to(self, device: torch.device | str) -> "SharedWeights":
        """Move the weights to `device`, in place."""
        self.weights = self.weights.detach().to(device).requires_grad_()
        self._part_index.cache_clear()
        return self

    def index(self, spec: NetworkSpec) -> Tensor:
        """Return which weights a network takes, in the order of its parameters; each once.

        Raises:
            InputError: If the network is not in the space.
        """
        return torch.cat([self._part_index(part) for part in self._parts(spec)])

    def inherit(self, spec: NetworkSpec) -> dict[str, Tensor]:
        """Return the parameters of a network by name, slices through which gradients flow.

        Raises:
            InputError: If the network is not in the space.
        """
        taken = self.weights.index_select(0, self.index(spec))
        shapes = {
            f"{part.name}.{name}": _shape(entry, part, self._widest)
            for part in self._parts(spec)
            for name, entry in self._entries[part.key].items()
        }
        slices = torch.split(taken, [math.prod(shape) for shape in shapes.values()])
        pairs = zip(shapes.items(), slices, strict=True)
        return {name: values.view(shape) for (name, shape), values in pairs}

    def logits(self, spec: NetworkSpec, images: Tensor) -> Tensor:
        """Return what a network makes of images (B, C, H, W), on the statistics of this batch.

        Raises:
            InputError: If the network is not in the space.
        """
        parameters = self.inherit(spec)
        stack = self.networks.of(spec)
        pairs = zip(stack.cells, stack.places(), strict=True)
        self._frame.cells = nn.ModuleList(
            self._body(one, place.in_channels, place.halve_first, number)
            for number, (one, place) in enumerate(pairs)
        )
        return cast(Tensor, functional_call(self._frame, parameters, (images,), strict=True))

    @torch.no_grad()
    def network(self, spec: NetworkSpec) -> CellNetwork:
        """Return a network with its own copy of the weights, and BatchNorms that measured nothing.

        Raises:
            InputError: If the network is not in the space.
        """
        inherited = self.inherit(spec)
        with torch.device("meta"):  # draws no weights
            network = self.networks.of(spec)()
        network = network.to_empty(device=self.weights.device)
        for name, parameter in network.named_parameters():
            parameter.copy_(inherited[name])
        for norm in batch_norms(network):
            norm.reset_running_stats()
        return network.to(memory_format=torch.channels_last)

    def to_bytes(self) -> bytes:
        """Return a file of the weights by name, and of what is needed to load them: safetensors."""
        flat = self.weights.detach().cpu()
        tensors = {
            f"{key}.{name}": flat[entry.offset :][: math.prod(entry.shape)].view(entry.shape)
            for key, entries in self._entries.items()
            for name, entry in entries.items()
        }
        about = {
            "space": asdict(self.space),
            "cells": {name: cell.to_json() for name, cell in self.cells.items()},
            "image_shape": self.networks.image_shape,
            "classes": self.networks.classes,
        }
        return save(tensors, {"shared_weights": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, own: OwnOps = ()) -> Self:
        """Read what `to_bytes` made, onto the CPU; the cells may have a user's own ops.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        try:
            check_file(path)
            with safe_open(path, "pt") as file:
                about = parse_json((file.metadata() or {})["shared_weights"].encode())
                fields = about["space"]
                space = GenomeSpace(
                    int(fields["stages"]),
                    depths=tuple(fields["depths"]),
                    widths=tuple(fields["widths"]),
                    normal=tuple(fields["normal"]),
                    reduction=tuple(fields["reduction"]),
                )
                cells = {name: Cell.from_json(cell, own) for name, cell in about["cells"].items()}
                shape = tuple(about["image_shape"])
                networks = Networks(space, cells, shape, about["classes"])
                if space.stages * max(space.depths) > len(file.keys()):
                    raise ValueError("it describes more cells than it has tensors")
                with torch.device("meta"):  # nothing is allocated before it is known to fit
                    needed = cls(networks).weights.nbytes
                if needed > path.stat().st_size:
                    raise ValueError(f"it describes {needed:,} bytes of weights")
                shared = cls(networks)
                with torch.no_grad():
                    for key, entries in shared._entries.items():
                        for name, entry in entries.items():
                            place = shared.weights[entry.offset :][: math.prod(entry.shape)]
                            place.view(entry.shape).copy_(file.get_tensor(f"{key}.{name}"))
        except (
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            AttributeError,
            ArithmeticError,
            MemoryError,
        ) as error:
            raise InputError(f"{path}: expected a file of shared weights, got {error}") from error
        return shared

    @property
    def _widest(self) -> int:
        return max(self.space.widths)

    @property
    def _most_nodes(self) -> int:
        return max(STEM_MULTIPLIER, *(len(cell.outputs) for cell in self.cells.values()))

    def _ends(self) -> CellNetwork:
        """A network with the largest stem and classifier; its one cell is to be exchanged."""
        last = max(self.cells.values(), key=lambda cell: len(cell.outputs))
        placed = PlacedCell(last, self._widest, reduction=False)
        network = Stack((placed,), self.networks.image_shape, self.networks.classes)()
        _forget_statistics(network)
        return network

    def _modules(self) -> Iterator[tuple[str, nn.Module, dict[str, Axes]]]:
        """Yield what the store holds: key, module at its largest, axes of its parameters."""
        stem: dict[str, Axes] = {"0.weight": (OWN, None, None, None)}
        yield "stem", self._frame.stem, stem | {"1.weight": (OWN,), "1.bias": (OWN,)}
        classifier: dict[str, Axes] = {"weight": (None, SECOND), "bias": (None,)}
        yield "classifier", self._frame.classifier, classifier
        space, c = self.space, self._widest
        places = [
            (f"reductions.{i}", space.reduction, True, False) for i in range(space.stages - 1)
        ] + [
            (f"stages.{i}.{position}", space.normal, False, i > 0 and position == 0)
            for i in range(space.stages)
            for position in range(max(space.depths))
        ]
        widths = (self._most_nodes * c, self._most_nodes * c, c)
        for place, names, reduction, halve_first in places:
            for name in names:
                build = functools.partial(_cell, self.cells[name], reduction, halve_first)
                yield f"{place}.{name}", build(widths), _axes(build)

    def _parts(self, spec: NetworkSpec) -> list[_Part]:
        self._check_spec(spec)
        width = spec.stages[0].channels
        inputs = [(STEM_MULTIPLIER, width)] * 2
        named = []
        for i, stage in enumerate(spec.stages):
            if i:
                named.append((f"reductions.{i - 1}", spec.reductions[i - 1], stage.channels))
            for position in range(stage.repeats):
                named.append((f"stages.{i}.{position}", stage.block, stage.channels))
        parts = [_part("stem", "stem", inputs, width)]
        for number, (place, block, channels) in enumerate(named):
            parts.append(_part(f"cells.{number}", f"{place}.{block}", inputs, channels))
            inputs = [inputs[1], (len(self.cells[block].outputs), channels)]
        return [*parts, _part("classifier", "classifier", inputs, inputs[1][1])]

    def _check_spec(self, spec: NetworkSpec) -> None:
        try:
            known = self.space.decode(self.space.encode(spec)) == spec
        except ValueError:
            known = False
        if not known:
            raise InputError(f"expected a network of {self.space}, got {spec}")

    def _index_of_part(self, part: _Part) -> Tensor:
        """Return the places in the store of a part's parameters, int64."""
        found = []
        for entry in self._entries[part.key].values():
            index = torch.zeros(1, dtype=torch.int64)
            shape = _shape(entry, part, self._widest)
            for size, stored, axis in zip(shape, entry.shape, entry.axes, strict=True):
                place = torch.arange(size)
                if axis is not None:
                    quarter, largest = part.widths[axis] // QUARTERS, self._widest // QUARTERS
                    place = place // quarter * largest + place % quarter
                index = (index[:, None] * stored + place).flatten()
            found.append(entry.offset + index)
        return torch.cat(found).to(self.weights.device)


def _check(space: GenomeSpace, cells: Mapping[str, Cell]) -> None:
    odd = [width for width in space.widths if width % QUARTERS]
    if odd:
        raise InputError(f"shared weights need widths that are multiples of 4, got {odd}")
    for name in (*space.normal, *space.reduction):
        cell = cells[name]
        if cell.output != "concat" or cell.inputs != 2:
            raise InputError(
                f"block {name}: shared weights need cells of 2 inputs that concatenate their "
                f"nodes, got {cell.inputs} and output {cell.output!r}"
            )


def _part(name: str, key: str, inputs: Sequence[tuple[int, int]], channels: int) -> _Part:
    (first_nodes, first), (second_nodes, second) = inputs
    return _Part(name, key, (first_nodes, second_nodes), (first, second, channels))


def _shape(entry: _Entry, part: _Part, widest: int) -> tuple[int, ...]:
    """Return the shape that a stored parameter has in a part of a network."""
    sizes = []
    for stored, axis in zip(entry.shape, entry.axes, strict=True):
        if axis is None:
            sizes.append(stored)
        elif axis == OWN:
            sizes.append(stored * part.widths[OWN] // widest)
        else:
            sizes.append(part.nodes[axis] * part.widths[axis])
    return tuple(sizes)


def _cell(
    cell: Cell, reduction: bool, halve_first: bool, widths: tuple[int, int, int]
) -> DiscreteCell:
    first, second, channels = widths
    return DiscreteCell(
        cell, (first, second), channels, reduction=reduction, halve_first=halve_first
    )


def _axes(build: Callable[[tuple[int, int, int]], nn.Module]) -> dict[str, Axes]:
    """Find which width each axis of a module's parameters follows, by doubling one at a time."""

    def shapes(widths: Sequence[int]) -> dict[str, torch.Size]:
        with torch.device("meta"):
            module = build((widths[0], widths[1], widths[2]))
        return {name: parameter.shape for name, parameter in module.named_parameters()}

    usual = shapes(PROBE)
    doubled = [
        shapes([size * (1 + (axis == other)) for other, size in enumerate(PROBE)])
        for axis in (FIRST, SECOND, OWN)
    ]
    return {
        name: tuple(
            next((axis for axis in (FIRST, SECOND, OWN) if doubled[axis][name][i] != size), None)
            for i, size in enumerate(shape)
        )
        for name, shape in usual.items()
    }


def _body(
    placed: PlacedCell, in_channels: tuple[int, int], halve_first: bool, number: int
) -> DiscreteCell:
    """A cell without weights, to be run on slices; its number keeps equal cells apart."""
    widths = *in_channels, placed.channels
    with torch.device("meta"):
        cell = _cell(cast(Cell, placed.cell), placed.reduction, halve_first, widths)
    _forget_statistics(cell)
    return cell


def _forget_statistics(module: nn.Module) -> None:
    """Let BatchNorms use their batch only: shared statistics would mix those of all networks."""
    for norm in batch_norms(module):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the BatchNorms of a module, in its order."""
    return [one for one in module.modules() if isinstance(one, nn.BatchNorm2d)]
