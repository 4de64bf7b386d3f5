"""CUDA graphs acted out on the CPU: a step is recorded operation by operation and played back.

As in a real graph the operations work on the same tensors every time, and whatever else Python did
or read in the step, numbers among them, stays as it was at the recording.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from evaluation.training.cuda_graphs import Outputs, Replay


class RecordedGraphs:
    """Stands for `evaluation.training.cuda_graphs.CudaGraphs`.

    Attributes:
        ran: Steps that ran eagerly under it.
        captured: Captures that were tried.
        replayed: Replays.
    """

    def __init__(self, state: Callable[[], Iterable[Tensor]], error: Exception | None = None):
        """Take what lists all tensors that the step changes, and an error that a capture raises."""
        self.state = state
        self.error = error
        self.ran = self.captured = self.replayed = 0

    def run(self, step: Callable[[], Outputs]) -> Outputs:
        self.ran += 1
        return step()

    def capture(self, step: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
        self.captured += 1
        if self.error is not None:
            raise self.error
        outputs: Outputs = {}

        def traced() -> list[Tensor]:
            outputs.update(step())
            return list(outputs.values())

        tensors = list(self.state())
        before = [tensor.detach().clone() for tensor in tensors]
        play = make_fx(traced)()  # computes as it records, while a graph only records ...
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)  # ... hence this
        results = {name: torch.full_like(tensor, 0) for name, tensor in outputs.items()}

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for result, played in zip(results.values(), play(), strict=True):
                result.copy_(played)

        return replay, results
