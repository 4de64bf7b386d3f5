"""One complete, commented YAML file per experiment; and how such a file is found and read.

A package, so that an installed copy finds its files too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.bounded import MOST_CONFIG_BYTES, parse_yaml, read_bounded
from evaluation.errors import InputError

FOLDER = Path(__file__).parent


def read_config(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config file as plain data and apply `key=value` changes.

    `NAME.yaml` and `configs/NAME.yaml` that are not there are looked up in this package.

    Args:
        path: The YAML file.
        changes: Each `table.key=value`, the value as in YAML.

    Raises:
        InputError: If the file cannot be read, or a change has another form.
    """
    if not path.exists() and path.parent in (Path(), Path("configs")):
        path = FOLDER / path.name if (FOLDER / path.name).exists() else path
    try:
        text = read_bounded(path, MOST_CONFIG_BYTES).decode()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # the latter: no text, or a path of no file
        names = ", ".join(sorted(p.name for p in FOLDER.glob("*.yaml")))
        raise InputError(f"{path}: expected a config file; there are {names} ({error})") from error
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected tables of keys and values, got {type(data).__name__}")
    for change in changes:
        _apply(data, change)
    return data


def _apply(data: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change}: expected key=value")
    *tables, last = key.split(".")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {change}: {name} is a value, not a table")
    data[last] = _parse(value, f"--set {change}")


def _parse(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{where}: not YAML: {error}") from error
