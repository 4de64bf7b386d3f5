"""Values of a config as they were typed: texts stay so, and a number may be written 300k or 1e5."""

from typing import Any

from configs.keys import Kind, Table, Value, find
from evaluation.errors import InputError
from evaluation.files.bounded import Written, parse_yaml
from evaluation.terminal.amounts import read_number, read_whole

LONGEST = 200  # characters of a change that an error repeats
READERS = {"whole": read_whole, "number": read_number}


def settle(data: Any, taken: Table | Value | None) -> Any:
    """Return data of `parse_yaml(written=True)` with each value as its key takes it.

    Tables that YAML's aliases repeat become tables of their own, so that one may be changed alone.
    What a key does not take stays for the models to refuse; a number that cannot be read stays
    `Written`, so that they do not read it in their own way.
    """
    if isinstance(data, dict):
        inner = taken if isinstance(taken, dict) else {}
        return {_plain(key): settle(one, inner.get(_plain(key))) for key, one in data.items()}
    kind = taken.kind if isinstance(taken, Value) else "other"
    if isinstance(data, list):
        of = kind if isinstance(taken, Value) and taken.lists else "other"
        return [settle(one, Value(of)) for one in data]
    return _settled(data, kind)


def apply(data: dict[str, Any], change: str, table: Table) -> None:
    """Make one change `key=value` in settled data.

    A text is taken exactly as it was typed; `null`, or nothing, is None. Other values are YAML.

    Raises:
        InputError: If the change has another form, or its key is within a value.
    """
    name, equals, value = change.partition("=")
    change = change if len(change) <= LONGEST else f"{change[:LONGEST]}..."
    keys = name.split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {change}: expected key=value, such as data.root=pictures")
    if name != "".join(name.split()):
        raise InputError(f"--set {change}: expected key=value, without spaces around the key")
    *tables, last = keys
    for key in tables:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {change}: {key} is a value, not a table")
    taken = find(table, name)
    data[last] = settle(_typed(value, taken, f"--set {change}"), taken)


def parse(text: str, where: str) -> Any:
    """Parse YAML, and keep how its values were written.

    Raises:
        InputError: If it cannot be parsed.
    """
    try:
        return parse_yaml(text, written=True)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: not YAML: {error}") from error


def _typed(text: str, taken: Table | Value | None, where: str) -> Any:
    if isinstance(taken, Value) and taken.kind == "text" and not taken.lists:
        return None if text in ("", "null") else text
    if isinstance(taken, Value) and taken.kind == "choice" and not taken.lists:
        return text.strip().strip("\"'")
    return parse(text, where)


def _settled(value: Any, kind: Kind) -> Any:
    text = value.text if isinstance(value, Written) else value
    if kind in READERS and isinstance(text, str):
        number = READERS[kind](text)
        return Written(text, text) if number is None else number
    return text if kind in ("text", "choice") else _plain(value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Written) else value
