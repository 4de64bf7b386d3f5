"""What a mixed cell runs on the kernels: its ops, sorted by state and by how they are computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor, nn

from blocksearch.kernels.compiled import UNIT, is_depthwise, is_pointwise
from blocksearch.ops import Op, Separable


@dataclass(frozen=True)
class Term:
    """One active op on one edge: what it adds to a node of the cell."""

    source: int
    node: int
    op: Op


Places = dict[tuple[nn.Module, str], int]


class CellPlan:
    """What a cell runs, in the order in which the kernels take it; made once for each set of ops.

    Args:
        terms: The active ops, grouped by node.
        inputs: Number of input states.
        nodes: Number of nodes N.
        stride: 2 in a cell that halves the resolution of its inputs.
    """

    def __init__(self, terms: Sequence[Term], inputs: int, nodes: int, stride: int):
        self.terms, self.inputs, self.nodes, self.stride = list(terms), inputs, nodes, stride
        self.holders = [
            (module, name)
            for term in terms
            for module in term.op.modules()
            for name, _ in module.named_parameters(recurse=False)
        ]
        self.place = {holder: k for k, holder in enumerate(self.holders)}
        self.sizes = [p.numel() for p in self.parameters()]
        first = np.cumsum([0, *self.sizes])
        self.leaving = [Leaving(self.terms, s, self.place, first) for s in range(inputs + nodes)]
        arriving = [[t for t, term in enumerate(terms) if term.node == n] for n in range(nodes)]
        self.arriving = [slice(a[0], a[-1] + 1) if a else slice(0) for a in arriving]
        self.has_norm = np.array([term.op.norm is not None for term in terms])
        self.node_of = np.array([term.node for term in terms])
        norms = [term.op.norm for term in terms if term.op.norm is not None]
        forms = {(norm.eps, norm.affine, norm.track_running_stats) for norm in norms}
        if len(forms) > 1 or any(affine or tracks for _, affine, tracks in forms):
            raise ValueError(
                "a mixed cell needs BatchNorms of one eps, without parameters and running "
                f"statistics, got {sorted(forms)}"
            )
        self.eps = norms[0].eps if norms else 0.0

    def parameters(self) -> list[Tensor]:
        """Return those of the ops at this moment; a module may be given others."""
        return [cast(Tensor, module._parameters[name]) for module, name in self.holders]

    def places(self, term: Term) -> list[int]:
        """Where `parameters` has those of a term."""
        modules = set(term.op.modules())
        return [k for k, (module, _) in enumerate(self.holders) if module in modules]


class Leaving:
    """The terms that read one state, by the way they are computed."""

    def __init__(self, terms: list[Term], source: int, place: Places, first: np.ndarray):
        by_type: dict[type[nn.Module] | None, list[int]] = {}
        for t, term in enumerate(terms):
            if term.source == source:
                by_type.setdefault(_type_of(term.op), []).append(t)
        self.skips = by_type.get(nn.Identity, [])
        self.others = by_type.get(None, [])
        self.pools = [
            (is_max, by_type[pool])
            for is_max, pool in ((True, nn.MaxPool2d), (False, nn.AvgPool2d))
            if pool in by_type
        ]
        separable = by_type.get(Separable, [])
        self.layers = []
        for depth in (0, 1):
            layer = Layer(terms, separable, depth, place, first)
            if layer.terms:
                self.layers.append(layer)


class Layer:
    """The first or the second units of the separable ops that leave one state."""

    def __init__(
        self, terms: list[Term], separable: list[int], depth: int, place: Places, first: np.ndarray
    ):
        bodies = {t: cast(Separable, terms[t].op.body).convolutions for t in separable}
        self.terms = [t for t in separable if len(bodies[t]) > 2 * depth]
        self.last = np.array([len(bodies[t]) == 2 * depth + 2 for t in self.terms], dtype=bool)
        self.before = [separable.index(t) for t in self.terms]  # its place in the layer before
        self.depthwise = [bodies[t][2 * depth] for t in self.terms]
        self.pointwise = [bodies[t][2 * depth + 1] for t in self.terms]
        self.places = np.array(
            [
                [place[conv, "weight"] for conv in convs]
                for convs in (self.depthwise, self.pointwise)
            ],
            dtype=int,
        )
        self.pad = max((cast(int, conv.padding[0]) for conv in self.depthwise), default=0)
        self.units = np.zeros(len(self.terms), UNIT)
        self.units["kernel"] = [conv.kernel_size[0] for conv in self.depthwise]
        self.units["dilation"] = [conv.dilation[0] for conv in self.depthwise]
        self.offsets = first[self.places].astype(np.uint64)
        self.last_terms = [t for t, last in zip(self.terms, self.last, strict=True) if last]
        self.last_places = [k for k, last in enumerate(self.last) if last]


def _type_of(op: Op) -> type[nn.Module] | None:
    """The type by which the kernels know a body; None leaves it to PyTorch."""
    body = op.body
    if isinstance(body, nn.Identity) and not op.relu and op.norm is None:
        return nn.Identity
    if op.norm is None:
        return None
    if isinstance(body, Separable) and op.relu:
        depthwise, pointwise = body.convolutions[::2], body.convolutions[1::2]
        known = all(map(is_depthwise, depthwise)) and all(map(is_pointwise, pointwise))
        later = [conv for conv in depthwise[1:] if conv.stride != (1, 1)]
        return Separable if known and not later and len(depthwise) <= 2 else None
    if isinstance(body, nn.MaxPool2d) and not op.relu:
        form: tuple[object, ...] = (body.kernel_size, body.padding, body.dilation, body.ceil_mode)
        return nn.MaxPool2d if form == (3, 1, 1, False) else None
    if isinstance(body, nn.AvgPool2d) and not op.relu:
        form = (body.kernel_size, body.padding, body.count_include_pad, body.ceil_mode)
        unusual = body.divisor_override is not None
        return nn.AvgPool2d if form == (3, 1, False, False) and not unusual else None
    return None
