"""A found cell on a CPU as one autograd function, several times faster than op by op.

Op by op, most of a found cell's time goes into passes over memory. `state.h` computes it state by
state: one pass puts a state together from what arrives there, with the BatchNorms folded into the
sum, and runs all that leaves it while an image is in the cache. Between two passes only the outputs
of convolutions and pools are kept, no activation, no normalised output, no sum before a
concatenation. Backward, one pass a state completes its gradient, and takes the sums from which the
BatchNorms that arrive there have theirs.

An op of two convolutions leads through a state of its own. What is no chain of units (see `Step`)
runs in PyTorch inside the same function. A second derivative needs the plain path: `with
compiled.plain_path():`.
"""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from blocksearch.kernels import compiled
from blocksearch.kernels.compiled import (
    Image,
    Pixels,
    library,
    refuse_second_derivative,
    widest_lanes,
)
from blocksearch.kernels.steps import FoundPlan, Kind, Step

_POINTERS = (
    "dw pw gamma beta z mean rstd scale shift g coef gdw gpw running_mean running_var".split()
)
_NUMBERS = "ldg kind columns inputs outputs kernel dilation stride".split()
LEAVING = np.dtype(
    [
        *((n, "u8") for n in _POINTERS),
        *((n, "i8") for n in _NUMBERS),
        ("eps", "f8"),
        ("momentum", "f8"),
    ]
)
TERM = np.dtype(
    [(n, "u8") for n in "z scale shift mean rstd gamma dgamma dbeta coef".split()] + [("ld", "i8")]
)
ROWS = {"mean": 0, "rstd": 1, "scale": 2, "shift": 3, "coef": 4, "dgamma": 7, "dbeta": 8}
CHUNK_PIXELS = 128  # of a state of which only pixels by themselves are read


def fits(plan: FoundPlan, state: Tensor) -> bool:
    """Tell whether `found_cell` can take the place of the modules."""
    return (
        plan.is_known
        and compiled.fits(state)
        and all(
            (norm.training or not norm.track_running_stats)
            and norm.momentum is not None
            and (norm.weight is None or norm.weight.dtype == state.dtype)
            for norm in plan.norms
        )
    )


def found_cell(plan: FoundPlan, states: Sequence[Tensor]) -> Tensor:
    """Compute a found cell in training, where BatchNorms use the statistics of the batch.

    Args:
        plan: What the cell runs.
        states: The outputs of the cells before, (B, C, H, W) each.

    Returns:
        The nodes that the cell hands on, (B, N * C, H', W') in channels_last.

    Raises:
        ValueError: If a channel has one value only, which has no variance.
    """
    states = [state.contiguous(memory_format=torch.channels_last) for state in states]
    run = _Run(plan, states)
    weights = [weight for step in plan.steps for weight in step.tensors()]
    out: Tensor = _FoundCell.apply(run, *states, *weights)
    return out


class _FoundCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: "_Run", *tensors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run.forward(list(tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.run is None:
            raise RuntimeError(
                "a found cell went backward a second time; run the forward pass under "
                "blocksearch.kernels.compiled.plain_path() for that"
            )
        refuse_second_derivative()
        result = ctx.run.backward(grad, list(ctx.saved_tensors))
        ctx.run = None  # frees what the forward pass kept
        return None, *result


def _pixels(tensor: Tensor, distance: int | None = None) -> Pixels:
    """A dense tensor, or a slice of one with pixels so far apart."""
    return Pixels(tensor, tensor.data_ptr(), distance or tensor.shape[-1])


class _Run:
    """One pass through one cell: what the forward pass keeps, and the gradients from it."""

    def __init__(self, plan: FoundPlan, states: Sequence[Tensor]):
        self.plan, self.batch, self.like = plan, states[0].shape[0], states[0]
        self.kernels = cast(SimpleNamespace, library(self.like.dtype, widest_lanes(plan.channels)))
        self.threads, self.bytes = torch.get_num_threads(), self.like.element_size()
        self.sides = plan.sides([(state.shape[2], state.shape[3]) for state in states])
        for step in plan.steps:
            side = self.sides[step.target]
            if step.norm is not None and self.batch * math.prod(side) == 1:
                shape = (1, step.outputs, *side)
                raise ValueError(f"expected more than 1 value per channel, got {shape}")
        self.z: dict[Step, Pixels] = {}
        self.rows: dict[Step, Tensor] = {}  # (9, N): see ROWS
        # Of what PyTorch computes: what went in, what came out, and the weights of that moment.
        self.graphs: dict[Step, tuple[Tensor, Tensor, list[Tensor]]] = {}
        side, last = self.sides[plan.outputs[0]], plan.channels
        self.out = self._new(*side, last * len(plan.outputs))
        self.kept: dict[int, Pixels] = {
            state: _pixels(self.out[..., k * last : (k + 1) * last], self.out.shape[-1])
            for k, state in enumerate(plan.outputs)
        }
        for state in plan.stored:
            if state not in self.kept:
                self.kept[state] = _pixels(self._new(*self.sides[state], plan.widths[state]))

    # ---- forward

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """Return the nodes that are handed on, (B, N * C, H', W')."""
        plan = self.plan
        for state in range(plan.inputs):
            self.kept[state] = _pixels(tensors[state].permute(0, 2, 3, 1))
        weights = self._weights(tensors)
        for state in plan.order:
            leaving, others = plan.leaving(state)
            for step in leaving:
                self.z[step] = _pixels(self._new(*self.sides[step.target], step.outputs))
            for step in (*leaving, *others):
                self.rows[step] = self.like.new_empty(9, step.outputs)
            computed = state < plan.inputs
            terms = self._read(state) if computed else self._terms(plan.arriving(state))
            place = None if computed else self.kept.get(state)
            if leaving or place is not None:
                described = self._leaving(leaving, weights)
                self.kernels.forward_state(
                    *_array(terms, TERM),
                    *_array(described, LEAVING),
                    None if place is None else place.pointer,
                    0 if place is None else place.distance,
                    self._image(state, leaving),
                )
            for step in others:
                self._put_out(step, self.kept[state].tensor, weights[step])
        self._remember()
        return self.out.permute(0, 3, 1, 2)

    def _put_out(self, step: Step, pixels: Tensor, weights: list[Tensor]) -> None:
        """Run in PyTorch what the kernels do not know."""
        state = pixels.permute(0, 3, 1, 2).detach().requires_grad_()
        with torch.enable_grad():
            z = step.body(state).contiguous(memory_format=torch.channels_last)
        self.graphs[step] = state, z, weights
        values = z.detach().permute(0, 2, 3, 1)
        self.z[step] = _pixels(values)
        if step.norm is not None:
            var, mean = torch.var_mean(values, dim=(0, 1, 2), correction=0)
            rstd = (var + step.norm.eps).rsqrt()
            scale = rstd if step.norm.weight is None else rstd * step.norm.weight.detach()
            shift = -mean * scale
            if step.norm.bias is not None:
                shift += step.norm.bias.detach()
            self.rows[step][:4] = torch.stack([mean, rstd, scale, shift])

    @torch.no_grad()
    def _remember(self) -> None:
        """Count the batch, and move statistics that the kernels have not moved towards it."""
        steps = [s for s in self.plan.steps if s.norm is not None and s.norm.track_running_stats]
        counts = [cast(Tensor, cast(nn.BatchNorm2d, s.norm).num_batches_tracked) for s in steps]
        if counts:
            torch._foreach_add_(counts, 1)
        for step in steps:
            if step.kind != Kind.OTHER:
                continue
            norm, rows = cast(nn.BatchNorm2d, step.norm), self.rows[step]
            count = self.batch * math.prod(self.sides[step.target])
            var = (rows[1] ** -2 - norm.eps) * (count / (count - 1))
            cast(Tensor, norm.running_mean).lerp_(rows[0], cast(float, norm.momentum))
            cast(Tensor, norm.running_var).lerp_(var, cast(float, norm.momentum))

    # ---- backward

    def backward(self, grad: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the gradients on the input states and on the weights of every step."""
        plan = self.plan
        for state in range(plan.inputs):  # the forward pass saw what may have moved since
            self.kept[state] = _pixels(tensors[state].permute(0, 2, 3, 1))
        weights = self._weights(tensors)
        self.weight_grads = {step: [torch.zeros_like(w) for w in weights[step]] for step in weights}
        self.grads: dict[int, Pixels] = {}
        whole = grad.permute(0, 2, 3, 1).contiguous()
        width = plan.channels
        for state in reversed(plan.order):
            leaving, others = plan.leaving(state)
            pieces = [self.grads[skip.target] for skip in plan.skips(state)]
            pieces += [
                _pixels(whole[..., k * width : (k + 1) * width], whole.shape[-1])
                for k, output in enumerate(plan.outputs)
                if output == state
            ]
            pieces += [self._go_back(step) for step in others]
            described = self._leaving(leaving, weights, backward=True)
            described += [
                {
                    "g": p.pointer,
                    "ldg": p.distance,
                    "kind": Kind.SKIP,
                    "stride": 1,
                    "outputs": plan.widths[state],
                }
                for p in pieces
            ]
            alone = not leaving and len(pieces) == 1
            new = pieces[0] if alone else _pixels(self._new(*self.sides[state], plan.widths[state]))
            self.grads[state] = new
            arriving = [] if state < plan.inputs else self._terms(plan.arriving(state))
            if alone and not any("mean" in term for term in arriving):
                continue
            self.kernels.backward_state(
                *_array(self._read(state), TERM),
                *_array(arriving, TERM),
                *_array(described, LEAVING),
                None if alone else new.pointer,
                self._image(state, leaving),
            )
        found = [self.grads[state].tensor.permute(0, 3, 1, 2) for state in range(plan.inputs)]
        return *found, *self._weight_gradients()

    def _go_back(self, step: Step) -> Pixels:
        """Return the gradient on a state through what PyTorch computed."""
        state, z, weights = self.graphs.pop(step)
        g, rows = self.grads[step.target].tensor, self.rows[step]
        if step.norm is not None:
            g = rows[4] * g + rows[5] * self.z[step].tensor + rows[6]
        wanted = [state, *(w for w in weights if w.requires_grad)]
        found: Sequence[Tensor] = [torch.zeros_like(one) for one in wanted]
        if z.requires_grad:  # zeros know nothing of what they were made from
            found = torch.autograd.grad(
                z, wanted, g.permute(0, 3, 1, 2), materialize_grads=True, allow_unused=True
            )
        gradients = iter(found[1:])
        self.weight_grads[step] = [
            next(gradients) if w.requires_grad else torch.zeros_like(w) for w in weights
        ]
        return _pixels(found[0].permute(0, 2, 3, 1).contiguous())

    def _weight_gradients(self) -> Iterator[Tensor | None]:
        for step in self.plan.steps:
            yield from self.weight_grads[step]
            if step.norm is not None and step.norm.affine:
                yield self.rows[step][ROWS["dgamma"]]
                yield self.rows[step][ROWS["dbeta"]]

    # ---- what both share

    def _weights(self, tensors: list[Tensor]) -> dict[Step, list[Tensor]]:
        """The tensors of each step but those of its norm, and their order as the kernels see it."""
        at, found = self.plan.inputs, {}
        self.norms: dict[Step, list[Tensor]] = {}
        for step in self.plan.steps:
            count, other = step.count, step.kind == Kind.OTHER
            found[step] = [w if other else w.contiguous() for w in tensors[at : at + count]]
            at += count
            affine = 2 if step.norm is not None and step.norm.affine else 0
            self.norms[step] = tensors[at : at + affine]
            at += affine
        return found

    def _new(self, *shape: int) -> Tensor:
        return self.like.new_empty(self.batch, *shape)

    def _read(self, state: int) -> list[dict[str, int]]:
        """What a state is read from: itself where it is kept, else what it is an affine map of."""
        if state in self.kept:
            return [{"z": self.kept[state].pointer, "ld": self.kept[state].distance}]
        return self._terms(self.plan.arriving(state))

    def _terms(self, steps: Sequence[Step]) -> list[dict[str, int]]:
        """What a state is the sum of."""
        terms: list[dict[str, int]] = []
        for step in steps:
            if step.kind == Kind.SKIP:
                terms += [
                    {name: term[name] for name in ("z", "ld", "scale", "shift") if name in term}
                    for term in self._read(step.source)
                ]
                continue
            term = {"z": self.z[step].pointer, "ld": self.z[step].distance}
            if step.norm is not None:
                term |= self._rows(step)
                if self.norms[step]:
                    term["gamma"] = self.norms[step][0].data_ptr()
            terms.append(term)
        return terms

    def _rows(self, step: Step) -> dict[str, int]:
        rows = self.rows[step]
        size = rows.shape[1] * self.bytes
        return {name: rows.data_ptr() + row * size for name, row in ROWS.items()}

    def _leaving(
        self, steps: Sequence[Step], weights: dict[Step, list[Tensor]], backward: bool = False
    ) -> list[dict[str, Any]]:
        described = []
        for step in steps:
            one: dict[str, Any] = {**step.numbers(), "z": self.z[step].pointer}
            one |= zip(step.weight_names, (w.data_ptr() for w in weights[step]), strict=True)
            if step.norm is not None:
                rows = self._rows(step)
                one |= {name: rows[name] for name in ("mean", "rstd", "scale", "shift")}
                one["eps"] = step.norm.eps
                if step.norm.track_running_stats and not backward:
                    one["momentum"] = step.norm.momentum
                    one["running_mean"] = cast(Tensor, step.norm.running_mean).data_ptr()
                    one["running_var"] = cast(Tensor, step.norm.running_var).data_ptr()
                for name, tensor in zip(("gamma", "beta"), self.norms[step], strict=False):
                    one[name] = tensor.data_ptr()
            if backward:
                g = self.grads[step.target]
                one |= {"g": g.pointer, "ldg": g.distance}
                if step.norm is not None:
                    one["coef"] = rows["coef"]
                for name, tensor in zip(step.weight_names, self.weight_grads[step], strict=True):
                    one["g" + name] = tensor.data_ptr()
            described.append(one)
        return described

    def _image(self, state: int, leaving: Sequence[Step]) -> Image:
        """The shape of a state; pixels that are read by themselves come in small chunks."""
        (height, width), batch = self.sides[state], self.batch
        if all(step.by_pixel for step in leaving):
            rows = max(
                r
                for r in range(1, height + 1)
                if height % r == 0 and r * width <= max(CHUNK_PIXELS, width)
            )
            batch, height, width = batch * (height // rows), 1, rows * width
        pad = max((step.pad for step in leaving), default=0)
        return Image(batch, height, width, self.plan.widths[state], pad, self.threads)


def _array(described: list[dict[str, Any]], dtype: np.dtype) -> tuple[Any, int]:
    """An array of structs as the kernels read it, and its length."""
    array = np.zeros(len(described), dtype)
    for place, one in enumerate(described):
        for name, value in one.items():
            array[name][place] = value
    return array.ctypes, len(described)
