"""Numbers and names as a person reads them."""

from collections.abc import Sequence

MAX_NAMED = 3


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number and the noun in its form: `1 picture`, `2,000 pictures`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def named(names: Sequence[object], *, separator: str = ", ") -> str:
    """Return the first names in one line, and how many more there are."""
    more = len(names) - MAX_NAMED
    first = separator.join(map(str, names[:MAX_NAMED])).replace("\n", "\\n")
    return f"{first} and {more:,} more" if more > 0 else first


def count(value: float, digits: str = "#.3g") -> str:
    """Return a count for a reader, by default with three digits: 840, 12.3k, 1.20M."""
    rounded = float(f"{value:.3g}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= unit:
            return f"{rounded / unit:{digits}}".rstrip(".") + letter
    return f"{rounded:g}"


def percent(fraction: float) -> str:
    """Return a fraction as per cent with two decimals."""
    return f"{100 * fraction:.2f} %"


def milliseconds(value: float, digits: int = 3) -> str:
    """Return milliseconds for a reader, by default with three digits and without the unit."""
    return f"{value:#.{digits}g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def kilobytes(size: float) -> str:
    """Return bytes as kB of 1000 bytes, so that sizes compare at a glance."""
    return f"{size / 1000:,.1f} kB"


def fraction(value: float | None) -> str:
    """Return an accuracy in [0, 1] with four digits; a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Write a duration for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
