"""Natural Questions files, read one document at a time and checked.

There are two layouts, each with one JSON object per line: the original one (`document_tokens`, with byte
offsets and html_token) and the simplified one (`document_text`, tokens between single spaces). Nothing here
needs the `datasets` library.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from pruned_ops.files import parse_json, shown
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping

SUFFIXES = (".jsonl", ".jsonl.gz")
YES_NO = ("YES", "NO", "NONE")

_GZIP = b"\x1f\x8b"
# The simplified layout has no html_token: a tag is recognised by its form, e.g. </P> or <Th_colspan="2">.
_TAG = re.compile(r'</?[A-Z][A-Za-z0-9]*(_[A-Za-z]+="[^"]*")*>')

Span = tuple[int, int, int, int]  # start_token, end_token, start_byte, end_byte; -1 where unknown


NqFormatError = FormatError


@dataclass(frozen=True)
class Label:
    """The answers that an annotator or a model gives.

    long: None for no long answer. short: without null spans. yes_no: one of YES_NO.
    """

    long: Span | None
    short: tuple[Span, ...]
    yes_no: str

    @property
    def has_short(self) -> bool:
        return bool(self.short) or self.yes_no != "NONE"


@dataclass(frozen=True)
class Candidate:
    """A part of the page that may be chosen as the long answer: the document's tokens [start, end)."""

    start: int
    end: int
    top_level: bool


@dataclass(frozen=True, eq=False)
class Document:
    """A question and its page. candidates and labels (one for each annotator) point into `tokens`.

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
        """The document without its tokens, which decoding and scoring do not need."""
        return replace(self, tokens=(), is_html=np.zeros(0, dtype=bool))


def nq_files(source: str | Path) -> list[Path]:
    """The file itself, or a folder's .jsonl and .jsonl.gz files by name; FileNotFoundError for none."""
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES)} file")
    return files


def read_documents(
    files: Sequence[Path], skipped: Skipped | None = None, part: tuple[int, int] = (0, 1)
) -> Iterator[Document]:
    """The documents of these files, one at a time: a file is never in memory as a whole.

    skipped: collects the faults of bad lines, which are left out; without it a bad line is an NqFormatError
    with file, line and example id. part: (k, n) reads every n-th line, from the k-th, so that n readers share
    a file; other lines are not parsed.
    """
    seen: set[int] = set()
    for path in files:
        with skipping(skipped):  # where the rest of the file cannot be read
            for number, line in numbered_lines(path):
                if (number - 1) % part[1] != part[0]:
                    continue
                with skipping(skipped):
                    where = f"{path}, line {number}"
                    yield _checked_new(parse_document(line, where), where, seen)


def _checked_new(document: Document, where: str, seen: set[int]) -> Document:
    """The document, whose id goes to `seen`; NqFormatError for an id that is there already."""
    if document.id in seen:
        raise NqFormatError(f"{where}, example {document.id}: this id appears twice")
    seen.add(document.id)
    return document


def parse_document(line: bytes, where: str = "line") -> Document:
    """The document on a line; NqFormatError, with `where` and the example id, for a line that holds none."""
    entry = parse_line(line, where)
    key = get_field(entry, "example_id", int, where)
    where = f"{where}, example {key}"
    tokens, is_html, byte_offsets = _tokens(entry, where)
    candidates = tuple(
        _candidate(candidate, len(tokens), f"{where}, candidate {number}")
        for number, candidate in enumerate(get_field(entry, "long_answer_candidates", list, where))
    )
    labels = tuple(
        _label(annotation, len(tokens), candidates, f"{where}, annotation {number}")
        for number, annotation in enumerate(get_field(entry, "annotations", list, where, []))
    )
    question, title = (
        get_field(entry, "question_text", str, where),
        get_field(entry, "document_title", str, where, ""),
    )
    return Document(key, question, title, tokens, is_html, byte_offsets, candidates, labels)


def _tokens(
    entry: dict[str, Any], where: str
) -> tuple[tuple[str, ...], NDArray[np.bool_], NDArray[np.int32] | None]:
    """A document's tokens, is_html and byte_offsets, from either layout."""
    if "document_tokens" not in entry:
        if "document_text" not in entry:
            raise NqFormatError(f"{where}: neither 'document_tokens' nor 'document_text'")
        text = get_field(entry, "document_text", str, where)
        words = tuple(text.split(" ")) if text else ()
        return words, np.array([_TAG.fullmatch(word) is not None for word in words], dtype=bool), None
    rows = []
    for number, token in enumerate(get_field(entry, "document_tokens", list, where)):
        place = f"{where}, token {number}"
        start, end = (get_field(token, name, int, place) for name in ("start_byte", "end_byte"))
        if not 0 <= start <= end < 1 << 31:
            raise NqFormatError(f"{place}: start_byte {start} and end_byte {end} are no span")
        text, is_html = get_field(token, "token", str, place), get_field(token, "html_token", bool, place)
        rows.append((text, is_html, start, end))
    texts, tags, *places = zip(*rows, strict=True) if rows else ((), (), (), ())
    offsets = np.array(places, dtype=np.int32).reshape(2, -1).T
    return tuple(texts), np.array(tags, dtype=bool), offsets


def _candidate(entry: object, tokens: int, where: str) -> Candidate:
    start, end = (get_field(entry, name, int, where) for name in ("start_token", "end_token"))
    _check_inside(start, end, tokens, where)
    return Candidate(start, end, get_field(entry, "top_level", bool, where))


def _check_inside(start: int, end: int, tokens: int, where: str) -> None:
    if not 0 <= start < end <= tokens:
        raise NqFormatError(f"{where}: tokens {start} to {end} are no part of a document of {tokens} tokens")


def _label(entry: object, tokens: int, candidates: Sequence[Candidate], where: str) -> Label:
    """`read_label`, with its places in the document checked."""
    label = read_label(entry, where)
    for span in label.short:
        _check_inside(span[0], span[1], tokens, f"{where}, short answer")
    if label.long is None:
        return label
    start, end = label.long[:2]
    _check_inside(start, end, tokens, f"{where}, long answer")
    long_answer = get_field(entry, "long_answer", dict, where)
    index = get_field(long_answer, "candidate_index", int, where, -1)
    if index >= len(candidates):
        raise NqFormatError(f"{where}: candidate_index {index}, but there are {len(candidates)} candidates")
    named_candidates = candidates if index < 0 else candidates[index : index + 1]
    if (start, end) not in [(candidate.start, candidate.end) for candidate in named_candidates]:
        name = f"candidate {index}" if index >= 0 else "any candidate"
        raise NqFormatError(f"{where}: the long answer, tokens {start} to {end}, is not {name}")
    return label


def read_label(entry: object, where: str) -> Label:
    """The label of an annotation's or a prediction's object; its places in the document are not checked."""
    long = _span(get_field(entry, "long_answer", dict, where, {}), f"{where}, long_answer")
    spans = get_field(entry, "short_answers", list, where, [])
    short = [_span(span, f"{where}, short_answers") for span in spans]
    yes_no = get_field(entry, "yes_no_answer", str, where, "NONE").upper()
    if yes_no not in YES_NO:
        raise NqFormatError(
            f"{where}: yes_no_answer is {shown(yes_no)}; one of {', '.join(YES_NO)} is needed"
        )
    return Label(long, tuple(span for span in short if span is not None), yes_no)


def _span(entry: object, where: str) -> Span | None:
    """A span's four numbers; None for a null span, all of whose places are -1."""
    names = ("start_token", "end_token", "start_byte", "end_byte")
    start, end, start_byte, end_byte = (get_field(entry, name, int, where, -1) for name in names)
    for kind, low, high in (("token", start, end), ("byte", start_byte, end_byte)):
        if (low < 0) != (high < 0) or (low >= 0 and low >= high):
            raise NqFormatError(f"{where}: start_{kind} {low} and end_{kind} {high} are no span")
    return None if start < 0 and start_byte < 0 else (start, end, start_byte, end_byte)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, from 1, one at a time; the file may be gzip.

    FileNotFoundError where there is no file, NqFormatError for a gzip file that breaks off.
    """
    number = 0
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise NqFormatError(f"{path}: the gzip data is broken after line {number}: {error}") from None


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    return cast(IO[bytes], gzip.open(path, "rb")) if is_gzip else path.open("rb")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line; NqFormatError, with `where`, for anything else."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise NqFormatError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise NqFormatError(f"{where}: an object is needed, not {type(entry).__name__}")
    return entry


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line; `where` names file and line for errors."""
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        yield where, parse_line(line, where)
