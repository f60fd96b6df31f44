"""Extractive question answering around a model: windows over long contexts, and spans out of its logits.

The model itself stays outside: `windows` makes its inputs, `decode` reads its start and end logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.floating[Any]]
Logits = tuple[FloatArray, FloatArray]  # start and end logits of one window, (tokens,) each
Span = tuple[int, int]  # characters [start, end) of the context
Ranked = list[tuple[float, int, int]]  # score, start, end; best first

# Of a whitespace-only or byte-level vocabulary many token spans are one character span: look further then.
_WIDEN = 4


@dataclass(frozen=True, eq=False)
class Window:
    """A question with as much of its context as the model reads at once; not padded.

    input_ids, token_type_ids: (tokens,) int32.
    offsets: (tokens, 2) int32, the characters [start, end) of the context that a token covers, (-1, -1) for
    a token that is not context. The context's tokens are consecutive.
    cls_index: position of the CLS token, whose logits say "no answer".
    """

    question_index: int
    input_ids: Int32Array
    token_type_ids: Int32Array
    offsets: Int32Array
    cls_index: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def context_range(self) -> tuple[int, int]:
        """Positions [first, last) of the context's tokens; (0, 0) where there are none."""
        context = np.flatnonzero(self.offsets[:, 0] >= 0)
        return (int(context[0]), int(context[-1]) + 1) if len(context) else (0, 0)


@dataclass(frozen=True)
class Answer:
    """A span of the context: `answer == context[start:end]` in Python's characters; "" for no answer.

    score: start logit + end logit, of the CLS token for no answer.
    """

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Decoded:
    """What a model says on one question: its best spans, best first, and the score of "no answer"."""

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


def windows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int = 384,
    stride: int = 128,
    batch_size: int = 256,
    progress: bool = False,
) -> list[Window]:
    """Cut each (question, context) into windows of at most max_length tokens, in the order of the questions.

    stride: how many tokens two neighbouring windows share, as in Hugging Face (not the step). Every context
    token is in at least one window; a context without tokens gives one window. Special tokens, token types
    and the question's place come from the tokenizer: the question is first where padding is on the right,
    else the context is, which is Hugging Face's convention. Truncation and padding stored in tokenizer.json
    do not apply and, as after any call of a tokenizer, are no longer set afterwards.

    Raises ValueError for a question that leaves no room for its context, with its index and the numbers, and
    TypeError for a tokenizer that does not know offsets.
    """
    if isinstance(questions, str) or isinstance(contexts, str):
        raise TypeError("questions and contexts are sequences of strings; pass [question] and [context]")
    if len(questions) != len(contexts):
        raise ValueError(f"{len(questions)} questions, but {len(contexts)} contexts: one context a question")
    if not 0 <= stride < max_length:
        raise ValueError(f"stride {stride} must be at least 0 and less than max_length {max_length}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is needed")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed")
    found: list[Window] = []
    for first in _batches(len(questions), batch_size, progress):
        batch = slice(first, first + batch_size)
        found += _batch_windows(tokenizer, questions[batch], contexts[batch], first, max_length, stride)
    return found


def _batches(total: int, batch_size: int, progress: bool) -> Iterator[int]:
    firsts = range(0, total, batch_size)
    if not progress:
        yield from firsts
        return
    from tqdm.auto import tqdm  # only for those who ask for a bar

    with tqdm(total=total, desc="windows", unit=" questions") as bar:
        for first in firsts:
            yield first
            bar.update(min(batch_size, total - first))


def _batch_windows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    first: int,
    max_length: int,
    stride: int,
) -> Iterator[Window]:
    question_first = tokenizer.padding_side == "right"
    pair = (questions, contexts) if question_first else (contexts, questions)
    # Whole and unpadded, cut by us: the tokenizer's own overflow fails without naming the question. verbose
    # warns of sequences longer than the model takes, which the cut takes care of.
    encoded = tokenizer(*map(list, pair), truncation=False, padding=False, verbose=False)
    for index, encoding in enumerate(encoded.encodings or ()):
        whole = _whole_window(tokenizer, encoding, first + index, context_sequence=int(question_first))
        yield from _cut(whole, max_length, stride)


def _whole_window(
    tokenizer: PreTrainedTokenizerFast, encoding: Any, question_index: int, context_sequence: int
) -> Window:
    sequences = encoding.sequence_ids  # None for what the tokenizer added
    cls = [i for i, s in enumerate(sequences) if s is None and encoding.ids[i] == tokenizer.cls_token_id]
    if not cls:
        raise ValueError(f"{type(tokenizer).__name__} adds no CLS token, whose logits would say 'no answer'")
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    offsets[np.array([s != context_sequence for s in sequences], dtype=bool)] = -1
    has_types = "token_type_ids" in tokenizer.model_input_names
    types = encoding.type_ids if has_types else [0] * len(sequences)
    ids = np.array(encoding.ids, dtype=np.int32)
    return Window(question_index, ids, np.array(types, dtype=np.int32), offsets, cls[0])


def _cut(whole: Window, max_length: int, stride: int) -> Iterator[Window]:
    first, last = whole.context_range
    context = last - first
    room = max_length - (len(whole) - context)
    if context <= room:
        yield whole
        return
    if room <= stride:
        raise ValueError(
            f"question {whole.question_index} is too long: with special tokens it takes "
            f"{len(whole) - context} of max_length {max_length} tokens; {max(room, 0)} are left for its "
            f"context of {context}, and windows that share {stride} (the stride) need at least {stride + 1}"
        )
    for begin in range(first, last - stride, room - stride):
        end = min(begin + room, last)
        keep = np.r_[0:first, begin:end, last : len(whole)]
        cls_index = int(np.flatnonzero(keep == whole.cls_index)[0])
        parts = (whole.input_ids[keep], whole.token_type_ids[keep], whole.offsets[keep])
        yield Window(whole.question_index, *parts, cls_index)


def decode(
    windows: Sequence[Window],
    logits: Sequence[Logits],
    contexts: Sequence[str],
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[Decoded]:
    """Each question's best spans, and its null score, out of the logits of all its windows.

    logits: a (start, end) pair per window, (tokens,) each. contexts: `Window.question_index` points into it.
    A span begins and ends with a context token, has at most max_answer_tokens of them, and loses whitespace
    at its ends (byte-level tokens can hold some). Its score is start logit + end logit. Spans of the same
    characters count once, with their best score. Equal scores go to the earlier start, then the earlier end.
    The null score is the lowest start + end logit at the CLS token over the windows, as in BERT's own script:
    a question has no answer only if no window has one.

    Raises ValueError for logits that are not finite or do not fit the windows, and for a question without
    a window.
    """
    if n_best < 1 or max_answer_tokens < 1:
        raise ValueError(f"n_best ({n_best}) and max_answer_tokens ({max_answer_tokens}) must be at least 1")
    if len(windows) != len(logits):
        raise ValueError(f"{len(windows)} windows, but logits of {len(logits)}")
    spans: list[dict[Span, float]] = [{} for _ in contexts]
    nulls: list[list[float]] = [[] for _ in contexts]
    for number, (window, pair) in enumerate(zip(windows, logits, strict=True)):
        question = window.question_index
        if not 0 <= question < len(contexts):
            raise ValueError(f"window {number} is of question {question} of {len(contexts)}")
        start, end = _checked(pair, number, len(window))
        nulls[question].append(float(start[window.cls_index] + end[window.cls_index]))
        merged = spans[question]
        found = _best_spans(window, start, end, contexts[question], n_best, max_answer_tokens)
        for score, first, last in found:
            merged[first, last] = max(score, merged.get((first, last), score))
    without = [i for i, scores in enumerate(nulls) if not scores]
    if without:
        raise ValueError(f"no window of question {', '.join(map(str, without[:5]))} ({len(without)} in all)")
    return [_decoded(*one, n_best) for one in zip(spans, nulls, contexts, strict=True)]


def _decoded(spans: dict[Span, float], nulls: list[float], context: str, n_best: int) -> Decoded:
    best = (Answer(context[start:end], score, start, end) for score, start, end in _ranked(spans)[:n_best])
    return Decoded(tuple(best), min(nulls))


def _checked(pair: Logits, number: int, length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both logits in fp64, in which the sum of two fp32 numbers is exact: ties are real ties."""
    start, end = (np.asarray(values, dtype=np.float64) for values in pair)
    if start.shape != (length,) or end.shape != (length,):
        raise ValueError(f"window {number} has {length} tokens, but logits of {start.shape} and {end.shape}")
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise ValueError(f"the logits of window {number} are not finite")
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
    wanted = n_best
    while True:
        everything = wanted >= flat.size
        # All that tie with the last one wanted come along, so that which of them stay is decided by position.
        least = -np.inf if everything else np.partition(flat, flat.size - wanted)[flat.size - wanted]
        chosen = np.flatnonzero((flat >= least) & (flat > -np.inf))
        starts, lengths = np.divmod(chosen, width)
        characters = (window.offsets[first + starts, 0], window.offsets[first + starts + lengths, 1])
        ranked = _distinct(flat[chosen], *characters, context)
        if everything or len(ranked) >= n_best:
            return ranked[:n_best]
        wanted *= _WIDEN


def _distinct(scores: NDArray[np.float64], starts: Int32Array, ends: Int32Array, context: str) -> Ranked:
    best: dict[Span, float] = {}
    for score, start, end in zip(scores.tolist(), starts.tolist(), ends.tolist(), strict=True):
        text = context[start:end]
        span = (end - len(text.lstrip()), start + len(text.rstrip()))
        if span[0] < span[1]:
            best[span] = max(score, best.get(span, score))
    return _ranked(best)


def _ranked(spans: dict[Span, float]) -> Ranked:
    return sorted(((score, *span) for span, score in spans.items()), key=lambda s: (-s[0], *s[1:]))
