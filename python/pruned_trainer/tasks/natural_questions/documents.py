"""Natural Questions: files, read one document at a time and checked, and the official metric.

Two layouts, each a JSON object a line: the original one (`document_tokens` with byte offsets and html_token)
and the simplified one (`document_text`, tokens between single spaces). Nothing here needs `datasets`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

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


SUFFIXES = (".jsonl", ".jsonl.gz")
# The simplified layout has no html_token: tags are told by their form, e.g. </P> or <Th_colspan="2">.
_TAG = re.compile(r'</?[A-Z][A-Za-z0-9]*(_[A-Za-z]+="[^"]*")*>')


@dataclass(frozen=True)
class Candidate:
    """A long answer that can be chosen: the document's tokens [start, end)."""

    start: int
    end: int
    top_level: bool


@dataclass(frozen=True, eq=False)
class Document:
    """A question and its page. candidates and labels (an annotator each) point into `tokens`.

    is_html: (tokens,) bool. byte_offsets: (tokens, 2) int32, [start, end) in the page's HTML; None where the
    file does not have them (the simplified layout).
    """

    id: int
    question: str
    title: str
    tokens: tuple[str, ...]
    is_html: NDArray[np.bool_]
    byte_offsets: NDArray[np.int32] | None
    candidates: tuple[Candidate, ...]
    labels: tuple[Label, ...]

    def without_text(self) -> Document:
        """What decoding and scoring need: all but the tokens."""
        return replace(self, tokens=(), is_html=np.zeros(0, dtype=bool))


@dataclass
class Skipped:
    """Lines that were left out, with their faults."""

    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.faults)


def nq_files(source: str | Path) -> list[Path]:
    """The file itself, or the .jsonl and .jsonl.gz files of a folder, by name. FileNotFoundError where there
    is none."""
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not found:
        raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES)} file")
    return found


def read_documents(
    files: Sequence[Path], skipped: Skipped | None = None, part: tuple[int, int] = (0, 1)
) -> Iterator[Document]:
    """The documents of these files, one at a time: a file is never in memory as a whole.

    skipped: takes up the faults of bad lines, which are left out; without it a bad line is an NqFormatError
    with file, line and example id. part: (k, n) gives every n-th line, from the k-th (other lines are not
    parsed), so that n readers share a file.
    """
    seen: set[int] = set()
    for path in files:
        try:
            for number, line in numbered_lines(path):
                if (number - 1) % part[1] != part[0]:
                    continue
                try:
                    yield _unseen(parse_document(line, f"{path}, line {number}"), path, number, seen)
                except NqFormatError as error:
                    if skipped is None:
                        raise
                    skipped.faults.append(str(error))
        except NqFormatError as error:  # one that the rest of the file does not survive
            if skipped is None:
                raise
            skipped.faults.append(str(error))


def _unseen(document: Document, path: Path, number: int, seen: set[int]) -> Document:
    if document.id in seen:
        raise NqFormatError(f"{path}, line {number}, example {document.id}: this id appears twice")
    seen.add(document.id)
    return document


def parse_document(line: bytes, where: str = "line") -> Document:
    """The document on a line; NqFormatError, with `where` and the example id, for anything else."""
    entry = parse_line(line, where)
    key = get(entry, "example_id", int, where)
    where = f"{where}, example {key}"
    tokens, is_html, byte_offsets = _tokens(entry, where)
    candidates = tuple(
        _candidate(one, len(tokens), f"{where}, candidate {number}")
        for number, one in enumerate(get(entry, "long_answer_candidates", list, where))
    )
    labels = tuple(
        _label(one, len(tokens), candidates, f"{where}, annotation {number}")
        for number, one in enumerate(get(entry, "annotations", list, where, []))
    )
    question, title = get(entry, "question_text", str, where), get(entry, "document_title", str, where, "")
    return Document(key, question, title, tokens, is_html, byte_offsets, candidates, labels)


def _tokens(
    entry: dict[str, Any], where: str
) -> tuple[tuple[str, ...], NDArray[np.bool_], NDArray[np.int32] | None]:
    if "document_tokens" not in entry:
        if "document_text" not in entry:
            raise NqFormatError(f"{where}: neither 'document_tokens' nor 'document_text'")
        text = get(entry, "document_text", str, where)
        words = tuple(text.split(" ")) if text else ()
        return words, np.array([_TAG.fullmatch(word) is not None for word in words], dtype=bool), None
    listed = get(entry, "document_tokens", list, where)
    rows = []
    for number, one in enumerate(listed):
        place = f"{where}, token {number}"
        start, end = (get(one, name, int, place) for name in ("start_byte", "end_byte"))
        if not 0 <= start <= end < 1 << 31:
            raise NqFormatError(f"{place}: start_byte {start} and end_byte {end} are no span")
        rows.append((get(one, "token", str, place), get(one, "html_token", bool, place), start, end))
    words, html, *places = zip(*rows, strict=True) if rows else ((), (), (), ())
    offsets = np.array(places, dtype=np.int32).reshape(2, -1).T
    return tuple(words), np.array(html, dtype=bool), offsets


def _candidate(entry: Any, tokens: int, where: str) -> Candidate:
    start, end = (get(entry, name, int, where) for name in ("start_token", "end_token"))
    _check_inside(start, end, tokens, where)
    return Candidate(start, end, get(entry, "top_level", bool, where))


def _check_inside(start: int, end: int, tokens: int, where: str) -> None:
    if not 0 <= start < end <= tokens:
        raise NqFormatError(f"{where}: tokens {start} to {end} are no part of a document of {tokens} tokens")


def _label(entry: Any, tokens: int, candidates: Sequence[Candidate], where: str) -> Label:
    label = read_label(entry, where)
    for span in label.short:
        _check_inside(span[0], span[1], tokens, f"{where}, short answer")
    if label.long is None:
        return label
    start, end = label.long[:2]
    _check_inside(start, end, tokens, f"{where}, long answer")
    index = get(entry["long_answer"], "candidate_index", int, where, -1)
    if index >= len(candidates):
        raise NqFormatError(f"{where}: candidate_index {index}, but there are {len(candidates)} candidates")
    spans = [(one.start, one.end) for one in (candidates if index < 0 else candidates[index : index + 1])]
    if (start, end) not in spans:
        named = f"candidate {index}" if index >= 0 else "any candidate"
        raise NqFormatError(f"{where}: the long answer, tokens {start} to {end}, is not {named}")
    return label
