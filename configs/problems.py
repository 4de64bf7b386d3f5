"""What is wrong with a config, in plain words: the key, what was expected, what came."""

import difflib
import re
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.keys import Table, Value, either, find, nearest
from evaluation.files.bounded import Written

MAX_TOLD, LONGEST = 20, 80  # problems; characters of a value

BOUNDS = {  # type of pydantic -> what was expected, and the name of the bound in its context
    "greater_than": ("more than {}", "gt"),
    "greater_than_equal": ("at least {}", "ge"),
    "less_than": ("less than {}", "lt"),
    "less_than_equal": ("at most {}", "le"),
    "multiple_of": ("a multiple of {}", "multiple_of"),
    "too_short": ("at least {} value", "min_length"),
}
WHOLE, NUMBER = "a whole number such as 20, 300k or 10,000", "a number such as 0.5, 1e-3 or 1,000"
TABLE, SWITCH = "a table of keys and values", "true or false"
EXPECTED = {
    "bool_parsing": SWITCH,
    "bool_type": SWITCH,
    "dict_type": TABLE,
    "float_parsing": NUMBER,
    "float_type": NUMBER,
    "int_from_float": WHOLE,
    "int_parsing": WHOLE,
    "int_parsing_size": WHOLE,
    "int_type": WHOLE,
    "invalid_key": "a name as key",
    "model_type": TABLE,
    "string_type": "a text",
    "string_unicode": "a text in UTF-8",
}


class Problem(NamedTuple):
    """What is wrong with a key; `got` is None where it is said already, or does not matter."""

    key: str
    words: str
    got: str | None = None


def told(error: ValidationError, table: Table, within: str = "") -> str:
    """Return every problem of a config, each after the full name of its key.

    Args:
        error: What a model of the config raised.
        table: What the keys of the whole config take.
        within: Full name of the table that was validated, if it was not all.
    """
    found: dict[tuple[str, str | None], list[str]] = {}  # a key may take one thing or another
    for one in error.errors(include_url=False):
        if not _follows(one):
            key, words, got = _problem(one, table, within)
            found.setdefault((key, got), []).append(words)
    lines = [
        f"{key}: {'; '.join(dict.fromkeys(words))}"
        if got is None
        else f"{key}: expected {' or '.join(dict.fromkeys(words))}, got {got}"
        for (key, got), words in found.items()
    ]
    more = [f"and {len(lines) - MAX_TOLD:,} more"] if len(lines) > MAX_TOLD else []
    return "; ".join([*lines[:MAX_TOLD], *more])


def _follows(one: ErrorDetails) -> bool:
    """Tell whether an error is only what another one leads to, and would mislead.

    A list is no choice where a choice or a list may stand, and one whose values are all refused
    counts as too short.
    """
    got = one["input"]
    if one["type"] == "too_short":
        return bool(got)
    labelled = any("[" in str(part) for part in one["loc"])
    return one["type"] == "literal_error" and labelled and isinstance(got, list | tuple)


def shown(value: Any) -> str:
    """Return a value as a person would write it into a config."""
    match value:
        case Written():
            text = value.text
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case int():
            text = f"{value:,}"
        case str():
            text = repr(value)
        case dict():
            text = "a table" if value else "an empty table"
        case list() | tuple():
            text = f"[{', '.join(map(shown, value[:LONGEST]))}]"
        case _:
            text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _problem(one: ErrorDetails, table: Table, within: str) -> Problem:
    place = [part for part in one["loc"] if isinstance(part, str)]
    names = [part for part in place if "[" not in part]  # pydantic's labels: tuple[str, ...], [key]
    key = ".".join([within, *names] if within else names) or "the config"
    kind, got, context = one["type"], one["input"], one.get("ctx", {})
    if kind == "value_error":  # of our own checks, which say what they got
        return _of_ours(key, str(context["error"]))
    if kind == "extra_forbidden":
        return Problem(key, _unknown(key, table))
    if kind == "missing":
        return Problem(key, "required, and missing")
    if kind == "literal_error":
        return Problem(key, _choices(str(context["expected"]), got), shown(got))
    if kind == "tuple_type":
        return Problem(key, _list_like(got, find(table, key)), shown(got))
    if kind in BOUNDS:
        words, name = BOUNDS[kind]
        return Problem(key, words.format(_limit(context[name])), shown(got))
    if "[key]" in place:
        return Problem(key, EXPECTED["invalid_key"], shown(got))
    if kind in EXPECTED:
        empty = "; {} is an empty one" if got is None and EXPECTED[kind] is TABLE else ""
        return Problem(key, EXPECTED[kind], f"{shown(got)}{_hint(got)}{empty}")
    return Problem(key, one["msg"])


def _of_ours(key: str, message: str) -> Problem:
    """Join the name of a table and that of the key with which our message begins."""
    inner = re.match(r"[\w.]+(?:, [\w.]+)*: ", message)
    if inner is None:
        return Problem(key, message)
    return Problem(f"{key}.{inner[0][:-2]}", message[inner.end() :])


def _unknown(name: str, table: Table) -> str:
    if meant := nearest(name, table):
        return f"there is no such key (did you mean {either(meant)}?)"
    within = name.rpartition(".")[0]
    keys = find(table, within)
    if not isinstance(keys, dict):
        return "there is no such key"
    return f"there is no such key; those of {within or 'a config'} are {', '.join(keys)}"


def _choices(expected: str, got: Any) -> str:
    """Return the choices of pydantic's `'a', 'b' or 'c'`, and the one that is probably meant."""
    choices = re.findall(r"'([^']*)'", expected)
    near = difflib.get_close_matches(str(got).lower(), choices, n=1)
    return f"{either(choices)}{f' (did you mean {near[0]}?)' if near else ''}"


def _list_like(got: Any, taken: Table | Value | None) -> str:
    text = got.text if isinstance(got, Written) else str(got)
    if isinstance(got, str | int | float | Written):
        parts = [part.strip() for part in text.strip("[]").split(",")]
        return f"a list such as [{', '.join(parts)[:LONGEST]}]"
    numbers = isinstance(taken, Value) and taken.kind in ("whole", "number")
    return f"a list such as {'[8, 16]' if numbers else '[first, second]'}"


def _limit(bound: Any) -> str:
    return f"{bound:,.15g}" if isinstance(bound, float) else f"{bound:,}"


def _hint(got: Any) -> str:
    """Say why a text is no number, where it is nearly one."""
    text = got.text if isinstance(got, Written) else got
    if not isinstance(text, str):
        return ""
    if re.fullmatch(r"[0-9.]+ ?%", text):
        return " (20% is written 0.2)"
    if re.fullmatch(r"[+-]?[0-9.]*,[0-9.,]*", text):
        return " (commas stand between groups of three digits, and before a fraction a point)"
    return (
        " (a number has no zero before its other digits)" if re.match("[+-]?0[0-9]", text) else ""
    )
