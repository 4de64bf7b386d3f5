"""What a found cell runs on the kernels: its ops as steps from state to state, made once a cell."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor, nn

from blocksearch.kernels.compiled import is_depthwise, is_pointwise
from blocksearch.ops import ChannelShuffle, Ghost, Op, TwoGrids

Side = tuple[int, int]


class Kind(IntEnum):
    """What a step is, as in state.h; OTHER is left to PyTorch."""

    SKIP, MAX_POOL, AVG_POOL, UNIT, CONCAT, OTHER = range(6)


class Columns(IntEnum):
    """What the columns of a unit are, as in state.h."""

    PLAIN, DEPTHWISE, AVERAGES, GRIDS = range(4)


@dataclass(frozen=True, eq=False)
class Step:
    """What leaves one state and arrives at another: a skip, a pool, a unit, or what PyTorch runs.

    A unit is ReLU, a depthwise convolution or another gathering of pixels, a 1x1 convolution and
    BatchNorm.

    Attributes:
        inverse: Where a unit reads its channels shuffled, the place of each in that order.
    """

    kind: Kind
    source: int
    target: int
    inputs: int
    outputs: int
    stride: int = 1
    columns: Columns = Columns.PLAIN
    depthwise: nn.Conv2d | None = None
    pointwise: nn.Conv2d | TwoGrids | None = None
    norm: nn.BatchNorm2d | None = None
    inverse: Tensor | None = None
    op: nn.Module | None = None

    @functools.cached_property
    def by_pixel(self) -> bool:
        """Whether each pixel is read by itself."""
        return self.kind == Kind.UNIT and self.columns == Columns.PLAIN

    @functools.cached_property
    def pad(self) -> int:
        """The border that it wants around its state."""
        return cast(int, self.depthwise.padding[0]) if self.depthwise is not None else 0

    @functools.cached_property
    def weight_names(self) -> tuple[str, ...]:
        """Which weights of state.h it has, in the order of `weights`."""
        has = ("dw", self.depthwise), ("pw", self.pointwise)
        return tuple(name for name, layer in has if layer is not None)

    @functools.cached_property
    def count(self) -> int:
        """Tensors that it learns, those of its norm not counted."""
        return len(self.own_parameters()) if self.kind == Kind.OTHER else len(self.weight_names)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of what PyTorch runs."""
        op = self.op.body if isinstance(self.op, Op) else self.op
        return [] if op is None else list(op.parameters())

    def body(self, state: Tensor) -> Tensor:
        """Run in PyTorch all but the norm."""
        if not isinstance(self.op, Op):
            return cast(Tensor, cast(nn.Module, self.op)(state))
        return cast(Tensor, self.op.body(torch.relu(state) if self.op.relu else state))

    def tensors(self) -> list[Tensor]:
        """All that it learns at this moment, as the kernels read it, those of its norm last."""
        norm = self.norm
        affine = [norm.weight, norm.bias] if norm is not None and norm.affine else []
        return [*(self.own_parameters() if self.kind == Kind.OTHER else self._weights()), *affine]

    def _weights(self) -> Iterator[Tensor]:
        """Depthwise (K, 1, k, k) and pointwise (N, K)."""
        if self.depthwise is not None:
            weight = self.depthwise.weight
            yield weight if self.inverse is None else weight[self.inverse]
        if self.pointwise is not None:
            weight = _dense(self.pointwise)
            yield weight if self.inverse is None else weight[:, self.inverse]

    def numbers(self) -> dict[str, int]:
        """What state.h knows of it."""
        conv = self.depthwise
        kernel, dilation = (conv.kernel_size[0], conv.dilation[0]) if conv is not None else (0, 0)
        return {
            "kind": self.kind,
            "columns": self.columns,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "kernel": kernel,
            "dilation": dilation,
            "stride": self.stride,
        }


def _dense(layer: nn.Conv2d | TwoGrids) -> Tensor:
    """The weight (N, K) of a 1x1 convolution, with zeros where groups or grids do not meet.

    At these widths a few zeros cost less than a convolution per group.
    """
    if isinstance(layer, TwoGrids):
        blocks: Sequence[Tensor] = [layer.even.weight.flatten(1), layer.odd.weight.flatten(1)]
    elif layer.groups == 1:
        return layer.weight.flatten(1)
    else:
        blocks = layer.weight.flatten(1).chunk(layer.groups)
    return cast(Tensor, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


class FoundPlan:
    """The states of a found cell, and the steps between them, in the order in which they run.

    Args:
        inputs: Channels of what the cell reads.
        channels: Width of the cell.
    """

    def __init__(self, inputs: Sequence[int], channels: int):
        self.inputs, self.channels = len(inputs), channels
        self.widths = list(inputs)
        self.steps: list[Step] = []
        self.order: list[int] = list(range(self.inputs))
        self.outputs: list[int] = []

    def state(self, width: int | None = None) -> int:
        """Add a state, and return its number."""
        self.widths.append(self.channels if width is None else width)
        return len(self.widths) - 1

    def add(self, op: nn.Module, source: int, target: int, stride: int) -> None:
        """Have an op lead to another state, of the source's resolution divided by `stride`."""
        width, outputs = self.widths[source], self.widths[target]
        first = Step(Kind.OTHER, source, target, width, outputs, stride, op=op)
        layers = layers_of(op, first)
        if layers is None:
            norm = op.norm if isinstance(op, Op) else None
            layers = [replace(first, norm=norm)]
        for layer in layers:
            if layer is not layers[-1]:
                layer = replace(layer, target=self.state(layer.outputs))
            self.steps.append(replace(layer, source=source))
            source = layer.target

    def finish(self, nodes: Sequence[int], outputs: Sequence[int]) -> None:
        """Settle the order of the states; `nodes` come last, and `outputs` are handed on."""
        self.outputs = list(outputs)
        between = [s for s in range(self.inputs, len(self.widths)) if s not in nodes]
        done, waiting = set(range(self.inputs)), [*between, *nodes]
        while waiting:
            ready = next(
                s for s in waiting if all(step.source in done for step in self.arriving(s))
            )
            waiting.remove(ready)
            done.add(ready)
            self.order.append(ready)
        for state in self.order:  # each is asked for many times
            self._by_state[state] = self._around(state)

    @functools.cached_property
    def _by_state(self) -> dict[int, tuple[list[Step], ...]]:
        return {}

    def _around(self, state: int) -> tuple[list[Step], ...]:
        leaving = [step for step in self.steps if step.source == state]
        own = [s for s in leaving if s.kind not in (Kind.SKIP, Kind.OTHER)]
        others = [s for s in leaving if s.kind == Kind.OTHER]
        skips = [s for s in leaving if s.kind == Kind.SKIP]
        return own, others, skips, [s for s in self.steps if s.target == state]

    def leaving(self, state: int) -> tuple[list[Step], list[Step]]:
        """What leaves a state on the kernels, and what in PyTorch."""
        return self._by_state[state][:2]  # type: ignore[return-value]

    def skips(self, state: int) -> list[Step]:
        """The skips that leave a state."""
        return self._by_state[state][2]

    def arriving(self, state: int) -> list[Step]:
        """What a state is the sum of."""
        return [step for step in self.steps if step.target == state]

    @functools.cached_property
    def is_known(self) -> bool:
        """Whether the kernels run any unit of it: without one, PyTorch is as good."""
        return any(step.kind == Kind.UNIT for step in self.steps)

    @functools.cached_property
    def norms(self) -> list[nn.BatchNorm2d]:
        """The BatchNorms of all steps."""
        return [step.norm for step in self.steps if step.norm is not None]

    @functools.cached_property
    def stored(self) -> list[int]:
        """The states that are kept; the others are an affine map of the output of one step."""
        return [
            state
            for state in self.order[self.inputs :]
            if state in self.outputs or len(self.arriving(state)) != 1 or self.leaving(state)[1]
        ]

    def sides(self, inputs: Sequence[Side]) -> dict[int, Side]:
        """The resolution of every state, from that of the inputs."""
        sides = dict(enumerate(inputs))
        for state in self.order[self.inputs :]:
            for step in self.arriving(state):
                height, width = sides[step.source]
                sides[state] = -(-height // step.stride), -(-width // step.stride)
        return sides


def plan_of(op: nn.Module, inputs: int, outputs: int, stride: int = 1) -> FoundPlan:
    """Return the plan of an op by itself, from and to so many channels."""
    plan = FoundPlan([inputs], outputs)
    target = plan.state()
    plan.add(op, 0, target, stride)
    plan.finish([target], [target])
    return plan


def layers_of(op: nn.Module, step: Step) -> list[Step] | None:
    """What an op does, one step after the other; None leaves it to PyTorch.

    Args:
        op: The op.
        step: From its source to its target, of their widths.
    """
    if not isinstance(op, Op):
        return None
    body, known = op.body, op.norm is not None and op.relu
    plain = replace(step, op=None, norm=op.norm, stride=1)
    if isinstance(body, nn.Identity) and not op.relu and op.norm is None:
        return [replace(plain, kind=Kind.SKIP)]
    if isinstance(body, nn.MaxPool2d | nn.AvgPool2d) and not op.relu:
        return _pool(body, plain)
    if isinstance(body, TwoGrids) and known:
        double = {"inputs": 2 * step.inputs, "stride": 2, "columns": Columns.GRIDS}
        return [replace(plain, kind=Kind.UNIT, pointwise=body, **cast(Any, double))]
    if isinstance(body, Ghost) and known:
        return _ghost(body, plain)
    layers = list(body) if isinstance(body, nn.Sequential) else [body]
    return _units([*layers, op.norm], plain) if known else None


def _pool(pool: nn.MaxPool2d | nn.AvgPool2d, plain: Step) -> list[Step] | None:
    form: tuple[object, ...] = pool.kernel_size, pool.padding, pool.ceil_mode
    stride = pool.stride if isinstance(pool.stride, int) else 0
    if form != (3, 1, False) or stride not in (1, 2):
        return None
    if isinstance(pool, nn.MaxPool2d):
        return None if pool.dilation != 1 else [replace(plain, kind=Kind.MAX_POOL, stride=stride)]
    if pool.count_include_pad or pool.divisor_override is not None:
        return None
    return [replace(plain, kind=Kind.AVG_POOL, stride=stride)]


def _ghost(body: Ghost, plain: Step) -> list[Step]:
    gather, conv, norm, _ = body.primary
    halves = not isinstance(gather, nn.Identity)
    primary = replace(
        plain,
        kind=Kind.UNIT,
        outputs=plain.outputs // 2,
        stride=2 if halves else 1,
        columns=Columns.AVERAGES if halves else Columns.PLAIN,
        pointwise=cast(nn.Conv2d, conv),
        norm=cast(nn.BatchNorm2d, norm),
    )
    cheap = replace(
        plain,
        kind=Kind.CONCAT,
        inputs=primary.outputs,
        columns=Columns.DEPTHWISE,
        depthwise=body.cheap,
    )
    return [primary, cheap]


def _units(layers: Sequence[nn.Module | None], plain: Step) -> list[Step] | None:
    """Units: ReLU, perhaps a shuffle, perhaps a depthwise convolution, a 1x1 one, BatchNorm."""
    steps: list[Step] = []
    convolutions: list[nn.Conv2d] = []
    inverse: Tensor | None = None
    activated = True  # each unit begins with a ReLU; the op's own is the first
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and activated:
            convolutions.append(layer)
        elif isinstance(layer, nn.BatchNorm2d) and _form_a_unit(convolutions):
            *before, last = convolutions
            unit = replace(
                plain,
                kind=Kind.UNIT,
                inputs=last.in_channels,
                outputs=last.out_channels,
                stride=before[0].stride[0] if before else 1,
                columns=Columns.DEPTHWISE if before else Columns.PLAIN,
                depthwise=before[0] if before else None,
                pointwise=last,
                norm=layer,
                inverse=inverse,
            )
            steps.append(unit)
            convolutions, activated, inverse = [], False, None
        elif isinstance(layer, nn.ReLU) and not convolutions:
            activated = True
        elif isinstance(layer, ChannelShuffle) and not convolutions and inverse is None:
            inverse = shuffled(layer.groups, steps[-1].outputs if steps else plain.inputs)
        else:
            return None
    return steps


def shuffled(groups: int, channels: int) -> Tensor:
    """Where a channel shuffle puts each channel."""
    return torch.arange(channels).view(channels // groups, groups).t().flatten()


def _form_a_unit(convolutions: list[nn.Conv2d]) -> bool:
    """Tell whether these are a 1x1 convolution, perhaps with a depthwise one before it."""
    if not convolutions:
        return False
    *before, last = convolutions
    if not is_pointwise(last) or len(before) > 1:
        return False
    return all(
        is_depthwise(conv) and conv.out_channels == last.in_channels and conv.stride[0] in (1, 2)
        for conv in before
    )
