"""Between Natural Questions documents and a model, after Alberti et al. 2019 (arXiv 1901.08634): windows of
the question with a part of its page, and what they are trained to say.

The page is its top-level candidates, without HTML tags, each behind a marker of its kind and number
([Paragraph=1], [Table=2], [List=1], [Other=1]), from the beginning of the page. A marker is one token where
the vocabulary has it, else the tokens of its plain text.
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
from pruned_ops.qa.windows import Window, span_tokens, windows
from pruned_trainer.tasks.natural_questions.documents import (
    Document,
    Label,
    NqFormatError,
    Skipped,
    read_documents,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int32Array = NDArray[np.int32]

# By the tag that a candidate begins with, as in the paper's own code; any other tag is "Other".
KINDS = {"<P>": "Paragraph", "<Table>": "Table", "<Ul>": "List", "<Ol>": "List", "<Dl>": "List"}
# Candidates of a kind beyond this one share its number, as there: those far down are alike.
MAX_POSITION = 50
MARKERS = tuple(
    f"[{kind}={number}]"
    for kind in ("Paragraph", "Table", "List", "Other")
    for number in range(1, MAX_POSITION + 1)
)


@dataclass(frozen=True, eq=False)
class Passage:
    """What of a page is read: words between single spaces.

    starts, ends: (words,) places in `text`. token, candidate: (words,) the document token and the candidate
    that a word is of; -1 for a marker.
    """

    text: str
    starts: Int32Array
    ends: Int32Array
    token: Int32Array
    candidate: Int32Array


@dataclass(frozen=True, eq=False)
class NqWindow:
    """A question with as much of its page as the model reads at once; not padded.

    document: its number among those that were cut. input_ids, token_type_ids: (tokens,) int32. first, last:
    (tokens,) int32, the document tokens [first, last) that a token is part of; candidate: which one they are
    of; all three -1 for what is none (question, special tokens, markers).
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
    """The tokenizer itself, which from now on takes those markers that are in its vocabulary as one token."""
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([marker for marker in MARKERS if marker in vocabulary], special_tokens=True)
    return tokenizer


def passage(document: Document) -> Passage:
    """The words of a document's top-level candidates, in the document's order of candidates."""
    words: list[str] = []
    token: list[int] = []
    candidate: list[int] = []
    counts: Counter[str] = Counter()
    for number, one in enumerate(document.candidates):
        if not one.top_level:
            continue
        kind = KINDS.get(document.tokens[one.start], "Other")
        counts[kind] = min(counts[kind] + 1, MAX_POSITION)
        kept = [i for i in range(one.start, one.end) if not document.is_html[i]]
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
    """What of the document is read, and its windows, as `pruned_ops.question_answering.windows` cuts them; at
    least one.

    stride: how many tokens two neighbouring windows share (not the step). ValueError, with the example id,
    for a question that leaves no room.
    """
    page = passage(document)
    try:
        return page, windows(tokenizer, [document.question], [page.text], max_length, stride)
    except ValueError as error:
        raise ValueError(f"example {document.id}: {error}") from None


def located(window: Window, page: Passage, number: int) -> NqWindow:
    """The window with the document's tokens that its own share a character with; number: its `document`."""
    starts, ends = window.offsets.T
    low = np.searchsorted(page.ends, starts, side="right")
    high = np.searchsorted(page.starts, ends, side="left")
    markers = np.concatenate([[0], np.cumsum(page.token < 0)])
    # A token of the space between two words only, or one that runs into a marker, is no word's.
    real = (starts >= 0) & (low < high) & (markers[np.maximum(low, high)] == markers[low])
    first, last, candidate = (np.full(len(window), -1, dtype=np.int32) for _ in range(3))
    first[real], last[real] = page.token[low[real]], page.token[high[real] - 1] + 1
    candidate[real] = page.candidate[low[real]]
    parts = (window.input_ids, window.token_type_ids, first, last, candidate)
    return NqWindow(number, *parts, window.cls_index)


def answer_span(document: Document) -> tuple[AnswerType, int, int, int] | None:
    """(type, candidate, start, end) of what a document is trained to answer: document tokens [start, end).

    As in the paper's code: of the annotators whose long answer is a top-level candidate the first with a
    short answer, else the first. Several short answers are one span, from the first's start to the last's
    end; without one it is the whole long answer. None where no annotator has such a long answer.
    """
    where = {
        (one.start, one.end): number
        for number, one in reversed(list(enumerate(document.candidates)))
        if one.top_level
    }
    found = [
        (where[label.long[:2]], label) for label in document.labels if label.long and label.long[:2] in where
    ]
    if not found:
        return None
    ordered = sorted(found, key=lambda pair: pair[0])
    candidate, label = next((pair for pair in ordered if pair[1].short), ordered[0])
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

    The positions are those of the first and last token of the answer; of the CLS token, with type NULL, where
    the window does not hold all of it. null_rate: the share of such windows that is kept, by a draw that
    depends on seed, example id and the window's number alone.
    """
    answer = answer_span(document)
    span = _characters(page, *answer[1:]) if answer is not None else None
    for number, window in enumerate(cut_windows):
        kind, places = AnswerType.NULL, None
        if answer is not None and span is not None:
            places = span_tokens(window, *span)
            kind = AnswerType.NULL if places is None else answer[0]
        if kind == AnswerType.NULL and random.Random(f"{seed} {document.id} {number}").random() >= null_rate:
            continue
        start, end = places or (window.cls_index, window.cls_index)
        yield {
            "input_ids": window.input_ids,
            "token_type_ids": window.token_type_ids,
            "attention_mask": np.ones_like(window.input_ids),
            "start_positions": start,
            "end_positions": end,
            "answer_types": int(kind),
        }


def _characters(page: Passage, candidate: int, start: int, end: int) -> tuple[int, int] | None:
    """Where in the page's text the words of document tokens [start, end) in this candidate are; None where
    there are none (tags only)."""
    wanted = (page.candidate == candidate) & (page.token >= start) & (page.token < end)
    inside = np.flatnonzero(wanted & (page.starts < page.ends))  # two spaces have a word of no characters
    return (int(page.starts[inside[0]]), int(page.ends[inside[-1]])) if len(inside) else None


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ArrowWindows(Sequence[dict[str, Any]]):
    """Training windows in a temporary folder, which goes when this object does. lengths: tokens of each."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], table: Any, skipped: Skipped) -> None:
        self._folder, self._table, self.skipped = folder, table, skipped
        self.lengths: list[int] = table.with_format("numpy")["length"][:].tolist() if len(table) else []
        self._rows = table.with_format("numpy").remove_columns("length")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        """The window, as `natural_questions_features.features` gave it."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        row = self._rows[int(number) % len(self)]
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

    num_proc: processes, which share a file's lines where there are fewer files; their number changes the
    windows' order, not which they are. skip_bad: bad lines are left out and counted, else they are an
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
    skipped = Skipped(_notes(folder.name, "fault"))
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
    import datasets  # only here: readers and metric do without

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
            fingerprint="windows",  # the folder is new: there is nothing to tell apart
        )
    except datasets.exceptions.DatasetGenerationError:
        # What went wrong in another process comes without its own error.
        for text in _notes(folder, "error"):
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
    """Rows of the table. parts: (file, k, n), every n-th line of a file, from the k-th. What is wrong is
    written to files in `folder`: that is all that processes have in common."""
    skipped = Skipped() if skip_bad else None
    try:
        for path, share, shares in parts:
            for document in read_documents([Path(path)], skipped, (share, shares)):
                if is_held_out(document, held_out, seed):
                    continue
                for one in features(
                    document, *cut_document(document, tokenizer, max_length, stride), null_rate, seed
                ):
                    del one["attention_mask"]  # all ones
                    yield {**one, "length": len(one["input_ids"])}
    except (ValueError, OSError) as error:
        _note(folder, "error", [str(error)])
        raise
    if skipped:
        _note(folder, "fault", skipped.faults)


def _note(folder: str, kind: str, texts: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=f".{kind}", delete=False) as file:
        json.dump(texts, file)


def _notes(folder: str, kind: str) -> list[str]:
    found = sorted(Path(folder).glob(f"*.{kind}"))
    return [text for file in found for text in json.loads(file.read_text())]


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Whether a training document serves as a validation document: a draw that depends on seed and example
    id."""
    return random.Random(f"held out {seed} {document.id}").random() < fraction
