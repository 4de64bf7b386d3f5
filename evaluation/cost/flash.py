"""`flash_bytes`: what an int8 file holds of numbers, and a microcontroller keeps in flash.

The bytes of weights, biases and scales of the file that `export --format onnx-int8` writes: every
constant but the int64 ones, which say shapes. As ONNX Runtime's static quantizer leaves them:

- The kernel of a convolution or linear layer: int8, with a float32 scale and an int8 zero point for
  each output. Its bias, or that of the BatchNorm folded into it: int32, with a float32 scale and an
  int32 zero point for each output.
- A BatchNorm that is not folded, behind a concatenation: an int8 factor and an int32 offset for
  each channel, each with one scale and one zero point; mean and variance stay float32.
- A value that an op writes: a float32 scale and a uint8 zero point. What only moves numbers (pools,
  slices, paddings, transpositions) shares those of what it reads, and so does what is read by one
  ReLU alone: it gets the ReLU's.

Not counted: the code of the runtime and the description of the graph. A network with other weights
is refused: those of 1-bit layers have no int8 form.
"""

import math

from evaluation.cost.kind import Axis, CostKind, Network
from evaluation.cost.program import BATCH_NORM, CONVOLUTION, LINEAR, RELU, Program, Step
from evaluation.errors import InputError

INT8, INT32, FLOAT32 = 1, 4, 4
SCALE_AND_ZERO = FLOAT32 + INT8  # of a value, and of a kernel for each output
MOVES = {"max_pool2d_with_indices", "avg_pool2d", "slice", "constant_pad_nd", "transpose"}


def flash_bytes(network: Network) -> int:
    """Return the bytes of weights, biases and scales of a network's int8 file."""
    return constant_bytes(network.program())


def constant_bytes(program: Program) -> int:
    """Return the bytes of the constants of an int8 file that are no shapes.

    Raises:
        InputError: If there are weights that the quantizer leaves as they are.
    """
    readers = program.readers()
    activated = {one.reads[0] for one in program.steps if one.op == RELU}
    shared = {value for value in activated if readers[value] == 1}
    own = [one for one in program.steps if one.op not in MOVES and one.writes not in shared]
    values = len(program.inputs) + len(own)
    return values * SCALE_AND_ZERO + sum(map(_weight_bytes, program.steps))


def _weight_bytes(step: Step) -> int:
    if step.op == BATCH_NORM:
        channels = step.weights[0][0]
        factor, offset = channels * INT8 + SCALE_AND_ZERO, channels * INT32 + FLOAT32 + INT32
        return factor + offset + 2 * channels * FLOAT32
    if not step.weights:
        return 0
    if step.op not in (CONVOLUTION, LINEAR):
        raise InputError(f"flash_bytes: the weights of {step.op} have no known int8 form")
    kernel, *biases = sorted(step.weights, key=len, reverse=True)
    outputs = kernel[0] if step.op == CONVOLUTION else kernel[1]
    bias = outputs * (INT32 + FLOAT32 + INT32) if biases else 0
    return math.prod(kernel) * INT8 + outputs * SCALE_AND_ZERO + bias


FLASH_BYTES = CostKind(
    "flash_bytes",
    "bytes of flash",
    Axis("flash", "bytes of the int8 file's weights", suffix="B"),
    flash_bytes,
)
