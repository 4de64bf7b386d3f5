"""Whole files: written at once or not at all; JSON."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaluation.errors import InputError, naming
from evaluation.files.bounded import MAX_JSON_BYTES, parse_json, read_bounded


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file under a temporary name, force it to disk, then rename it into place.

    Raises:
        OSError: If it cannot be written; what was there stays. A folder that has gone is not made
            again, since a run would go on in one that lacks everything else.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()  # a part of it fills a full disk for nothing
            raise


def json_text(data: Any) -> str:
    """Return indented JSON; equal data gives equal bytes."""
    return json.dumps(data, indent=1) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If it is missing, unreadable or not JSON.
    """
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a readable JSON file: {error}") from error
