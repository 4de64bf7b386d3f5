"""Numbers as people write them: 300k, 20M, 1.5G, 1e5, 10,000, 10_000; in configs and options alike.

Commas stand only between groups of three digits: `1,5` is no number, and `0,125` none either.
"""

import re
from fractions import Fraction

from evaluation.errors import InputError
from evaluation.files.bounded import MAX_DIGITS

FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
NUMBER = re.compile(
    r"(?P<digits>[+-]?(?:"
    r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?"  # 10,000.5
    r"|(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9]*)?"  # 10_000.5; 010 was 8 to YAML
    r"|\.[0-9]+)"
    r"(?P<power>[eE][+-]?[0-9]{1,4})?)"
    r"(?P<unit>[kKMG]?)"
)
MOST = 10**300  # doubles end at 1e308, and a kB has 1000 bytes


def read_number(text: str) -> int | float | None:
    """Read a number; None where the text is none, or one beyond 1e300.

    Returns:
        An integer where it is written as one or has a unit and comes out whole, else a float.
    """
    value, found = _read(text)
    if value is None or found is None:
        return None
    if found["unit"]:
        return int(value) if value.denominator == 1 else float(value)
    digits = _plain(found["digits"])
    return float(digits) if "." in digits or found["power"] else int(digits)


def read_whole(text: str) -> int | None:
    """Read a number that comes out whole, however it is written; None where it is none."""
    value, _ = _read(text)
    return int(value) if value is not None and value.denominator == 1 else None


def _read(text: str) -> tuple[Fraction | None, re.Match[str] | None]:
    found = NUMBER.fullmatch(text.strip()) if len(text) <= MAX_DIGITS else None
    if found is None:
        return None, None
    value = Fraction(_plain(found["digits"])) * FACTORS[found["unit"]]
    return (value if abs(value) <= MOST else None), found


def _plain(digits: str) -> str:
    return digits.replace(",", "").replace("_", "")


def amount(text: str | None, option: str = "") -> int | None:
    """Read the count that an option takes.

    Raises:
        InputError: If it is none, not whole, or not positive.
    """
    if text is None:
        return None
    value = read_whole(text)
    if value is None or value < 1:
        raise _refused(option, "a positive amount such as 300k or 20M", text)
    return value


def quantity(text: str | None, option: str = "") -> float | None:
    """Read the number that an option takes.

    Raises:
        InputError: If it is none.
    """
    if text is None:
        return None
    value = read_number(text)
    if value is None:
        raise _refused(option, "a number such as 0.5 or 1,000", text)
    return float(value)


def _refused(option: str, expected: str, text: str) -> InputError:
    shown = text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}..."
    return InputError(f"{option}{': ' if option else ''}expected {expected}, got {shown!r}")


def kilobytes(text: str | None, option: str = "") -> int | None:
    """Read the kB of 1000 bytes that an option takes; returns bytes.

    Raises:
        InputError: If it is no number, or less than a byte.
    """
    size = quantity(text, option)
    if text is None or size is None:
        return None
    if not size >= 0.001:
        raise _refused(option, "kilobytes of at least one byte, such as 64", text)
    return int(1000 * size)
