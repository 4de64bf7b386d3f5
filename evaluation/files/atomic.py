"""Whole files: written at once or not at all, listed in the manifest, checked when read."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaluation.errors import InputError, naming
from evaluation.files.bounded import MAX_JSON_BYTES, parse_json, read_bounded
from evaluation.files.manifest import check, enlist


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


def write_listed(path: Path, data: bytes | str) -> None:
    """Write a whole file atomically; in the folder of a run, list it in the manifest before."""
    data = data.encode() if isinstance(data, str) else data
    enlist(path, hashlib.sha256(data).hexdigest())
    write_atomic(path, data)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON as `write_listed` does; equal data gives equal bytes."""
    write_listed(path, json_text(data))


def json_text(data: Any) -> str:
    """Return what `write_json` writes."""
    return json.dumps(data, indent=1) + "\n"


def read_json(path: Path, *, listed: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        listed: Whether one in the folder of a run must be as the run wrote it; for the files that
            a person puts there it need not.

    Raises:
        InputError: If it is missing, unreadable, not JSON, or not what the run wrote.
    """
    try:
        if listed:
            check(path)
        return parse_json(read_bounded(path, MAX_JSON_BYTES))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a readable JSON file: {error}") from error
