"""Natural Questions documents as windows, each the question with a part of its page, and their labels.

The method is that of Alberti et al. 2019 (arXiv 1901.08634). The part of a page that is read is its top-level
candidates, without HTML tags, each behind a marker of its kind and number ([Paragraph=1], [Table=2],
[List=1], [Other=1]), counted from the beginning of the page. A marker is one token where the vocabulary has
it, else the tokens of its plain text. Windows to train on are made by several processes and kept on disk as
Arrow.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.models.heads import AnswerType
from pruned_ops.qa.windows import RefusedQuestion, Window, span_tokens, windows
from pruned_trainer.tasks.faults import Skipped, skipping
from pruned_trainer.tasks.natural_questions.documents import (
    Document,
    Label,
    NqFormatError,
    read_documents,
)
from pruned_trainer.tasks.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int32Array = NDArray[np.int32]

# A candidate's kind, by the tag that it begins with, as in the paper's own code; any other tag is "Other".
KINDS = {"<P>": "Paragraph", "<Table>": "Table", "<Ul>": "List", "<Ol>": "List", "<Dl>": "List"}
# Candidates of a kind beyond this number share it, as in the paper's code: those far down are alike.
MAX_POSITION = 50
MARKERS = tuple(
    f"[{kind}={number}]"
    for kind in ("Paragraph", "Table", "List", "Other")
    for number in range(1, MAX_POSITION + 1)
)


@dataclass(frozen=True, eq=False)
class Passage:
    """The part of a page that is read, as words between single spaces.

    starts, ends: (words,), a word's characters in `text`. token, candidate: (words,), the document token and
    the candidate that a word comes from; -1 for a marker.
    """

    text: str
    starts: Int32Array
    ends: Int32Array
    token: Int32Array
    candidate: Int32Array


@dataclass(frozen=True, eq=False)
class NqWindow:
    """A question with as much of its page as the model reads at once; not padded.

    document: the document's number among those that were cut. input_ids, token_type_ids: (tokens,) int32.
    first, last: (tokens,) int32, the document tokens [first, last) that a token is part of. candidate:
    (tokens,) int32, the candidate that these belong to. All three are -1 for tokens of the question, special
    tokens and markers.
    """

    document: int
    input_ids: Int32Array
    token_type_ids: Int32Array
    first: Int32Array
    last: Int32Array
    candidate: Int32Array
    cls_index: int

    def __len__(self) -> int:
        return len(self.input_ids)


def with_markers(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer itself, which from now on reads each marker of its vocabulary as one token."""
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([marker for marker in MARKERS if marker in vocabulary], special_tokens=True)
    return tokenizer


def passage(document: Document) -> Passage:
    """The words of a document's top-level candidates, in the document's order, behind their markers."""
    words: list[str] = []
    token: list[int] = []
    candidate: list[int] = []
    counts: Counter[str] = Counter()
    for number, part in enumerate(document.candidates):
        if not part.top_level:
            continue
        kind = KINDS.get(document.tokens[part.start], "Other")
        counts[kind] = min(counts[kind] + 1, MAX_POSITION)
        kept = [i for i in range(part.start, part.end) if not document.is_html[i]]
        words += [f"[{kind}={counts[kind]}]", *(document.tokens[i] for i in kept)]
        token += [-1, *kept]
        candidate += [-1, *[number] * len(kept)]
    lengths = np.array([len(word) for word in words], dtype=np.int32)
    ends = (np.cumsum(lengths + 1) - 1).astype(np.int32)
    places = (np.array(values, dtype=np.int32) for values in (token, candidate))
    return Passage(" ".join(words), ends - lengths, ends, *places)


def cut_document(
    document: Document, tokenizer: PreTrainedTokenizerFast, max_length: int = 384, stride: int = 128
) -> tuple[Passage, list[Window]]:
    """The document's passage and its windows (at least one), as `pruned_ops.qa.windows.windows` cuts them.

    stride: the number of tokens that two neighbouring windows share (not the step). NqFormatError, with the
    example id, for a question that leaves no room.
    """
    page = passage(document)
    try:
        return page, windows(tokenizer, [document.question], [page.text], max_length, stride)
    except RefusedQuestion as error:
        raise NqFormatError(f"example {document.id}: {error}") from None
    except ValueError as error:
        raise ValueError(f"example {document.id}: {error}") from None


def located(window: Window, page: Passage, number: int) -> NqWindow:
    """The window with the document tokens that each of its tokens shares a character with.

    number: the document's number, `NqWindow.document`.
    """
    starts, ends = window.offsets.T
    low = np.searchsorted(page.ends, starts, side="right")
    high = np.searchsorted(page.starts, ends, side="left")
    markers = np.concatenate([[0], np.cumsum(page.token < 0)])
    # A token that holds only the space between two words, or that reaches into a marker, belongs to no word.
    real = (starts >= 0) & (low < high) & (markers[np.maximum(low, high)] == markers[low])
    first, last, candidate = (np.full(len(window), -1, dtype=np.int32) for _ in range(3))
    first[real], last[real] = page.token[low[real]], page.token[high[real] - 1] + 1
    candidate[real] = page.candidate[low[real]]
    return NqWindow(number, window.input_ids, window.token_type_ids, first, last, candidate, window.cls_index)


def answer_span(document: Document) -> tuple[AnswerType, int, int, int] | None:
    """(type, candidate, start, end) of the answer that a document teaches: document tokens [start, end).

    The choice is that of the paper's code. It looks at annotators whose long answer is a top-level candidate,
    in the order of their candidates, and takes the first with a short answer, else the first. Several short
    answers are one span, from the first's start to the last's end; without one the span is the whole long
    answer. None where no annotator has such a long answer.
    """
    candidate_at = {
        (candidate.start, candidate.end): number
        for number, candidate in reversed(list(enumerate(document.candidates)))
        if candidate.top_level
    }
    answers = [
        (candidate_at[label.long[:2]], label)
        for label in document.labels
        if label.long and label.long[:2] in candidate_at
    ]
    if not answers:
        return None
    answers.sort(key=lambda answer: answer[0])
    candidate, label = next((answer for answer in answers if answer[1].short), answers[0])
    if label.short:
        start, end = min(span[0] for span in label.short), max(span[1] for span in label.short)
        return AnswerType.SHORT, candidate, start, end
    assert label.long is not None
    return _long_type(label), candidate, *label.long[:2]


def _long_type(label: Label) -> AnswerType:
    return {"YES": AnswerType.YES, "NO": AnswerType.NO}.get(label.yes_no, AnswerType.LONG)


def features(
    document: Document, page: Passage, cut_windows: Sequence[Window], null_rate: float = 1.0, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """The windows to train on: ids without padding, start_positions, end_positions, answer_types.

    The positions are those of the first and last token of the answer, or of the CLS token, with type NULL,
    where the window does not hold all of the answer. null_rate: the share of such windows that is kept, by a
    draw that depends on nothing but seed, example id and the window's number.
    """
    answer = answer_span(document)
    span = _characters(page, *answer[1:]) if answer is not None else None
    for number, window in enumerate(cut_windows):
        kind, tokens = AnswerType.NULL, None
        if answer is not None and span is not None:
            tokens = span_tokens(window, *span)
            kind = AnswerType.NULL if tokens is None else answer[0]
        if kind == AnswerType.NULL and random.Random(f"{seed} {document.id} {number}").random() >= null_rate:
            continue
        start, end = tokens or (window.cls_index, window.cls_index)
        yield {
            "input_ids": window.input_ids,
            "token_type_ids": window.token_type_ids,
            "attention_mask": np.ones_like(window.input_ids),
            "start_positions": start,
            "end_positions": end,
            "answer_types": int(kind),
        }


def _characters(page: Passage, candidate: int, start: int, end: int) -> tuple[int, int] | None:
    """The characters in the passage of document tokens [start, end) of a candidate; None for tags only."""
    inside = (page.candidate == candidate) & (page.token >= start) & (page.token < end)
    words = np.flatnonzero(inside & (page.starts < page.ends))  # between two spaces lies an empty word
    return (int(page.starts[words[0]]), int(page.ends[words[-1]])) if len(words) else None


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Whether a training document serves for validation: a draw that depends on seed and example id alone."""
    return random.Random(f"held out {seed} {document.id}").random() < fraction


class ArrowWindows(Windows):
    """Training windows in a temporary folder, which is removed with this object.

    lengths: of each window, in tokens. skipped: the bad lines that were left out.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str], table: Any, skipped: Skipped) -> None:
        self._folder, self._table, self.skipped = folder, table, skipped
        self.lengths: list[int] = table.with_format("numpy")["length"][:].tolist() if len(table) else []
        self._rows = table.with_format("numpy").remove_columns("length")

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, position: int) -> dict[str, Any]:
        """The window, as `features` gave it."""
        row = self._rows[position]
        scalars = {name: int(row[name]) for name in ("start_positions", "end_positions", "answer_types")}
        ids = {name: np.asarray(row[name], np.int32) for name in ("input_ids", "token_type_ids")}
        return {**ids, "attention_mask": np.ones_like(ids["input_ids"]), **scalars}


def training_windows(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    null_rate: float = 1.0,
    seed: int = 0,
    num_proc: int = 1,
    skip_bad: bool = False,
    held_out: float = 0.0,
) -> ArrowWindows:
    """Read, tokenise and cut the documents of these files, and keep the windows on disk (under TMPDIR).

    num_proc: the number of processes, which share a file's lines where there are fewer files; it changes the
    windows' order, not which they are. skip_bad: leave out bad lines and count them, where else they are an
    NqFormatError; an id that comes twice is a fault only where one process meets it twice in a file.
    held_out: the share of documents that `is_held_out` takes away.
    """
    folder = tempfile.TemporaryDirectory(prefix="natural-questions-", ignore_cleanup_errors=True)
    make = partial(
        _windows, tokenizer=tokenizer, max_length=max_length, stride=stride, null_rate=null_rate, seed=seed,
        held_out=held_out, skip_bad=skip_bad, folder=folder.name,
    )  # fmt: skip
    shares = -(-num_proc // len(files))
    parts = [(str(path), k, shares) for path in files for k in range(shares)]
    try:
        table = _table(make, parts, num_proc, folder.name)
    except BaseException:
        folder.cleanup()
        raise
    skipped = Skipped(_read_notes(folder.name, "fault"))
    if not len(table):
        raise NqFormatError(f"{files[0]}: no windows to train on ({len(skipped)} lines were skipped)")
    return ArrowWindows(folder, table, skipped)


def _table(
    make: Callable[..., Iterator[dict[str, Any]]],
    parts: list[tuple[str, int, int]],
    num_proc: int,
    folder: str,
) -> Any:
    """The datasets.Dataset of `make`'s rows, in `folder`."""
    import datasets  # imported here, because readers and metric do without it

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {
        "input_ids": ids, "token_type_ids": ids, "start_positions": number, "end_positions": number,
        "answer_types": number, "length": number,
    }  # fmt: skip
    try:
        return datasets.Dataset.from_generator(
            make,
            features=datasets.Features(columns),
            gen_kwargs={"parts": parts},
            num_proc=num_proc if num_proc > 1 else None,
            cache_dir=folder,
            fingerprint="windows",  # any name will do, because the folder is new
        )
    except datasets.exceptions.DatasetGenerationError:
        # The error of another process does not come through; its text is in a note.
        for text in _read_notes(folder, "error"):
            raise NqFormatError(text) from None
        raise


def _windows(
    parts: Sequence[tuple[str, int, int]],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
    null_rate: float,
    seed: int,
    held_out: float,
    skip_bad: bool,
    folder: str,
) -> Iterator[dict[str, Any]]:
    """Rows of the table. parts: (file, k, n), every n-th line of a file, from the k-th.

    Faults and errors go into notes in `folder`, which is all that the processes have in common.
    """
    skipped = Skipped() if skip_bad else None
    try:
        for path, share, shares in parts:
            for document in read_documents([Path(path)], skipped, (share, shares)):
                if is_held_out(document, held_out, seed):
                    continue
                with skipping(skipped):
                    page, cut_windows = cut_document(document, tokenizer, max_length, stride)
                    for feature in features(document, page, cut_windows, null_rate, seed):
                        del feature["attention_mask"]  # all ones
                        yield {**feature, "length": len(feature["input_ids"])}
    except (ValueError, OSError) as error:
        _write_note(folder, "error", [str(error)])
        raise
    if skipped:
        _write_note(folder, "fault", skipped.faults)


def _write_note(folder: str, kind: str, texts: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=f".{kind}", delete=False) as file:
        json.dump(texts, file)


def _read_notes(folder: str, kind: str) -> list[str]:
    notes = sorted(Path(folder).glob(f"*.{kind}"))
    return [text for note in notes for text in json.loads(note.read_text())]
