"""A model's logits on all windows of a document, decoded to an answer in the official evaluator's format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.models.heads import AnswerType
from pruned_trainer.tasks.natural_questions.documents import Document
from pruned_trainer.tasks.natural_questions.windows import NqWindow

FloatArray = NDArray[np.floating[Any]]
NqLogits = tuple[FloatArray, FloatArray, FloatArray]  # start, end: (tokens,); answer types: (5,)

# The score of a document without any word, as in the paper's own code: below all others, and valid JSON.
LOWEST = -10000.0
# The longest short answer, in tokens of the model.
MAX_ANSWER_TOKENS = 30
NO_SPAN = {"start_token": -1, "end_token": -1, "start_byte": -1, "end_byte": -1}


@dataclass(frozen=True)
class NqAnswer:
    """A model's answer on a document: its tokens [start, end) in one of its candidates (-1: it has no words).

    score: the span's start and end logits minus those of the CLS token, which say "no answer", in its window.
    yes_no: YES or NO where the window's answer type says so; the span then names the long answer only.
    """

    start: int
    end: int
    candidate: int
    score: float
    yes_no: str


def decode_documents(
    windows: Sequence[NqWindow], logits: Sequence[NqLogits], documents: int
) -> list[NqAnswer]:
    """The best-scoring short span over all windows of each document, numbered 0 to documents - 1.

    A span begins and ends in words of one candidate and has at most MAX_ANSWER_TOKENS of the model's tokens.
    Equal scores go to the earlier window, then the earlier start, then the earlier end. ValueError for logits
    that are not finite or do not fit, and for a document without a window.
    """
    if len(windows) != len(logits):
        raise ValueError(f"{len(windows)} windows, but logits of {len(logits)}")
    best: list[NqAnswer | None] = [None] * documents
    for number, (window, values) in enumerate(zip(windows, logits, strict=True)):
        answer = _best_span(window, _checked(values, number, len(window)))
        best_so_far = best[window.document]
        if best_so_far is None or answer.score > best_so_far.score:
            best[window.document] = answer
    answers = [answer for answer in best if answer is not None]
    if len(answers) < documents:
        without = [number for number, answer in enumerate(best) if answer is None]
        raise ValueError(f"no window of document {', '.join(map(str, without[:5]))} ({len(without)} in all)")
    return answers


def _checked(values: NqLogits, number: int, length: int) -> NqLogits:
    start, end, types = (np.asarray(logits, dtype=np.float64) for logits in values)
    if start.shape != (length,) or end.shape != (length,) or types.shape != (len(AnswerType),):
        shapes = ", ".join(str(logits.shape) for logits in (start, end, types))
        raise ValueError(f"window {number} has {length} tokens, but logits of {shapes}")
    if not all(np.isfinite(logits).all() for logits in (start, end, types)):
        raise ValueError(f"the logits of window {number} are not finite")
    return start, end, types


def _best_span(window: NqWindow, logits: NqLogits) -> NqAnswer:
    start, end, types = logits
    words = np.flatnonzero(window.candidate >= 0)
    if not len(words):
        return NqAnswer(-1, -1, -1, LOWEST, "NONE")
    begin, stop = int(words[0]), int(words[-1]) + 1
    width = min(MAX_ANSWER_TOKENS, stop - begin)
    # Row i, column d is the span from token i to i + d, if both belong to words of the same candidate.
    candidate = np.concatenate([window.candidate[begin:stop], np.full(width - 1, -1, dtype=np.int32)])
    ends = np.concatenate([end[begin:stop], np.full(width - 1, -np.inf)])
    view = np.lib.stride_tricks.sliding_window_view
    rows = candidate[: stop - begin, None]
    possible = (rows >= 0) & (view(candidate, width) == rows)
    scores = np.where(possible, start[begin:stop, None] + view(ends, width), -np.inf)
    first, length = divmod(int(np.argmax(scores)), width)
    at = begin + first
    null = float(start[window.cls_index] + end[window.cls_index])
    kind = AnswerType(int(np.argmax(types)))
    return NqAnswer(
        int(window.first[at]),
        int(window.last[at + length]),
        int(window.candidate[at]),
        float(scores[first, length]) - null,
        kind.name if kind in (AnswerType.YES, AnswerType.NO) else "NONE",
    )


def predictions_json(documents: Iterable[Document], answers: Iterable[NqAnswer]) -> dict[str, Any]:
    """The official prediction file's content: every document's best answer, with its score.

    No threshold is applied: the evaluator, or whoever reads the scores, does that. A document without any
    word has null spans. Byte offsets are the document's, -1 where its file has none.
    """
    return {"predictions": [_prediction(*pair) for pair in zip(documents, answers, strict=True)]}


def _prediction(document: Document, answer: NqAnswer) -> dict[str, Any]:
    long, short = {**NO_SPAN, "candidate_index": -1}, []
    if answer.candidate >= 0:
        candidate = document.candidates[answer.candidate]
        long = {
            **_span_json(document, candidate.start, candidate.end),
            "candidate_index": answer.candidate,
        }
        if answer.yes_no == "NONE":
            short = [_span_json(document, answer.start, answer.end)]
    return {
        "example_id": document.id,
        "long_answer": long,
        "long_answer_score": answer.score,
        "short_answers": short,
        "short_answers_score": answer.score,
        "yes_no_answer": answer.yes_no,
    }


def _span_json(document: Document, start: int, end: int) -> dict[str, int]:
    span = {**NO_SPAN, "start_token": start, "end_token": end}
    if document.byte_offsets is not None:
        span["start_byte"] = int(document.byte_offsets[start, 0])
        span["end_byte"] = int(document.byte_offsets[end - 1, 1])
    return span
