"""One complete, commented YAML file per experiment; and how such a file is found and read.

A package, so that an installed copy finds its files too.
"""

import codecs
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.keys import Table
from configs.values import apply, parse, settle
from evaluation.errors import InputError
from evaluation.files.bounded import MAX_CONFIG_BYTES, read_bounded

FOLDER = Path(__file__).parent
MARKS = {  # at the beginning of a file; that of UTF-32 begins as that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
CONTROLS = {*range(32)} - {*b"\t\n\f\r"}  # bytes that no text has


def read_config(
    path: Path, changes: Sequence[str] = (), table: Table | None = None
) -> dict[str, Any]:
    """Read a config file as plain data and apply `key=value` changes.

    `NAME.yaml` and `configs/NAME.yaml` that are not there are looked up in this package.

    Args:
        path: The YAML file.
        changes: Each `table.key=value`; the value as in YAML, or as it is for a key of a text.
        table: What the keys take; values of other keys are what YAML makes of them.

    Returns:
        A table of keys and values.

    Raises:
        InputError: If the file cannot be read, or a change has another form.
    """
    table = table or {}
    if not path.exists() and path.parent in (Path(), Path("configs")):
        path = FOLDER / path.name if (FOLDER / path.name).exists() else path
    try:
        content = read_bounded(path, MAX_CONFIG_BYTES)
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # or a path of no file
        raise InputError(
            f"{path}: expected a config file, got none{_there_are(path.name)}"
        ) from error
    except IsADirectoryError as error:
        raise InputError(
            f"{path}: expected a config file, got a folder; if it holds pictures: "
            f"`run configs/image_folder.yaml --set data.root={path}`"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    written = parse(_text(content, path), str(path))
    if not isinstance(written, dict):
        raise InputError(f"{path}: expected tables of keys and values, got {_kind(written)}")
    data: dict[str, Any] = settle(written, table)
    for change in changes:
        apply(data, change, table)
    return data


def _there_are(name: str) -> str:
    """Say which configs there are, the one first that is probably meant."""
    names = {path.stem: path.name for path in sorted(FOLDER.glob("*.yaml"))}
    near = difflib.get_close_matches(Path(name).stem, names, n=1)
    meant = f" (did you mean {names[near[0]]}?)" if near else ""
    return f"{meant}; there are {', '.join(names.values())}"


def _kind(data: Any) -> str:
    if data is None:
        return "nothing"
    return "a list" if isinstance(data, list) else "a single value"


def _text(content: bytes, path: Path) -> str:
    """Decode UTF-8.

    Raises:
        InputError: If it is none; says which encoding it seems to be.
    """
    expected, save = f"{path}: expected UTF-8 text", "(save it as UTF-8)"
    if encoding := _other_encoding(content):
        raise InputError(f"{expected}; it looks like {encoding} {save}")
    if 0 in content:
        raise InputError(f"{expected}; it looks like no text: {_where(content, content.index(0))}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        letters = CONTROLS.isdisjoint(content)
        seems = f"Latin-1 or Windows-1252 {save}" if letters else "no text"
        where = _where(content, error.start)
        raise InputError(f"{expected}; it looks like {seems}: {where}") from error


def _where(content: bytes, at: int) -> str:
    return f"line {content.count(10, 0, at) + 1} has {content[at]:#04x} at offset {at:,}"


def _other_encoding(content: bytes) -> str | None:
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    fewer, more = sorted((content[::2].count(0), content[1::2].count(0)))
    return "UTF-16" if 10 * fewer < more > len(content) / 4 else None  # every other byte is zero
