"""Answers out of start and end logits: the best spans of a question over all its windows, and their scores.

Every reader of logits decodes here: the trainer's evaluation all questions at once (`decode`), and
`QuestionAnswerer` window by window (`Candidates`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.models.configuration import SCORED, ScoreCalibration
from pruned_ops.qa.windows import Int32Array, Window
from pruned_ops.shape import checked_int

FloatArray = NDArray[np.floating[Any]]
Logits = tuple[FloatArray, FloatArray]  # start and end logits of one window, (tokens,) each
Span = tuple[int, int]  # characters [start, end) of the context
Ranked = list[tuple[float, int, int]]  # score, start, end; best first

# Where the vocabulary has whitespace-only or byte-level tokens, many token spans are one character span. Then
# so many times as many token spans are looked at.
_WIDEN = 4
# When so many times n_best spans are kept of a long document, all but the best n_best are dropped.
_THIN_OUT = 8


@dataclass(frozen=True)
class Answer:
    """A span of the context: `answer == context[start:end]` in Python's characters; "" for no answer.

    score: in `Decoded`, start logit + end logit (of the CLS token for no answer); from a QuestionAnswerer,
    the probability in [0, 1] that this is a right answer.
    """

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Decoded:
    """A model's answers to one question: the best spans, best first, and the score of "no answer"."""

    n_best: tuple[Answer, ...]
    null_score: float

    @property
    def best(self) -> Answer:
        """The best span with the null option off; no answer where the context holds no token."""
        return self.n_best[0] if self.n_best else self.none

    @property
    def none(self) -> Answer:
        """No answer, with its score."""
        return Answer("", self.null_score, 0, 0)

    @property
    def null_margin(self) -> float:
        """Null score - best span's score; infinite where there is no span to choose."""
        return self.null_score - self.n_best[0].score if self.n_best else float("inf")

    def answer(self, null_score_threshold: float) -> Answer:
        """The best span, or no answer where the null score exceeds the span's by more than the threshold."""
        return self.none if self.null_margin > null_score_threshold else self.best

    def ranked(
        self, null_score_threshold: float, calibration: ScoreCalibration, allow_none: bool = True
    ) -> list[Answer]:
        """The best spans and no answer, with probabilities for scores, likeliest first.

        The threshold is taken off the null score, so that the likeliest is the one that `answer` gives.
        Without allow_none there are only spans, with the same probabilities. Where there is no span, no
        answer is certain.
        """
        if not self.n_best:
            return [Answer("", 1.0, 0, 0)]
        scores = [answer.score for answer in self.n_best]
        *spans, null = calibration.probabilities(scores, self.null_score - null_score_threshold)
        ranked = [Answer(a.answer, p, a.start, a.end) for a, p in zip(self.n_best, spans, strict=True)]
        if allow_none:
            # The same comparison as in `answer`, to the last bit.
            better = sum(self.null_score - span.score <= null_score_threshold for span in self.n_best)
            ranked.insert(better, Answer("", null, 0, 0))
        return ranked


class Candidates:
    """The best spans of one question over the windows seen so far, and its null score.

    The memory does not grow with the number of windows: a span that n_best others beat cannot come back,
    because scores only rise. See `decode` for what counts as a span.
    """

    def __init__(self, context: str, n_best: int = SCORED, max_answer_tokens: int = 30) -> None:
        checked_int("n_best", n_best, 1)
        checked_int("max_answer_tokens", max_answer_tokens, 1)
        self._context, self._n_best, self._max_answer_tokens = context, n_best, max_answer_tokens
        self._spans: dict[Span, float] = {}
        self._null_score: float | None = None

    def add(self, window: Window, logits: Logits, name: str) -> None:
        """Take in one more window of the question; ValueError for logits that are not finite or do not fit
        the window, which the message calls by `name`. Answer type logits after the start and end logits are
        not read."""
        start, end = _checked(logits, name, len(window))
        null = float(start[window.cls_index] + end[window.cls_index])
        self._null_score = null if self._null_score is None else min(null, self._null_score)
        spans = self._spans
        best = _best_spans(window, start, end, self._context, self._n_best, self._max_answer_tokens)
        for score, first, last in best:
            spans[first, last] = max(score, spans.get((first, last), score))
        if len(spans) > _THIN_OUT * self._n_best:
            self._spans = {(first, last): score for score, first, last in _ranked(spans)[: self._n_best]}

    def decoded(self) -> Decoded | None:
        """The n_best best spans and the null score; None before the first window."""
        if self._null_score is None:
            return None
        best = _ranked(self._spans)[: self._n_best]
        context = self._context
        answers = (Answer(context[start:end], score, start, end) for score, start, end in best)
        return Decoded(tuple(answers), self._null_score)


def decode(
    windows: Sequence[Window],
    logits: Sequence[Logits],
    contexts: Sequence[str],
    n_best: int = SCORED,
    max_answer_tokens: int = 30,
) -> list[Decoded]:
    """Each question's best spans, and its null score, out of the logits of all its windows.

    logits: a (start, end) pair per window, (tokens,) each. contexts: `Window.question_index` points into it.
    A span begins and ends with a context token, has at most max_answer_tokens of them, and loses whitespace
    at its ends (byte-level tokens can hold some). It has all marks of its last letter, which tokenizers that
    strip accents leave out of their tokens. Its score is start logit + end logit. Spans of the same
    characters count once, with their best score. Equal scores go to the earlier start, then the earlier end.
    The null score is the lowest start + end logit at the CLS token over the windows, as in BERT's own script:
    a question has no answer only if no window has one.

    Raises ValueError for logits that are not finite or do not fit the windows, and for a question without
    a window.
    """
    if len(windows) != len(logits):
        raise ValueError(f"{len(windows)} windows, but logits of {len(logits)}")
    candidates = [Candidates(context, n_best, max_answer_tokens) for context in contexts]
    for number, (window, pair) in enumerate(zip(windows, logits, strict=True)):
        if not 0 <= window.question_index < len(contexts):
            raise ValueError(f"window {number} is of question {window.question_index} of {len(contexts)}")
        candidates[window.question_index].add(window, pair, f"window {number}")
    results = [question.decoded() for question in candidates]
    without = [i for i, decoded in enumerate(results) if decoded is None]
    if without:
        raise ValueError(f"no window of question {', '.join(map(str, without[:5]))} ({len(without)} in all)")
    return [decoded for decoded in results if decoded is not None]


def _checked(pair: Logits, name: str, length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and end logits in fp64, in which the sum of two fp32 numbers is exact, so that ties are ties."""
    start, end = (np.asarray(values, dtype=np.float64) for values in pair[:2])
    if start.shape != (length,) or end.shape != (length,):
        raise ValueError(f"{name} has {length} tokens, but logits of {start.shape} and {end.shape}")
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise ValueError(f"the logits of {name} are not finite")
    return start, end


def _best_spans(
    window: Window,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    context: str,
    n_best: int,
    max_answer_tokens: int,
) -> Ranked:
    """The n_best different spans of one window, best first."""
    first, last = window.context_range
    if first == last:
        return []
    width = min(max_answer_tokens, last - first)
    # Row i, column d: the span from context token i to i + d. Beyond the context the end logit is -inf.
    ends = np.concatenate([end[first:last], np.full(width - 1, -np.inf)])
    scores = start[first:last, None] + np.lib.stride_tricks.sliding_window_view(ends, width)
    flat = scores.ravel()
    count = n_best
    while True:
        everything = count >= flat.size
        # All that tie with the last of them come along, so that position decides which of them stay.
        least = -np.inf if everything else np.partition(flat, flat.size - count)[flat.size - count]
        chosen = np.flatnonzero((flat >= least) & (flat > -np.inf))
        starts, lengths = np.divmod(chosen, width)
        characters = (window.offsets[first + starts, 0], window.offsets[first + starts + lengths, 1])
        ranked = _distinct(flat[chosen], *characters, context)
        if everything or len(ranked) >= n_best:
            return ranked[:n_best]
        count *= _WIDEN


def _distinct(scores: NDArray[np.float64], starts: Int32Array, ends: Int32Array, context: str) -> Ranked:
    """The different spans of characters, without whitespace at their ends and with the marks of their last
    letters, each with its best score."""
    best: dict[Span, float] = {}
    for score, start, end in zip(scores.tolist(), starts.tolist(), ends.tolist(), strict=True):
        text = context[start:end]
        first, last = end - len(text.lstrip()), start + len(text.rstrip())
        if first < last:
            span = (first, after_marks(context, last))
            best[span] = max(score, best.get(span, score))
    return _ranked(best)


def after_marks(context: str, end: int) -> int:
    """The place from `end` on at which no mark is left that belongs to the letter before it."""
    while end < len(context) and is_mark(context[end]):
        end += 1
    return end


def is_mark(character: str) -> bool:
    """Whether this is an accent, a vowel sign or another mark that is written onto the letter before it."""
    return unicodedata.category(character).startswith("M")


def _ranked(spans: dict[Span, float]) -> Ranked:
    """The spans by falling score; equal scores by their places."""
    return sorted(((score, *span) for span, score in spans.items()), key=lambda s: (-s[0], *s[1:]))
