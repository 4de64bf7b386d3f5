"""What a trained network says of pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from evaluation.data.preprocessing import Preprocessing
from evaluation.errors import printable


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, the likeliest first.

    Attributes:
        image: The file.
        classes: Their names.
        probabilities: Theirs, each in [0, 1]; all classes together have 1.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


@torch.no_grad()
def classify(
    model: nn.Module, preprocessing: Preprocessing, images: Sequence[Path], top: int
) -> list[Prediction]:
    """Classify pictures one by one.

    Args:
        model: In evaluation mode, on the CPU.
        preprocessing: Of its images.
        images: Picture files of any size.
        top: How many classes of each, at most all.

    Raises:
        InputError: If a file is no undamaged image; names it.
    """
    found = []
    for path in images:
        shares = model(preprocessing.read([path])).softmax(dim=1)[0]
        values, indices = shares.topk(min(top, len(shares)))
        names = tuple(preprocessing.class_names[index] for index in indices.tolist())
        found.append(Prediction(str(path), names, tuple(values.tolist())))
    return found


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """Return the predictions, a row a picture."""
    table = Table(box=None)
    table.add_column("image", overflow="fold")
    table.add_column("classes and their probabilities", overflow="fold")
    for one in predictions:
        pairs = zip(one.classes, one.probabilities, strict=True)
        said = ", ".join(f"{name} {share:.3f}" for name, share in pairs)
        # Names are text: neither markup nor orders to the terminal.
        table.add_row(Text(printable(one.image)), Text(printable(said)))
    return table
