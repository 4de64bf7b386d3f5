"""What every key of a config takes: the keys of a table, or the kind of a value."""

import difflib
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Kind = Literal["text", "choice", "whole", "number", "other"]
KINDS: dict[Any, Kind] = {str: "text", Literal: "choice", int: "whole", float: "number"}
MAX_MEANT = 3  # keys that an unknown one may stand for
NEAR, NEAR_ELSEWHERE = 0.7, 0.8  # of difflib, for keys of the same table and of others


@dataclass(frozen=True)
class Value:
    """What a key takes that is no table.

    Attributes:
        kind: `text` as it was typed, one word of a `choice`, a `whole` number, a `number`, or what
            YAML makes of it.
        lists: Whether it may be a list of them.
    """

    kind: Kind = "other"
    lists: bool = False


Table = dict[str, "Table | Value"]


def table_of(model: type[BaseModel]) -> Table:
    """Return the keys of a model, and of the tables within it."""
    return {name: _taken(field.annotation) for name, field in model.model_fields.items()}


def swept(table: Table) -> Table:
    """Return the same keys, each of which takes a list of values too."""
    return {
        name: swept(one) if isinstance(one, dict) else replace(one, lists=True)
        for name, one in table.items()
    }


def names_of(table: Table, within: str = "") -> list[str]:
    """Return the full name of every key, `data` and `data.root`, in the order of the tables."""
    names = []
    for key, one in table.items():
        names.append(f"{within}{key}")
        if isinstance(one, dict):
            names += names_of(one, f"{within}{key}.")
    return names


def find(table: Table, name: str) -> Table | Value | None:
    """Return what a full name stands for; None where there is no such key."""
    found: Table | Value | None = table
    for key in filter(None, name.split(".")):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def nearest(name: str, table: Table) -> list[str]:
    """Return the full names of the keys that are probably meant by one that there is not.

    That is a similar one of the same table, and those of the same last name in tables within it;
    else those of the same last name anywhere, else a similar one.
    """
    within, _, last = name.rpartition(".")
    names, here = names_of(table), f"{within}." if within else ""
    same = [one for one in names if one.rpartition(".")[2] == last]
    keys, plain = find(table, within), last.lower().replace("-", "_")
    siblings = keys if isinstance(keys, dict) else {}
    near = difflib.get_close_matches(plain, siblings, n=1, cutoff=NEAR)
    inside = [one for one in same if one.startswith(here)]
    if near or inside:
        return [*(f"{here}{one}" for one in near), *_by_likeness(name, inside)][:MAX_MEANT]
    if same:
        return _by_likeness(name, same)
    lasts = {one.rpartition(".")[2]: one for one in reversed(names)}
    near = difflib.get_close_matches(plain, lasts, n=1, cutoff=NEAR_ELSEWHERE)
    return [lasts[one] for one in near]


def either(words: Sequence[str]) -> str:
    """Return words as in `a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _by_likeness(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=MAX_MEANT, cutoff=0.0)


def _taken(annotation: Any) -> Table | Value:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _taken(inner[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return table_of(annotation)
    if origin in (Union, types.UnionType):
        first, *others = [_taken(one) for one in inner if one is not types.NoneType]
        return replace(first, lists=True) if others and isinstance(first, Value) else first
    if origin is tuple:
        of = _taken(inner[0])
        return replace(of, lists=True) if isinstance(of, Value) else Value()
    return Value(KINDS.get(origin or annotation, "other"))
