"""Numbers on the scripts' command lines: one that would be taken for "no limit", for all of the data or for
no round is refused by argparse, in a sentence. Only the standard library is imported here, because
first_contact.py imports nothing else."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def above(bound: float) -> Callable[[str], float]:
    """The type of an option that is a finite number above `bound`."""
    return lambda text: _checked(text, _number(text), bound < _number(text), f"a number above {bound:g}")


def no_less_than(least: float) -> Callable[[str], float]:
    """The type of an option that is a finite number, and no smaller than `least`."""
    return lambda text: _checked(text, _number(text), least <= _number(text), f"a number from {least:g} on")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, and no smaller than `least`."""

    def parsed(text: str) -> int:
        number = _number(text)
        is_whole = text.strip().lstrip("+-").isdecimal()
        return int(_checked(text, number, is_whole and number >= least, f"a whole number from {least} on"))

    return parsed


def _number(text: str) -> float:
    """The number that a text is, and NaN where it is none, or no finite one."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _checked(text: str, number: float, is_right: bool, needed: str) -> float:
    """The number, where it is right; else argparse tells what is needed."""
    if not is_right:
        raise argparse.ArgumentTypeError(f"{text!r} is given, and {needed} is needed")
    return number
