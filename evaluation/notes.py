"""How values are refused, and how sentences count and name things."""

from collections.abc import Sequence

from evaluation.errors import InputError

MOST_NAMED = 3


def require(condition: bool, message: str) -> None:
    """Raise an InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number and the noun in its form: `1 picture`, `2,000 pictures`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def named(names: Sequence[object], *, separator: str = ", ") -> str:
    """Return the first names in one line, and how many more there are."""
    more = len(names) - MOST_NAMED
    first = separator.join(map(str, names[:MOST_NAMED])).replace("\n", "\\n")
    return f"{first} and {more:,} more" if more > 0 else first
