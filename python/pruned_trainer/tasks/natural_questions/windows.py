"""Between Natural Questions documents and a model, after Alberti et al. 2019 (arXiv 1901.08634): windows of
the question with a part of its page, and what they are trained to say.

The page is its top-level candidates, without HTML tags, each behind a marker of its kind and number
([Paragraph=1], [Table=2], [List=1], [Other=1]), from the beginning of the page. A marker is one token where
the vocabulary has it, else the tokens of its plain text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.models.natural_questions import AnswerType
from pruned_ops.qa.windows import Window, span_tokens, windows
from pruned_trainer.tasks.natural_questions.documents import Document
from pruned_trainer.tasks.natural_questions.files import Label

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


def cut(
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
