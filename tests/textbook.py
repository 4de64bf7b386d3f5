"""The supernet as the papers define it, as plainly as possible: what the fast one must equal.

Nothing is shared, merged or reordered: every op of every edge is a module of its own with its own
ReLU, pool and BatchNorm, runs in PyTorch's default memory layout, and is then multiplied by its
gate.
"""

import torch
from torch import Tensor, nn

from blocksearch.relaxation import Gates
from blocksearch.supernet.supernet import Supernet


class Op(nn.Module):
    """One op of one edge, built from the definition of its name."""

    def __init__(self, name: str, channels: int, stride: int):
        super().__init__()
        self.name, self.stride = name, stride
        for key, module in _modules(name, channels, stride).items():
            self.add_module(key, module)

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "none":
            return 0.0 * x[:, :, :: self.stride, :: self.stride]
        if self.name == "skip_connect" and self.stride == 2:
            return factorized_reduce(self, x)
        if self.name == "ghost_3x3":
            primary = self.primary(x)
            return self.norm(torch.cat([primary, self.cheap(primary)], dim=1))
        for module in self.children():
            x = module(x)
        return x


class Shuffle(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.channel_shuffle(x, self.groups)


def norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def conv(channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1):
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=False)


def numbered(*modules: nn.Module) -> dict[str, nn.Module]:
    return {str(number): module for number, module in enumerate(modules)}


def depthwise(c: int, stride: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(), conv(c, c, kernel, stride, dilation, groups=c), conv(c, c, 1), norm(c)
    )


def _modules(name: str, c: int, stride: int) -> dict[str, nn.Module]:
    if name in ("sep_conv_3x3", "sep_conv_5x5"):
        kernel = int(name[-1])
        return numbered(depthwise(c, stride, kernel), depthwise(c, 1, kernel))
    if name in ("dws_conv_3x3", "dws_conv_5x5"):
        return dict(depthwise(c, stride, int(name[-1])).named_children())
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        return dict(depthwise(c, stride, int(name[-1]), dilation=2).named_children())
    if name == "max_pool_3x3":
        return numbered(nn.MaxPool2d(3, stride, padding=1), norm(c))
    if name == "avg_pool_3x3":
        return numbered(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), norm(c))
    if name == "skip_connect" and stride == 2:
        return {"even": conv(c, c // 2, 1), "odd": conv(c, c - c // 2, 1), "norm": norm(c)}
    if name == "gshuffle_3x3":
        first, second = conv(c, c, 1, groups=4), conv(c, c, 1, groups=4)
        middle = conv(c, c, 3, stride, groups=c)
        return numbered(nn.ReLU(), first, norm(c), nn.ReLU(), Shuffle(4), middle, second, norm(c))
    if name == "ghost_3x3":
        shrink = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        primary = nn.Sequential(nn.ReLU(), shrink, conv(c, c // 2, 1), norm(c // 2), nn.ReLU())
        return {
            "primary": primary,
            "cheap": conv(c // 2, c // 2, 3, groups=c // 2),
            "norm": norm(c),
        }
    assert name in ("none", "skip_connect")
    return {}


def factorized_reduce(weights: nn.Module, x: Tensor) -> Tensor:
    x = torch.relu(x)
    padded = nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    # Not as strided convolutions, whose gradient overwrites memory on many CPUs.
    halves = [weights.even(x[:, :, ::2, ::2]), weights.odd(padded[:, :, 1::2, 1::2])]
    return weights.norm(torch.cat(halves, dim=1))


class TextbookSupernet(nn.Module):
    """The textbook form of `supernet`, with the same weights."""

    def __init__(self, supernet: Supernet):
        super().__init__()
        self.space, self.kind_of_cell = supernet.space, supernet.kind_of_cell
        width = supernet.stem[0].out_channels
        self.stem = nn.Sequential(
            conv(supernet.image_shape[0], width, 3),
            nn.BatchNorm2d(width, track_running_stats=False),
        )
        self.cells = nn.ModuleList()
        for kind, cell in zip(self.kind_of_cell, supernet.cells, strict=True):
            holder, channels = nn.Module(), cell.out_channels // self.space.nodes
            holder.inputs = nn.Module()
            for place in ("first", "second"):
                setattr(holder.inputs, place, self._input(getattr(cell.inputs, place)))
            holder.edges = nn.ModuleList(
                nn.ModuleList(
                    Op(op, channels, 2 if kind and source < self.space.inputs else 1)
                    for op in self.space.ops
                )
                for source, _ in self.space.edges
            )
            self.cells.append(holder)
        classifier = supernet.classifier
        self.classifier = nn.Linear(classifier.in_features, classifier.out_features)
        weight = next(supernet.parameters())
        self.to(weight.device, weight.dtype)
        pairs = zip(self.parameters(), supernet.parameters(), strict=True)
        for mine, given in pairs:  # both define their layers in the same order
            assert mine.shape == given.shape
            mine.data.copy_(given.data)

    @staticmethod
    def _input(module: nn.Module) -> nn.Module:
        """ReLU, 1x1 convolution, BatchNorm; or the factorized reduction."""
        weights = list(module.parameters())
        out, into = weights[0].shape[:2]
        if len(weights) == 1:
            return nn.Sequential(nn.ReLU(), conv(into, out, 1), norm(out))
        holder = nn.Module()
        holder.even, holder.odd = conv(into, out, 1), conv(into, out, 1)
        holder.norm = norm(2 * out)
        return holder

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        s0 = s1 = self.stem(x)
        for kind, cell in zip(self.kind_of_cell, self.cells, strict=True):
            s0, s1 = s1, self._cell(cell, s0, s1, gates, kind)
        return self.classifier(s1.mean(dim=(2, 3)))

    def _cell(self, cell: nn.Module, s0: Tensor, s1: Tensor, gates: Gates, kind: int) -> Tensor:
        first, second = cell.inputs.first, cell.inputs.second
        older = first(s0) if isinstance(first, nn.Sequential) else factorized_reduce(first, s0)
        states = [older, second(s1)]
        for node in range(self.space.nodes):
            total = 0.0
            for e, (source, target) in enumerate(self.space.edges):
                if target == self.space.inputs + node:
                    total = total + self._edge(cell.edges[e], states[source], gates, kind, e)
            states.append(total)
        return torch.cat(states[self.space.inputs :], dim=1)

    def _edge(self, ops: nn.ModuleList, x: Tensor, gates: Gates, kind: int, e: int) -> Tensor:
        total = 0.0
        for o, op in enumerate(ops):
            weight = gates.weight[kind, e, o]
            y = op(x)
            if gates.active is not None and not gates.active[kind, e, o]:
                y = torch.zeros_like(y)
            if gates.scale_gradient:
                total = total + weight * y
            else:  # the value of weight * y, the gradient of y
                total = total + weight * y.detach() + y - y.detach()
        if gates.channels is not None:
            multipliers = gates.channels[kind, e]
            groups = total.chunk(len(multipliers), dim=1)
            total = torch.cat([m * g for m, g in zip(multipliers, groups, strict=True)], dim=1)
        return total
