"""Arguments and options that several commands have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evaluation.errors import InputError


class Until(StrEnum):
    """After which stage a run stops."""

    BLOCKS = "blocks"
    NETWORKS = "networks"
    RETRAIN = "retrain"


class Device(StrEnum):
    """Where a run computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"

    def resolve(self) -> str:
        """Return `cpu` or `cuda`.

        Raises:
            InputError: If `cuda` is asked for where there is none.
        """
        import torch

        there = torch.cuda.is_available()
        if self is Device.CUDA and not there:
            raise InputError("--device cuda: this machine has no GPU that torch can use; try cpu")
        return "cuda" if there and self is not Device.CPU else "cpu"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the run; default: runs/NAME, as the config is called."),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value.")
]
Where = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Count = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Worker processes; default: workers.count of the config."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Images = Annotated[
    Path | None,
    typer.Option("--data", help="Where the images of the run are, if they have moved."),
]
