"""Checkpoints: where a training is, in two generations of a file that is checked when it is read.

A file is a line that names the format, the SHA-256 of the rest, and tensors and plain values as
`torch.save` writes them; it is read without pickle.
"""

import hashlib
import io
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaluation.errors import DAMAGED, InputError, reason_of
from evaluation.files.atomic import write_atomic
from evaluation.files.bounded import read_bounded
from evaluation.workers.memory import available_bytes

EVERY_S = 60.0  # default of what a kill may cost, beside the time that a checkpoint takes
FORMAT = b"paretoblocks checkpoint 1\n"
ZIP = b"PK\x03\x04"
DIGEST_BYTES = hashlib.sha256().digest_size
# What torch and the parts of a training raise on what is no state of theirs.
NO_STATE = (*DAMAGED, pickle.UnpicklingError, zipfile.BadZipFile)

State = dict[str, Any]


class Stateful(Protocol):
    """A part of a training that can be stopped and gone on with."""

    def state_dict(self) -> State:
        """Return everything that a checkpoint must carry: tensors and plain values."""

    def load_state_dict(self, state: State) -> None:
        """Go on from `state_dict`, its tensors on the CPU."""


@dataclass
class Position:
    """Where a training is: epochs done, steps done of the next one, and what these steps logged.

    What was logged stays on its device until the epoch ends, so that no step waits for it.
    """

    epoch: int = 0
    step: int = 0
    logged: dict[str, list[Tensor]] = field(default_factory=dict)

    def end_step(self, scalars: dict[str, Tensor]) -> None:
        """Count a step and keep its scalars."""
        for name, value in scalars.items():
            self.logged.setdefault(name, []).append(value)
        self.step += 1

    def end_epoch(self) -> dict[str, float]:
        """Count an epoch and return the means of what its steps logged."""
        means = {name: float(values.mean()) for name, values in self._joined().items()}
        self.epoch, self.step, self.logged = self.epoch + 1, 0, {}
        return means

    def state_dict(self) -> State:
        """Return everything that a checkpoint must carry."""
        return {"epoch": self.epoch, "step": self.step, "logged": self._joined()}

    def load_state_dict(self, state: State) -> None:
        """Go on from `state_dict`."""
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.logged = {name: [values] for name, values in state["logged"].items()}

    def _joined(self) -> dict[str, Tensor]:
        """Each scalar of all steps, (step,); those of a loaded state come from the CPU."""
        return {
            name: torch.cat([v.detach().reshape(-1).to(values[-1].device) for v in values])
            for name, values in self.logged.items()
        }


class Checkpoint:
    """The newest state of one training, and the one before for the case that it is damaged.

    Attributes:
        path: Of the newest; the one before has `.old` behind its name.
        restored: Whether a state was found.
    """

    def __init__(
        self,
        path: Path,
        of: str = "",
        *,
        every_s: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Name the files; none is touched.

        Args:
            path: Of the newest.
            of: What the training is, as a text; a checkpoint of another one is refused.
            every_s: Seconds after which one is due; None: a minute.
            say: Told in a line when the newest is damaged and the one before is used.
            clock: Seconds from some point in time on.
        """
        self.path = path
        self.before = path.with_name(f"{path.name}.old")
        self.restored = False
        self._of = hashlib.sha256(of.encode()).hexdigest()
        self._every_s = EVERY_S if every_s is None else every_s
        self._say = say
        self._clock = clock
        self._last_s = clock()

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Load the newest good state into the parts; they stay as they are if there is no file.

        Raises:
            InputError: If there are files and none is good: damaged, or of another training.
        """
        wrong = []
        for path in (self.path, self.before):
            if not path.exists():
                continue
            try:
                states = self._read(path)
                for name, part in parts.items():
                    part.load_state_dict(states[name])
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # no fault of the file
            except NO_STATE as error:
                wrong.append(f"{path}: damaged or foreign checkpoint ({reason_of(error)})")
                continue
            if wrong:
                self._say(f"{wrong[0]}; goes on from the one before")
                path.replace(self.path)  # the next one must not push out the only good one
            self.restored = True
            return
        if wrong:
            raise InputError(f"{'; '.join(wrong)}; delete it to start this step over")

    def due(self) -> bool:
        """Tell whether the last checkpoint is long enough ago; asks nothing of the device."""
        return self._clock() - self._last_s >= self._every_s

    def save(self, parts: Mapping[str, Stateful]) -> None:
        """Write the state of the parts; a kill leaves at least one whole file at every moment."""
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"of": self._of, "states": states}, buffer)
        data = buffer.getvalue()
        if self.path.exists():
            self.path.replace(self.before)
        write_atomic(self.path, FORMAT + hashlib.sha256(data).digest() + data)
        self._last_s = self._clock()

    def remove(self) -> None:
        """Remove both files, as the result is there."""
        self.path.unlink(missing_ok=True)
        self.before.unlink(missing_ok=True)

    def _read(self, path: Path) -> State:
        file = io.BytesIO(read_bounded(path, available_bytes("cpu")))
        if file.read(len(FORMAT)) != FORMAT:
            raise ValueError("it does not begin as a checkpoint does")
        digest, data = file.read(DIGEST_BYTES), file.read()
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("its content is not what was written")
        found = _loaded(data)
        if found["of"] != self._of:
            raise ValueError("it is of another training")
        states: State = found["states"]
        return states


def _loaded(data: bytes) -> Any:
    """Return what `torch.save` wrote, if reading it takes no more memory than it has bytes.

    Raises:
        ValueError: If it is no archive, its members are declared larger, or a tensor shows the
            same values again and again.
    """
    if not data.startswith(ZIP):  # torch would read an older format, which declares sizes
        raise ValueError("it is no archive of tensors")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > len(data):
        raise ValueError(f"it declares {declared:,} bytes in {len(data):,}")
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    left, seen = [found], set[int]()
    while left:
        one = left.pop()
        if isinstance(one, Tensor) and one.nbytes > one.untyped_storage().nbytes():
            raise ValueError(f"it declares a tensor {tuple(one.shape)} of fewer values")
        if isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, dict) else one
    return found
