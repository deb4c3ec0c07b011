"""Numbers for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """How many there are of something: "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def rounded(number: float, digits: int) -> str:
    """A number to so many significant digits, and never in powers of ten where it is above one: "11450", "1.5"."""
    short = f"{number:.{digits}g}"
    return f"{number:.0f}" if "e+" in short else short


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent, without the sign: "12.5"."""
    return f"{100 * share:.{digits}f}"
