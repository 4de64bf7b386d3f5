"""The ops of a network in the order in which they run, with the sizes of what they read and write.

It is what an exported file holds, known without exporting: a module runs once on the meta device,
where nothing is computed, and every op is written down. As the exporter does, an op that another
one did already is left out, and so is one whose result nothing reads; a BatchNorm behind a
convolution becomes part of it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]

CONVOLUTION, LINEAR, BATCH_NORM, RELU = "convolution", "addmm", "native_batch_norm", "relu"


@dataclass(frozen=True)
class Step:
    """One op.

    Attributes:
        op: Its name in PyTorch's `aten`.
        reads: The values that it reads.
        writes: The value that it writes.
        size: How many numbers that holds for one image.
        weights: Shapes of the constants that it reads: its kernel and bias, or those of BatchNorm.
        settings: What else decides the result; steps of equal settings without weights are equal.
    """

    op: str
    reads: tuple[int, ...]
    writes: int
    size: int
    weights: tuple[Shape, ...] = ()
    settings: str = ""


@dataclass(frozen=True)
class Program:
    """Steps in their order. Values are numbered; those of the inputs come first.

    Attributes:
        inputs: How many numbers each input holds for one image.
        steps: The ops.
        output: The value that is the result.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    output: int

    def readers(self) -> Counter[int]:
        """Return how many steps read a value; the result has one more reader."""
        found = Counter(value for step in self.steps for value in {*step.reads})
        found[self.output] += 1
        return found

    def sizes(self) -> dict[int, int]:
        """Return how many numbers each value holds."""
        return dict(enumerate(self.inputs)) | {step.writes: step.size for step in self.steps}


class Chain:
    """Programs one behind the other, as one."""

    def __init__(self, *inputs: int):
        """Begin with inputs of so many numbers."""
        self._inputs = inputs
        self._steps: list[Step] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def append(self, program: Program, reads: Sequence[int]) -> int:
        """Let a program read these values; return the value that is its result."""
        value_of = dict(enumerate(reads))
        for step in program.steps:
            own = tuple(value_of[value] for value in step.reads)
            value = len(self._inputs) + len(self._steps)
            key = step.op, own, step.settings, step.size
            if not step.weights and key in self._known:
                value_of[step.writes] = self._known[key]
                continue
            self._known[key] = value_of[step.writes] = value
            self._steps.append(replace(step, reads=own, writes=value))
        return value_of[program.output]

    def finish(self, output: int) -> Program:
        """Return the whole, without what nothing reads, BatchNorms folded into convolutions."""
        needed, kept = {output}, []
        for step in reversed(self._steps):
            if step.writes in needed:
                needed.update(step.reads)
                kept.append(step)
        return _folded(Program(self._inputs, tuple(reversed(kept)), output))


def _folded(program: Program) -> Program:
    readers, made = program.readers(), dict[int, int]()  # value -> place of the step that writes it
    steps: list[Step] = []
    for step in program.steps:
        place = made.get(step.reads[0]) if step.op == BATCH_NORM else None
        if place is not None and steps[place].op == CONVOLUTION and readers[step.reads[0]] == 1:
            kernel = steps[place].weights[0]
            weights = (kernel, kernel[:1])  # the norm leaves a bias
            steps[place] = replace(steps[place], writes=step.writes, weights=weights)
            made[step.writes] = place
        else:
            made[step.writes] = len(steps)
            steps.append(step)
    return replace(program, steps=tuple(steps))
