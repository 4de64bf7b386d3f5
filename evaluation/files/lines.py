"""JSON lines: one object a line, and at its end a check of itself that says whose it is.

The check is a hash of the line and of a salt, so that a line that was changed, or is of another
file or run, is none of this. Logs, archives and manifests are such files; all are only appended to.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from evaluation.files.bounded import parse_json

CHECK = re.compile(rb',"check":"([0-9a-f]{16})"\}$')  # the end of a line


def sealed(data: Mapping[str, Any], salt: str | None) -> bytes:
    """Return data as a line of JSON without a newline; with a salt, `check` is its last key."""
    body = json.dumps(data, separators=(",", ":")).encode()
    if salt is None:
        return body
    return body[:-1] + f',"check":"{_digest(body, salt)}"}}'.encode()


def unsealed(text: bytes, salt: str | None) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the number of each line and its data, or why there is none.

    Args:
        text: The lines.
        salt: Without one, checks are passed over.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield number, _data_of(line, salt)
        except ValueError as error:
            yield number, error


def _data_of(line: bytes, salt: str | None) -> dict[str, Any]:
    """Return the data of a line without `check`.

    Raises:
        ValueError: If the line is no object of JSON, or its check is not that of its data.
    """
    found = CHECK.search(line)
    body = line[: found.start()] + b"}" if found else line
    if salt is not None and (found is None or found[1].decode() != _digest(body, salt)):
        raise ValueError("its check does not fit: changed, or of another file")
    data = parse_json(body)
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {type(data).__name__}")
    return data


def _digest(body: bytes, salt: str) -> str:
    return hashlib.sha256(salt.encode() + b"\n" + body).hexdigest()[:16]
