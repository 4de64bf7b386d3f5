"""Random bytes and mutations of valid files: JSON, YAML, safetensors, zip, and any other bytes."""

import io
import json
import re
import struct
import zipfile
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP, DIGITS = "@deep@", "@digits@"  # what JSON itself would not write
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 64, 10**6, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "x" * 5000, "\ud800", "\x00", "\x1b[31m[red]", "../../x",
    "1" * 5000, [], {}, [[]], [None], {"": None}, [0] * 300, DEEP, DIGITS,
)  # fmt: skip


def inputs(valid: bytes, form: str) -> st.SearchStrategy[bytes]:
    """Return random bytes, and mutations of a valid file."""
    kinds = [st.binary(max_size=300), _damaged(valid), _damaged(valid)]
    if form == "json":
        kinds += [_json(valid)] * 3
    elif form == "lines":
        kinds += [st.lists(_json(line), max_size=4).map(b"\n".join) for line in valid.splitlines()]
        kinds += [kind.map(lambda line: line + b"\n" + valid) for kind in kinds[-2:]]
    elif form == "yaml":
        kinds += [_yaml(valid)] * 3 + [st.sampled_from([*bombs()])]
    elif form == "safetensors":
        kinds += [_header(valid)] * 3
    elif form == "zip":
        kinds += [_member(valid)] * 3
    return st.one_of(kinds)


def bombs() -> list[bytes]:
    """Return YAML that a careless reader expands without end."""
    laughs = "\n".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}*a{i}]" for i in range(30))
    merges = "\n".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}" for i in range(30))
    return [
        f"a0: &a0 lol\n{laughs}\nseed: *a30\n".encode(),
        f"a0: &a0 {{x: 1}}\n{merges}\n".encode(),
        b"seed: &a [*a]\n", b"&a {*a : *a}\n", b"[" * 20_000, b"{a: " * 20_000, b"- " * 20_000,
        b"seed: !!timestamp x\n", b"seed: !!bool x\n", b"seed: !!int ''\n", b"seed: 2026-99-99\n",
        b"seed: !!python/object/apply:os.system [id]\n", b"? [a]\n: 1\n", b"seed: !!float _\n",
        b"seed: " + b"9" * 5000, b"seed: 1\n" * 40_000, b"seed: 0x" + b"f" * 5000,
    ]  # fmt: skip


@st.composite
def _damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Flip bits, cut, insert and repeat."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(("flip", "cut", "insert", "repeat", "end", "number"))):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place : place + length]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                data[place:place] = data[place : place + length] * draw(st.integers(1, 20))
            case "number":  # a length or an offset of a binary format
                chosen = draw(st.sampled_from((0, 1, 255, 2**31 - 1, 2**32 - 1)))
                data[place : place + 4] = chosen.to_bytes(
                    4, draw(st.sampled_from(("big", "little")))
                )
            case _:
                del data[place:]
    return bytes(data)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in JSON data."""
    if not isinstance(data, dict | list):
        return [path]
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    return [path, *(one for key, value in inner for one in places(value, (*path, key)))]


def changed(data: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """Return a copy of JSON data in which one place was replaced, removed or doubled."""
    if not path:
        return value
    data = json.loads(json.dumps(data))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    key = path[-1]
    if how == "remove":
        del inner[key]
    elif how == "add" and isinstance(inner, dict):
        inner["unknown"] = value
    elif how == "add":
        inner += [inner[key]] * 3
    else:
        inner[key] = value
    return data


@st.composite
def values(draw: st.DrawFn, data: Any) -> Any:
    """Return JSON data with up to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        value = draw(st.one_of(st.sampled_from(JUNK), st.integers(), st.floats(), st.text()))
        data = changed(data, path, how, value)
    return data


def text_of(data: Any) -> str:
    """Return JSON that may nest too deep and have too many digits."""
    text = json.dumps(data).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    return text.replace(f'"{DIGITS}"', "9" * 5000)


def _json(valid: bytes) -> st.SearchStrategy[bytes]:
    return values(json.loads(valid)).map(lambda data: text_of(data).encode())


def _yaml(valid: bytes) -> st.SearchStrategy[bytes]:
    # JSON is YAML, but for what JSON has beyond it: NaN is a string there.
    return values(yaml.safe_load(valid)).map(lambda data: text_of(data).encode())


@st.composite
def _header(draw: st.DrawFn, valid: bytes) -> bytes:
    """Change the header of safetensors, or the JSON inside its metadata."""
    (length,) = struct.unpack("<Q", valid[:8])
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    (key, about), *_ = header["__metadata__"].items()
    if draw(st.booleans()):
        header["__metadata__"][key] = text_of(draw(values(json.loads(about))))
    else:
        header = draw(values(header))
    if draw(st.integers(0, 3)) == 0:
        body = draw(_damaged(body))
    text = text_of(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def _member(draw: st.DrawFn, valid: bytes) -> bytes:
    """Damage one member of a zip file, and write it with a good checksum."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as source, zipfile.ZipFile(made, "w") as target:
        names = source.namelist()
        chosen = draw(st.sampled_from(names))
        way = draw(st.sampled_from(("damage", "damage", "remove", "rename", "double")))
        for name in names:
            data = source.read(name)
            if name != chosen or way == "damage":
                target.writestr(name, draw(_damaged(data)) if name == chosen else data)
            elif way == "rename":
                target.writestr(draw(st.sampled_from(("x", "../x", "/x", name[:-4]))), data)
            elif way == "double":
                target.writestr(name, data * 3)
    return made.getvalue()


def names_a_key(message: str, keys: set[str]) -> bool:
    """Tell whether an error of a config names one of its keys."""
    return any(re.search(rf"\b{re.escape(key)}\b", message) for key in keys)
