"""Checkpoints: tensors and plain values, written whole or not at all, read without pickle."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from evaluation.errors import InputError
from evaluation.records import write_atomic


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
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: damaged checkpoint ({error}); delete it to start this step anew"
        ) from error
    return state
