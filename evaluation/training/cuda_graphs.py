"""CUDA graphs: a step is recorded once and then replayed, without its hundreds of kernel launches.

The rules that a step must keep are those of PyTorch's notes on CUDA graphs,
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: nothing in it waits for the GPU
(no `.item()`, no copy to the CPU), optimizers are fused or capturable and read their learning rate
from a tensor, and gradients are set to None inside the step before they are computed.
"""

import time
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

EAGER_STEPS = 3  # PyTorch's advice: optimizers, cuDNN and cuBLAS set themselves up in them

Outputs = dict[str, Tensor]
Replay = Callable[[], None]


class Graphs(Protocol):
    """What records and replays; the CUDA one is below."""

    def run(self, step: Callable[[], Outputs]) -> Outputs:
        """Run a step for real, where it may set up what a capture must find set up."""

    def capture(self, step: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """Record a step without doing it; return its replay and the tensors that this fills."""


class CudaGraphs:
    """Steps run on a side stream, as a capture demands, and are captured into a `CUDAGraph`.

    All captures share one pool of memory: no step reads what another left there, and no two run at
    the same time.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Outputs]) -> Outputs:
        """Run a step on the side stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, step: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        """Record a step."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = step()
        return graph.replay, outputs


def graphs_for(device: torch.device | str) -> Graphs | None:
    """Return what captures steps on `device`; None where there are no graphs."""
    return CudaGraphs() if torch.device(device).type == "cuda" else None


class CapturedStep:
    """A function of tensors that is captured after a few calls and replayed from then on.

    Every call is one real step and returns tensors that stay as they are: the first calls run
    eagerly, the next is captured and replayed as that call. Inputs of another shape than the
    captured one run eagerly. All that the step reads must be in tensors that stay in their place:
    a Python number is frozen at the capture.

    Attributes:
        capture_s: Seconds that the capture took; None as long as there was none.
    """

    def __init__(
        self, step: Callable[..., Outputs], graphs: Graphs | None, eager_steps: int = EAGER_STEPS
    ):
        """Wrap `step`, which maps tensors to named tensors; without `graphs` it is just called."""
        self.step = step
        self.graphs = graphs
        self.eager_left = eager_steps
        self.capture_s: float | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._captured: tuple[Replay, Outputs] | None = None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Do one step.

        Warns:
            RuntimeWarning: Once, if the step cannot be captured; it then runs eagerly for good.
        """
        if self.graphs is None:
            return self.step(*inputs)
        if self.eager_left > 0:
            self.eager_left -= 1
            return self.graphs.run(lambda: self.step(*inputs))
        if self._captured is None:
            self._captured = self._capture(self.graphs, inputs)
        if self._captured is None or _forms(inputs) != _forms(self._inputs):
            return self.step(*inputs)
        replay, outputs = self._captured
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        replay()
        # Clones, since the next replay writes into these tensors again.
        return {name: tensor.clone() for name, tensor in outputs.items()}

    def _capture(self, graphs: Graphs, inputs: tuple[Tensor, ...]) -> tuple[Replay, Outputs] | None:
        began = time.perf_counter()
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        try:
            captured = graphs.capture(lambda: self.step(*self._inputs))
        except RuntimeError as error:  # also torch's errors of CUDA and of its memory
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            message = f"runs without a CUDA graph, since the step cannot be captured: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            self.graphs, self._inputs = None, ()
            return None
        self.capture_s = time.perf_counter() - began
        return captured


def _forms(tensors: tuple[Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
