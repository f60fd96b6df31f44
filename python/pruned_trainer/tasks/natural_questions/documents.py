"""Natural Questions: files, read one document at a time and checked, and the official metric.

Two layouts, each a JSON object a line: the original one (`document_tokens` with byte offsets and html_token)
and the simplified one (`document_text`, tokens between single spaces). Nothing here needs `datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruned_trainer.tasks.natural_questions.files import (
    Label,
    NqFormatError,
    get,
    numbered_lines,
    parse_line,
    read_label,
)

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
