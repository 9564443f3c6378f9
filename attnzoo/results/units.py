"""Quantities as text for people: counts, bytes, seconds, shares and ratios, in three digits."""

from __future__ import annotations

ABSENT = "-"


def number(value: float | None) -> str:
    """Three digits, or the order of magnitude when the value is tiny or huge."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e4:
        return f"{value:.0e}"
    return _three_digits(value)


def percent(value: float | None) -> str:
    """A share in whole percent: 67%."""
    return ABSENT if value is None else f"{100 * value:.0f}%"


def ratio(value: float | None) -> str:
    """A speed-up in three digits: 4.36x."""
    return ABSENT if value is None else f"{_three_digits(value)}x"


def count(value: int | None) -> str:
    """A count with its SI prefix: 1.07 G."""
    return ABSENT if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def memory(value: int | None) -> str:
    """Bytes in binary units: 12.5 MiB."""
    return ABSENT if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def duration(seconds: float | None) -> str:
    """Seconds in the unit that fits: 34.5 ms."""
    return ABSENT if seconds is None else _scaled(seconds * 1e6, 1000, ("us", "ms", "s"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    index = 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / base, index + 1
    return f"{value if isinstance(value, int) else _three_digits(value)} {units[index]}".rstrip()


def _three_digits(value: float) -> str:
    """0.123, 1.23, 12.3, 123."""
    size = abs(value)
    decimals = 3 if size < 0.9995 else 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{decimals}f}"
