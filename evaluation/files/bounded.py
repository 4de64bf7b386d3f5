"""Files from strangers: opened if they are files, read if they are small, parsed if not too deep.

Whatever a run reads may come from somebody else. JSON, YAML and the sizes that other formats
declare are therefore checked here before anything is allocated for them.
"""

import json
import re
import stat
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation.errors import InputError

MAX_JSON_BYTES = 64 * 2**20
MAX_LOG_BYTES = 2**30  # an archive of 10,000 networks has about 4 MB
MAX_FILE_BYTES = 2**36  # of any file of a run
MAX_CONFIG_BYTES = 100_000
MAX_CONFIG_VALUES = 20_000  # with what its aliases repeat
MAX_COUNT = 10**18  # of a budget, params or the like: below what arrays of integers hold
MAX_NUMBER = 1e38  # of a rate, a weight, a price or milliseconds: near where float32 ends
DEEPEST = 64  # tables and lists within one another; ours have at most 7
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|\\U0000[dD][89a-fA-F]")
TAG = "tag:yaml.org,2002:"
INTEGER, MAX_DIGITS = f"{TAG}int", 100
MAX_NAMED, LONGEST_KEY = 5, 80  # keys that are given twice, lines of each; characters
PLAIN = (  # a part of what YAML's parser says -> the same for who has not read its grammar
    (r"'\t'", "there is a tab; tables are indented with spaces"),
    ("that cannot start", "a value that begins with this character needs quotes around it"),
    ("mapping values", "a second colon; a value that has one needs quotes around it"),
    ("<block end>", "expected `key: value`, indented as the other keys of its table"),
    ("expected ':'", "expected `key: value`, with a colon and a space"),
    ("',' or ']'", "expected a comma, or the `]` at the end of a list"),
    ("',' or '}'", "expected a comma, or the `}` at the end of a table"),
    ("'<stream end>'", "the list or table that is open here does not end"),
    ("end of stream", "the quotes that are open here do not end"),
)
BAD_YAML = (  # impossible dates, empty numbers and the like are not YAMLError
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)


def check_file(path: Path, most: int | None = None) -> None:
    """Refuse what is there and no file: a pipe or a device could be waited for without end.

    Args:
        path: The file.
        most: Bytes that it may have; None sets no bound.

    Raises:
        OSError: If there is nothing.
        InputError: If it is something else than a file or a folder, or larger.
    """
    found = path.stat()
    mode = found.st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder has its own error
        raise InputError(f"{path}: expected a file, got a pipe, a device or a socket")
    if most is not None and found.st_size > most:
        raise InputError(f"{path}: expected at most {most:,} bytes, got {found.st_size:,}")


def read_bounded(path: Path, most: int) -> bytes:
    """Read a whole file of at most `most` bytes.

    Raises:
        OSError: If there is none, or it cannot be read.
        InputError: If it is larger, or no file.
    """
    check_file(path, most)
    with path.open("rb") as file:
        data = file.read(most + 1)  # it may have grown
    if len(data) > most:
        raise InputError(f"{path}: expected at most {most:,} bytes, got more")
    return data


def parse_json(text: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: If it is none, nests deeper than `DEEPEST`, or holds a string that no encoding
            has (half of a surrogate pair).
    """
    try:
        data = json.loads(text.decode())
    except RecursionError as error:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from error
    if text.count(b"[") + text.count(b"{") > DEEPEST and _is_deep(data):
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
    if b"\\u" in text and SURROGATE.search(text.decode()):
        json.dumps(data, ensure_ascii=False).encode()
    return data


@dataclass(frozen=True)
class Written:
    """A number, a bool or a date of YAML, and how it was written: `no` may be meant as a name."""

    value: Any
    text: str


class _WrittenLoader(yaml.SafeLoader):
    """YAML's safe loader, that keeps how numbers, bools and dates were written."""

    def keep(self, node: yaml.ScalarNode) -> Written | str:
        """Return what YAML makes of a scalar, beside its text."""
        text = str(self.construct_scalar(node))
        try:
            return Written(yaml.SafeLoader.yaml_constructors[node.tag](self, node), text)
        except ValueError:
            if node.tag != f"{TAG}timestamp":
                raise
            return text  # 2024-13-45 is no date, and may be the name of a folder


for _name in ("int", "float", "bool", "timestamp"):
    _WrittenLoader.add_constructor(f"{TAG}{_name}", _WrittenLoader.keep)


def parse_yaml(text: str, *, written: bool = False) -> Any:
    """Parse YAML in which aliases repeat no more than a config could need.

    Args:
        text: The document.
        written: Whether numbers, bools and dates come as `Written`.

    Raises:
        InputError: If a key is given twice in a table; names it and its lines.
        ValueError: If it is no YAML, nests too deep, or its aliases expand without bound.
    """
    if SURROGATE.search(text):  # YAML knows no pairs of them
        raise ValueError("no text has a surrogate")
    if _brackets(text) > DEEPEST:  # PyYAML takes a time that is quadratic in them
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
    loader = None
    try:
        loader = _WrittenLoader(text) if written else yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _expanded(node)) > MAX_CONFIG_VALUES:
            raise ValueError(f"expected at most {MAX_CONFIG_VALUES:,} values, got {count:,}")
        _check_keys(node)
        return loader.construct_document(node)
    except InputError:
        raise
    except BAD_YAML as error:
        raise ValueError(_reason(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _reason(error: Exception) -> str:
    """Say what is wrong with YAML and where, in a line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position + 1:,} is {error.character:#04x}, which no text has"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
        problem = next((ours for theirs, ours in PLAIN if theirs in error.problem), error.problem)
        return f"line {line}, column {column}: {problem}"[:500]
    return " ".join(str(error).split())[:500] or type(error).__name__


def _check_keys(top: yaml.Node) -> None:
    """Refuse keys that a table has twice: the last would win without a word."""
    seen: set[int] = set()
    found: list[str] = []

    def check(node: yaml.Node, where: str) -> None:
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for one in node.value:
                check(one, where)
            return
        lines = defaultdict(list)
        for key, value in node.value:
            name = f"{where}{key.value}"
            lines[key.tag, name].append(key.start_mark.line + 1)
            check(value, f"{name}.")
        found.extend(_repeated(name, at) for (_, name), at in lines.items() if len(at) > 1)

    check(top, "")
    if found:
        raise InputError("; ".join(found[:MAX_NAMED]))


def _repeated(name: str, lines: list[int]) -> str:
    name = name if len(name) <= LONGEST_KEY else f"{name[:LONGEST_KEY]}..."
    times = "twice" if len(lines) == 2 else f"{len(lines)} times"
    if len(set(lines)) == 1:
        return f"`{name}` is given {times}"
    first = ", ".join(map(str, lines[: min(MAX_NAMED, len(lines)) - 1]))
    return f"`{name}` is given {times}, in lines {first} and {lines[-1]}"


def _brackets(text: str) -> int:
    """Return the most brackets open at once, those in strings and comments included."""
    level = deepest = 0
    for found in re.finditer(r"[\[\]{}]", text):
        level = level + 1 if found[0] in "[{" else max(0, level - 1)
        deepest = max(deepest, level)
    return deepest


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _expanded(top: yaml.Node) -> int:
    """Count the values of a document, one that aliases repeat as often as they do."""
    counts: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST or id(node) in open_nodes:
            raise ValueError(f"it nests deeper than {DEEPEST} levels, or in itself")
        if node.tag == INTEGER and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number has {len(node.value):,} digits")
        if id(node) not in counts:
            open_nodes.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [one for pair in inner for one in (pair if isinstance(pair, tuple) else (pair,))]
            counts[id(node)] = 1 + sum(count(one, depth + 1) for one in flat)
            open_nodes.discard(id(node))
        return counts[id(node)]

    return count(top, 0)
