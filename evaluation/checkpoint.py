"""Checkpoints: tensors and plain values, written whole or not at all, read without pickle."""

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import torch

from evaluation.bounded import check_file
from evaluation.errors import InputError
from evaluation.records import write_atomic

BAD_CHECKPOINT = (  # what torch and the restricted unpickler raise on damaged files
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint onto the CPU; None when there is none.

    Raises:
        InputError: If the file is damaged.
    """
    if not path.exists():
        return None
    check_file(path)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except BAD_CHECKPOINT as error:
        raise InputError(
            f"{path}: damaged checkpoint ({error}); delete it to start this step anew"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: damaged checkpoint; delete it to start this step anew")
    return state
