"""A module's ops, written down as it runs once on the meta device, where nothing is computed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.cost.program import Program, Shape, Step

SAME_VALUES = frozenset(  # other names for numbers that lie there already, in the same order
    "view _unsafe_view reshape unsqueeze squeeze flatten alias detach clone contiguous".split()
)
FILLS = frozenset("zeros_like ones_like full_like empty_like".split())  # constants of a shape


def record(module: nn.Module, *input_shapes: Shape) -> Program:
    """Write down the ops of one forward pass.

    Args:
        module: On the meta device, in evaluation mode; of one output.
        input_shapes: Shape without the batch axis of each positional input, e.g. (3, 32, 32).
    """
    images = [torch.empty(1, *shape, device="meta") for shape in input_shapes]
    with _Recorder(images) as recorder, torch.no_grad():
        output: Tensor = module(*images)
    sizes = tuple(image.numel() for image in images)
    return Program(sizes, tuple(recorder.steps), recorder.values[id(output)])


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.values = {id(one): value for value, one in enumerate(inputs)}
        self._count = len(inputs)
        self._kept: list[Any] = []  # a tensor that went would leave its id to another one

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._kept.append(result)
        name: str = func.overloadpacket.__name__
        flat = [part for one in args for part in (one if isinstance(one, list | tuple) else (one,))]
        tensors = [one for one in flat if isinstance(one, Tensor)]
        reads = tuple(self.values[id(one)] for one in tensors if id(one) in self.values)
        if not reads or name in FILLS:  # made of constants alone, so one itself
            return result
        first: Tensor = result[0] if isinstance(result, tuple | list) else result
        if name in SAME_VALUES:
            self.values[id(first)] = reads[0]
            return result
        weights = tuple(tuple(one.shape) for one in tensors if id(one) not in self.values)
        settings = str([one for one in flat if not isinstance(one, Tensor)])
        value = self.values[id(first)] = self._count
        self._count += 1
        self.steps.append(Step(name, reads, value, first.numel(), weights, settings))
        return result
