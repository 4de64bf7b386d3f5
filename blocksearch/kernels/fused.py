"""A mixed cell on a CPU, several times faster than op by op, with the same result.

A supernet is bound by passes over memory and by slow gradients of depthwise convolutions, not by
arithmetic. Here a whole cell is one autograd function over the loops of `kernels.c`:

- The input of an edge is read once, activated on the way, for all ops that leave a state; a
  depthwise convolution never leaves the cache before its pointwise one has read it.
- The BatchNorms of a node fold into its gated sum. Of z, with mean m and 1 / std r over n pixels,
  b r (z - m) is an affine map, and with gradient g on it, S1 = sum g and S2 = sum g z, the gradient
  on z is one as well: alpha g + beta z + gamma with alpha = b r, beta = -b r^3 (S2 - m S1) / n and
  gamma = -b r S1 / n - beta m. So no normalised output and no gradient of one is ever stored.
- Pools, which have no weights, are computed once per state. Backward, depthwise outputs are
  computed again rather than kept, and only if the weights want a gradient.

What an op must be to run here is told by its type, in `cell_plan.py`; any other op runs in PyTorch
inside the same function. A second derivative needs the plain path: `with compiled.plain_path():`.
What found cells train on is in `units.py`.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from blocksearch.kernels.compiled import Pixels, Shape, lanes_of, library, refuse_second_derivative
from blocksearch.kernels.plan import CellPlan, Layer, Leaving


def mixed_cell(plan: CellPlan, states: list[Tensor], weight: Tensor, slope: Tensor) -> Tensor:
    """Compute a mixed cell.

    Args:
        plan: What the cell runs; T terms.
        states: The input states, (B, C, H, W).
        weight: What multiplies each op's output, (T, C).
        slope: What multiplies the gradient into each op, (T, C); `weight` by the chain rule.

    Returns:
        All nodes, (B, N * C, H', W') in channels_last.

    Raises:
        ValueError: If a channel has one value only, which has no variance.
    """
    batch, _, height, width = states[0].shape
    if batch * -(-height // plan.stride) * -(-width // plan.stride) == 1:
        raise ValueError(f"expected more than 1 value per channel, got {tuple(states[0].shape)}")
    states = [state.contiguous(memory_format=torch.channels_last) for state in states]
    weight, slope = weight.to(states[0].dtype), slope.to(states[0].dtype)
    run = _Run(plan, slope.detach().contiguous(), states[0])
    return cast(Tensor, _MixedCell.apply(run, weight, *states, *plan.parameters()))


class _MixedCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: "_Run", weight: Tensor, *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        states, weights = list(tensors[: run.plan.inputs]), list(tensors[run.plan.inputs :])
        return run.forward(states, weight.detach(), weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.run is None:
            raise RuntimeError(
                "a fused cell went backward a second time; run the forward pass under "
                "blocksearch.kernels.compiled.plain_path() for that"
            )
        refuse_second_derivative()
        inputs = ctx.run.plan.inputs
        weights_too = any(ctx.needs_input_grad[2 + inputs :])
        saved = list(ctx.saved_tensors)  # each access would unpack them again
        states, weights = saved[:inputs], saved[inputs:]
        result = ctx.run.backward(states, grad, weights, weights_too)
        ctx.run = None  # frees what the forward pass kept
        return None, *result


def _dense(tensor: Tensor) -> Pixels:
    return Pixels(tensor, tensor.data_ptr(), tensor.shape[-1])


class _Outputs(NamedTuple):
    """What the units of a layer put out: z (n, B, H, W, C), mean and 1 / std of each (n, 2, C)."""

    z: Tensor
    stats: Tensor


class _Run:
    """One pass through one cell: what the forward pass keeps, and the gradients from it."""

    def __init__(self, plan: CellPlan, slope: Tensor, state: Tensor):
        self.plan, self.slope = plan, slope
        self.batch, self.channels, *self.side = state.shape
        self.node_side = [-(-side // plan.stride) for side in self.side]
        self.kernels = cast(SimpleNamespace, library(state.dtype, lanes_of(self.channels)))
        self.threads = torch.get_num_threads()
        self.row = self.channels * state.element_size()  # bytes of a vector (C,)
        count = len(plan.terms)
        self.pointers = np.zeros(count, np.uint64)  # of every term's output before its BatchNorm
        self.distances = np.full(count, self.channels)  # between its pixels
        self.stats = state.new_zeros(count, 2, self.channels)  # its mean and 1 / std
        self.stats[:, 1] = 1.0
        self.layers: list[list[_Outputs]] = []  # of every source
        self.folds: dict[int, Tensor] = {}  # of a source's second units: scale and shift before
        self.kept: dict[int, Tensor] = {}  # outputs of pools and of other ops, by term
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}  # of the ops that PyTorch computes
        self.out = state.new_empty(self.batch, *self.node_side, plan.nodes * self.channels)

    # ---- forward

    def forward(self, states: list[Tensor], weight: Tensor, weights: list[Tensor]) -> Tensor:
        """Return all nodes, (B, N * C, H', W')."""
        self.weights = [w.contiguous() for w in weights]
        for source, leaving in enumerate(self.plan.leaving):
            if source >= self.plan.inputs:
                self._gated_sum(source - self.plan.inputs, weight)
            x = self._state(source, states)
            self._separable_outputs(source, leaving, x)
            self._pool_outputs(source, leaving, x)
            self._other_outputs(leaving, x)
        return self.out.permute(0, 3, 1, 2)

    def _gated_sum(self, node: int, weight: Tensor) -> None:
        chosen, out = self.plan.arriving[node], self._state(self.plan.inputs + node, [])
        if chosen.stop == 0:
            out.tensor.zero_()
            return
        scale = weight[chosen] * self.stats[chosen, 1]
        shift = -(scale * self.stats[chosen, 0]).sum(dim=0)
        self._weighted_sum(self.pointers[chosen], self.distances[chosen], scale, shift, out)

    def _separable_outputs(self, source: int, leaving: Leaving, x: Pixels) -> None:
        outputs: list[_Outputs] = []
        for depth, layer in enumerate(leaving.layers):
            new = _Outputs(self._new(len(layer.terms)), self._vectors(len(layer.terms), 2))
            if depth:
                mean, rstd = outputs[0].stats[layer.before].unbind(1)
                self.folds[source] = torch.stack([rstd, -mean * rstd], dim=1)
            outputs.append(new)
            units = self._units(source, depth, layer, outputs, x)
            shape = self._shape(source, depth, layer.pad)
            self.kernels.forward_units(units.ctypes.data, len(units), shape, self.plan.eps)
            self.pointers[layer.last_terms] = units["z"][layer.last]
            self.stats[layer.last_terms] = new.stats[layer.last_places]
        self.layers.append(outputs)

    def _pool_outputs(self, source: int, leaving: Leaving, x: Pixels) -> None:
        for is_max, terms in leaving.pools:
            z, stats = self._new(1), self._vectors(1, 2)
            self.kernels.forward_pool(
                x.pointer,
                x.distance,
                is_max,
                z.data_ptr(),
                stats.data_ptr(),
                stats.data_ptr() + self.row,
                self._shape(source),
                self.plan.eps,
            )
            self.kept[terms[0]] = z
            self.pointers[terms] = z.data_ptr()
            self.stats[terms] = stats

    def _other_outputs(self, leaving: Leaving, x: Pixels) -> None:
        if leaving.skips:
            self.pointers[leaving.skips] = x.pointer
            self.distances[leaving.skips] = x.distance
        for t in leaving.others:
            op = self.plan.terms[t].op
            state = x.tensor.permute(0, 3, 1, 2).detach().requires_grad_()
            with torch.enable_grad():
                z = op.body(torch.relu(state) if op.relu else state)
                z = z.contiguous(memory_format=torch.channels_last)
            self.graphs[t] = state, z
            self.kept[t] = values = z.detach().permute(0, 2, 3, 1)
            self.pointers[t] = values.data_ptr()
            if op.norm is not None:
                var, mean = torch.var_mean(values, dim=(0, 1, 2), correction=0)
                self.stats[t] = torch.stack([mean, (var + op.norm.eps).rsqrt()])

    # ---- backward

    def backward(
        self, states: list[Tensor], grad: Tensor, weights: list[Tensor], weights_too: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients on the gates (T, C), the input states, and the ops' parameters."""
        self.gate_grads = torch.zeros_like(self.slope)
        self.coef = self._vectors(len(self.plan.terms), 3).zero_()
        for source, leaving in enumerate(self.plan.leaving):
            # The states of now: what the forward pass saw may have moved since.
            self.pointers[leaving.skips] = self._state(source, states).pointer
        by_node = torch.split(grad.permute(0, 2, 3, 1), self.channels, dim=3)
        grads = [s.new_zeros(self.batch, *self.side, self.channels) for s in states]
        grads += [g.clone(memory_format=torch.contiguous_format) for g in by_node]
        self.grads = [_dense(g) for g in grads]
        pointers = np.array([g.pointer for g in self.grads], np.uint64)
        self.node_grads = pointers[self.plan.inputs + self.plan.node_of]  # what reaches each term
        self.weight_grads = self.slope.new_zeros(sum(self.plan.sizes)) if weights_too else None
        parts: list[Tensor | None] = [None] * len(self.plan.sizes)
        if self.weight_grads is not None:
            flat = torch.split(self.weight_grads, self.plan.sizes)
            parts = [f.view(w.shape) for f, w in zip(flat, weights, strict=True)]
        for source, leaving in reversed(list(enumerate(self.plan.leaving))):
            x = self._state(source, states)
            self._separable_gradient(source, leaving, x)
            self._pool_gradient(source, leaving, x)
            self._other_gradient(source, leaving, weights, parts)
            if source >= self.plan.inputs:
                self._gated_sum_gradient(source - self.plan.inputs)
        return self.gate_grads, *[g.permute(0, 3, 1, 2) for g in grads[: self.plan.inputs]], *parts

    def _gated_sum_gradient(self, node: int) -> None:
        chosen = self.plan.arriving[node]
        if chosen.stop == 0:
            return
        pointers, distances = self.pointers[chosen], self.distances[chosen]
        means = _rows(self.stats, 2 * self.row)[chosen] * self.plan.has_norm[chosen]
        rstds = means + self.row
        self.kernels.node_gradient(
            pointers.ctypes.data,
            distances.ctypes.data,
            means.ctypes.data,
            rstds.ctypes.data,
            self.slope[chosen].data_ptr(),
            len(pointers),
            self.grads[self.plan.inputs + node].pointer,
            self.gate_grads[chosen].data_ptr(),
            self.coef[chosen].data_ptr(),
            self.batch,
            math.prod(self.node_side),
            self.channels,
            self.threads,
        )

    def _separable_gradient(self, source: int, leaving: Leaving, x: Pixels) -> None:
        between: tuple[np.ndarray, np.ndarray] | None = None
        for depth, layer in reversed(list(enumerate(leaving.layers))):
            units = self._units(source, depth, layer, self.layers[source], x)
            units["g"] = self.node_grads[layer.terms]
            units["coef"] = _rows(self.coef, 3 * self.row)[layer.terms]
            units["ldg"] = self.channels
            if self.weight_grads is not None:
                size = self.weight_grads.element_size()
                units["gdw"], units["gpw"] = self.weight_grads.data_ptr() + layer.offsets * size
            if depth:
                buffers, coefs = self._new(len(units)), self._vectors(len(units), 3)
                units["gx"] = _rows(buffers, self._image_bytes())
                units["gx_coef"] = _rows(coefs, 3 * self.row)
                between = units["gx"].copy(), units["gx_coef"].copy()
            else:
                if between is not None:
                    places = leaving.layers[1].before
                    units["g"][places], units["coef"][places] = between
                units["gx"][-1] = self.grads[source].pointer
            shape = self._shape(source, depth, layer.pad)
            self.kernels.backward_units(units.ctypes.data, len(units), shape)

    def _pool_gradient(self, source: int, leaving: Leaving, x: Pixels) -> None:
        for is_max, terms in leaving.pools:
            grad, coef = self._new(1), self.coef[terms]
            scale = torch.cat([coef[:, 0], coef[:, 1].sum(dim=0, keepdim=True)])
            pointers = np.append(self.node_grads[terms], self.pointers[terms[0]])
            distances = np.full(len(pointers), self.channels)
            shift = coef[:, 2].sum(dim=0)
            self._weighted_sum(pointers, distances, scale, shift, _dense(grad[0]))
            self.kernels.backward_pool(
                x.pointer,
                x.distance,
                is_max,
                grad.data_ptr(),
                self.grads[source].pointer,
                self._shape(source),
            )

    def _other_gradient(
        self, source: int, leaving: Leaving, weights: list[Tensor], parts: list[Tensor | None]
    ) -> None:
        if leaving.skips:
            pointers = self.node_grads[leaving.skips]
            distances, out = np.full(len(pointers), self.channels), self.grads[source]
            self._weighted_sum(pointers, distances, self.coef[leaving.skips, 0], None, out)
        for t in leaving.others:
            state, z = self.graphs.pop(t)
            grad = torch.empty_like(self.kept[t])
            pointers = np.array([self.node_grads[t], self.pointers[t]])
            distances = np.full(2, self.channels)
            coef = self.coef[t]
            self._weighted_sum(pointers, distances, coef[:2], coef[2], _dense(grad))
            learning = [k for k in self.plan.places(self.plan.terms[t]) if weights[k].requires_grad]
            found = torch.autograd.grad(
                z, [state, *[weights[k] for k in learning]], grad.permute(0, 3, 1, 2)
            )
            self.grads[source].tensor.add_(found[0].permute(0, 2, 3, 1))
            for k, value in zip(learning, found[1:], strict=True):
                cast(Tensor, parts[k]).copy_(value)

    # ---- what both share

    def _state(self, source: int, states: list[Tensor]) -> Pixels:
        if source < self.plan.inputs:
            pixels = states[source].permute(0, 2, 3, 1)
            return Pixels(pixels, pixels.data_ptr(), self.channels)
        node = source - self.plan.inputs
        pixels = self.out[..., node * self.channels : (node + 1) * self.channels]
        return Pixels(pixels, pixels.data_ptr(), self.out.shape[-1])

    def _new(self, count: int) -> Tensor:
        """Room for `count` batches of a node's size, (count, B, H', W', C)."""
        return self.stats.new_empty(count, self.batch, *self.node_side, self.channels)

    def _vectors(self, *shape: int) -> Tensor:
        return self.stats.new_empty(*shape, self.channels)

    def _image_bytes(self) -> int:
        return self.batch * math.prod(self.node_side) * self.row

    def _shape(self, source: int, depth: int = 0, pad: int = 0) -> Shape:
        """The shape of what an op reads: an input of the cell, or something of a node's size."""
        from_input = source < self.plan.inputs and depth == 0
        side, stride = (self.side, self.plan.stride) if from_input else (self.node_side, 1)
        return Shape(self.batch, *side, self.channels, stride, pad, self.threads)

    def _units(
        self, source: int, depth: int, layer: Layer, outputs: list[_Outputs], x: Pixels
    ) -> np.ndarray:
        """The units of a layer with all that the forward pass knows of them."""
        units = layer.units.copy()
        units["x"], units["ldx"] = x.pointer, x.distance
        if depth:
            folds = _rows(self.folds[source], 2 * self.row)
            units["x"] = _rows(outputs[0].z, self._image_bytes())[layer.before]
            units["scale"], units["shift"] = folds, folds + self.row
            units["ldx"] = self.channels
        units["dw"], units["pw"] = [
            [self.weights[k].data_ptr() for k in places] for places in layer.places
        ]
        units["z"] = _rows(outputs[depth].z, self._image_bytes())
        units["mean"] = _rows(outputs[depth].stats, 2 * self.row)
        units["rstd"] = units["mean"] + self.row
        return units

    def _weighted_sum(
        self,
        pointers: np.ndarray,
        distances: np.ndarray,
        coef: Tensor,
        bias: Tensor | None,
        out: Pixels,
    ) -> None:
        """Write bias + sum_k coef[k] tensor[k] into `out`; without a bias, add it there."""
        coef = coef.contiguous()
        self.kernels.weighted_sum(
            pointers.ctypes.data,
            distances.ctypes.data,
            coef.data_ptr(),
            None if bias is None else bias.data_ptr(),
            len(pointers),
            out.pointer,
            out.distance,
            bias is None,
            math.prod(out.tensor.shape[:-1]),
            self.channels,
            self.threads,
        )


def _rows(tensor: Tensor, size: int) -> np.ndarray:
    """Addresses of the rows of a dense tensor that are `size` bytes long."""
    return tensor.data_ptr() + np.arange(len(tensor), dtype=np.uint64) * np.uint64(size)
