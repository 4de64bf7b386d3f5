"""Weights on disk: safetensors, with a line in the header that says what rebuilds the network."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evaluation.errors import InputError
from evaluation.files.bounded import check_file
from evaluation.workers.memory import available_bytes

KEY = "paretoblocks"  # one entry of the header: safetensors writes several in no fixed order
LONGEST_DESCRIPTION = 1_000_000  # characters


def weights_of(model: nn.Module, description: str = "") -> bytes:
    """Return the file of a model's state; equal states and descriptions give equal bytes."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    return save(state, {KEY: description} if description else None)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return what `weights_of` made: the state, and the description (empty if there is none).

    Raises:
        InputError: If the file is missing or damaged, or the description too long.
    """
    try:
        check_file(path, available_bytes("cpu"))
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get(KEY, "")
            if len(description) > LONGEST_DESCRIPTION:
                raise InputError(f"{path}: its description has {len(description):,} characters")
            # A header of a few bytes cannot ask for memory: tensors lie within the file.
            return {name: file.get_tensor(name) for name in file.keys()}, description
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected a safetensors file: {error}") from error
