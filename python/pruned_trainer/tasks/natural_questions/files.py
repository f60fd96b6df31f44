"""Natural Questions files line by line, gzip or not, the labels on them, and where on them a fault is."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

_GZIP = b"\x1f\x8b"
YES_NO = ("YES", "NO", "NONE")

Span = tuple[int, int, int, int]  # start_token, end_token, start_byte, end_byte; -1 where unknown


class NqFormatError(ValueError):
    """A file that is not Natural Questions; the message names file, line and example."""


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, from 1, one at a time. FileNotFoundError where there is no file;
    NqFormatError for a gzip file that breaks off: what comes after cannot be had."""
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise NqFormatError(f"{path}: the gzip data is broken after line {number}: {error}") from None


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else path.open("rb")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line; NqFormatError, with `where`, for anything else."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = error if line.strip() else "it is empty"
        raise NqFormatError(f"{where}: not JSON: {reason}") from None
    if not isinstance(entry, dict):
        raise NqFormatError(f"{where}: an object is needed, not {type(entry).__name__}")
    return entry


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line."""
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        yield where, parse_line(line, where)


def get(holder: Any, key: str, kind: type, where: str, default: Any = None) -> Any:
    """holder[key], which is of this kind (True is no int); `default`, if there is one, where it is absent;
    else NqFormatError, with `where`."""
    if not isinstance(holder, dict):
        raise NqFormatError(f"{where}: an object is needed, not {type(holder).__name__}")
    if key not in holder:
        if default is not None:
            return default
        raise NqFormatError(f"{where}: no {key!r}")
    value = holder[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise NqFormatError(f"{where}: {key!r} has type {type(value).__name__}, not {kind.__name__}")
    return value


@dataclass(frozen=True)
class Label:
    """An annotation or a prediction. long: None where there is none. short: without null spans. yes_no: one
    of YES_NO."""

    long: Span | None
    short: tuple[Span, ...]
    yes_no: str

    @property
    def has_short(self) -> bool:
        return bool(self.short) or self.yes_no != "NONE"


def read_label(entry: Any, where: str) -> Label:
    """What an annotation or a prediction says; its places in the document are not looked at."""
    long = _span(get(entry, "long_answer", dict, where, {}), f"{where}, long_answer")
    short = [_span(one, f"{where}, short_answers") for one in get(entry, "short_answers", list, where, [])]
    yes_no = get(entry, "yes_no_answer", str, where, "NONE").upper()
    if yes_no not in YES_NO:
        raise NqFormatError(f"{where}: yes_no_answer is {yes_no!r}; one of {', '.join(YES_NO)} is needed")
    return Label(long, tuple(span for span in short if span is not None), yes_no)


def _span(entry: Any, where: str) -> Span | None:
    """None for a null span, all of whose places are -1."""
    start, end, first, last = (
        get(entry, name, int, where, -1) for name in ("start_token", "end_token", "start_byte", "end_byte")
    )
    for kind, low, high in (("token", start, end), ("byte", first, last)):
        if (low < 0) != (high < 0) or (low >= 0 and low >= high):
            raise NqFormatError(f"{where}: start_{kind} {low} and end_{kind} {high} are no span")
    return None if start < 0 and first < 0 else (start, end, first, last)
