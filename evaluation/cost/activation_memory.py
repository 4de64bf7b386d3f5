"""`activation_bytes`: the peak of live activation memory, what decides on a microcontroller's RAM.

The convention, stated here once. It is that of TFLite Micro with CMSIS-NN, on the graph of our
float ONNX file in the order of its nodes:

- One image, one byte a value, the input included. Weights lie in flash and count nothing.
- A value lives from the op that writes it, the input from the start, to the last op that reads it;
  the result to the end. An op's output is there before its inputs are freed: none runs in place.
- A BatchNorm behind a convolution is part of it. A ReLU is computed as its input is written, by a
  convolution, linear layer, BatchNorm, addition or pool, where nothing else reads that input;
  elsewhere, so behind a concatenation, it is an op of its own.
- A reshape moves nothing. A slice, a padding and a transposition write a copy.

Not counted: what an arena loses to gaps and alignment, and the scratch memory of kernels.
"""

from evaluation.cost.kind import Axis, CostKind, Network
from evaluation.cost.program import BATCH_NORM, CONVOLUTION, LINEAR, RELU, Program

ACTIVATED = {CONVOLUTION, LINEAR, BATCH_NORM, "add", "max_pool2d_with_indices", "avg_pool2d"}


def activation_bytes(network: Network) -> int:
    """Return the peak bytes of live activations of one image."""
    return peak_bytes(network.program())


def peak_bytes(program: Program) -> int:
    """Return the most bytes that live at one time while a program runs."""
    sizes, same = program.sizes(), _activated(program)
    ops = [
        ({same.get(value, value) for value in step.reads}, step.writes)
        for step in program.steps
        if step.writes not in same
    ]
    last = {value: place for place, (reads, _) in enumerate(ops) for value in reads}
    last[same.get(program.output, program.output)] = len(ops)
    live = peak = sum(program.inputs)
    for place, (reads, written) in enumerate(ops):
        live += sizes[written]
        peak = max(peak, live)
        live -= sum(sizes[value] for value in reads if last[value] == place)
    return peak


def _activated(program: Program) -> dict[int, int]:
    """Return the results of ReLUs that other ops compute, and the values in their place."""
    readers, makers = program.readers(), {step.writes: step.op for step in program.steps}
    return {
        step.writes: step.reads[0]
        for step in program.steps
        if step.op == RELU
        and makers.get(step.reads[0]) in ACTIVATED
        and readers[step.reads[0]] == 1
    }


ACTIVATION_BYTES = CostKind(
    "activation_bytes",
    "bytes of RAM",
    Axis("activation memory", "bytes of activations", suffix="B"),
    activation_bytes,
)
