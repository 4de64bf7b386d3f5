"""The one error type that the command line turns into a message and exit status 2."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_REASON = 300  # characters
DAMAGED = (  # what readers of other libraries raise on bytes that are not what they expect
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class InputError(ValueError):
    """What the user gave cannot be used; the message names what came and what was expected."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an `OSError` of the block name this file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def reason_of(error: BaseException) -> str:
    """Return why something failed in a line that fits into a record: the type, then the message."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:LONGEST_REASON]


def printable(text: str) -> str:
    """Return text whose control characters are written out: a terminal would obey them.

    Names and values in messages may come from strangers. Line ends and tabs stay.
    """
    return "".join(
        one if one.isprintable() or one in "\n\t\xa0" else ascii(one)[1:-1] for one in text
    )


def not_installed(extra: str, needed_for: str) -> InputError:
    """Return the error for a package of one of our extras that is not there."""
    return InputError(
        f"{needed_for}: the extra {extra!r} is not installed; pip install 'paretoblocks[{extra}]'"
    )


def require(condition: bool, message: str) -> None:
    """Raise an InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
