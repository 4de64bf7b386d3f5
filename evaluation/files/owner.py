"""Which process is at work in the folder of a run."""

import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from evaluation.errors import InputError
from evaluation.files.atomic import read_json


def this_process() -> dict[str, Any]:
    """Return what the file of the owner says."""
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": began}


def described(owner: Path) -> str:
    """Say who holds a folder, as far as its file tells."""
    try:
        data = read_json(owner)
        pid, host, since = int(data["pid"]), str(data["host"]), str(data["since"])
    except (InputError, KeyError, TypeError, ValueError):
        return "it has not said which process it is"
    words = f"process {pid} on {host:.100}, since {since:.40}"
    return "".join(letter if letter.isprintable() else "?" for letter in words)
