"""pipeline("question-answering", ...): for calls written for the pipeline that transformers 5 removed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch

from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.qa.answerer import QuestionAnswerer
from pruned_ops.qa.decoding import Answer
from pruned_ops.qa.windows import RefusedQuestion

TASK = "question-answering"
# Characters on either side of an answer that are looked at for the word it ends in.
_AROUND = 200
# Of the old pipeline; batches are made by tokens here, and texts are never padded.
_WITHOUT_MEANING = ("batch_size", "num_workers", "padding")


@dataclass(frozen=True)
class _Options:
    """What a call may say, with the old pipeline's names and defaults."""

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len", "max_seq_len", "max_question_len"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed")

    def updated(self, given: dict[str, Any]) -> _Options:
        """With what a call gave; None means the default. TypeError for a name that is none."""
        given = {name: value for name, value in given.items() if name not in _WITHOUT_MEANING}
        if "topk" in given:
            warnings.warn("topk is the old name of top_k", FutureWarning, stacklevel=4)
            given.setdefault("top_k", given["topk"])
            del given["topk"]
        known = [field.name for field in fields(self)]
        for name in given:
            if name not in known:
                raise TypeError(f"the {TASK} pipeline takes no {name}; it takes {', '.join(known)}")
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def pipeline(
    task: str,
    model: Any = None,
    tokenizer: Any = None,
    device: int | str | torch.device | None = None,
    dtype: str | None = None,
    framework: str | None = None,
    **options: Any,
) -> QuestionAnsweringPipeline:
    """The question-answering pipeline of transformers 4, on this project's runtime.

    model, tokenizer, dtype: as for QuestionAnswerer, to which the model is given. device: as there, or a
    number as in the old pipeline (-1: CPU, n: GPU n). options: defaults for what each call may say.
    Errors: ValueError for another task, for no model, and for another framework than "pt".
    """
    if task != TASK:
        raise ValueError(f"there is no {task!r} pipeline here, only {TASK!r}; use transformers.pipeline")
    if model is None:
        raise ValueError(
            "no model is chosen for you: pass model=, a checkpoint or a model with its tokenizer"
        )
    if framework not in (None, "pt"):
        raise ValueError(f"framework is {framework!r}; the models here are torch's, 'pt'")
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    defaults = _Options().updated(options)
    return QuestionAnsweringPipeline(QuestionAnswerer(model, tokenizer, device=device, dtype=dtype), defaults)


class QuestionAnsweringPipeline:
    """Takes the calls of the old pipeline and gives its results: dictionaries with score, start, end, answer.

    One question gives a dictionary, a list where top_k is above 1; several give a list of these; a generator
    or a data set gives an iterator over them. Inputs are question= and context= (strings, or lists of them),
    dictionaries with these keys, objects with question_text and context_text, two strings, or a list of any.

    As before, "" is an answer with handle_impossible_answer only, and with align_to_words answers are widened
    to whole words. What differs: the score is QuestionAnswerer's, no product of two softmaxes; whether ""
    comes first is decided by the checkpoint's null score threshold (0 where it has none, as before);
    max_question_len shortens a longer question where it is given (it did nothing with fast tokenizers), and a
    question that leaves no room for its context is refused. batch_size, num_workers and padding are taken and
    mean nothing: batches are made by tokens.
    """

    task = TASK

    def __init__(self, answerer: QuestionAnswerer, defaults: _Options) -> None:
        self.answerer, self._defaults = answerer, defaults
        self.model, self.tokenizer = answerer.model, answerer.tokenizer

    def __call__(self, *inputs: Any, **given: Any) -> Any:
        names = ("question", "context", "X", "data")
        texts: dict[str, Any] = {name: given.pop(name) for name in names if name in given}
        options = self._defaults.updated(given)
        records = _records(inputs, texts)
        if not isinstance(records, list):
            return self._results(records, options)
        found = list(self._results(records, options))
        return found[0] if len(found) == 1 else found

    def _results(self, records: Iterable[Any], options: _Options) -> Iterator[Any]:
        answerer = self.answerer
        reading = answerer.reading
        length = options.max_seq_len or reading.max_length
        stride = min(length // 2, 128) if options.doc_stride is None else options.doc_stride
        reading = replace(
            reading, max_length=length, stride=stride, max_answer_tokens=options.max_answer_len,
            n_best=max(reading.n_best, options.top_k),
        )  # fmt: skip
        contexts: deque[str] = deque()  # of the questions that are under way

        def asked() -> Iterator[tuple[str, str]]:
            for record in records:
                question, context = _texts(record)
                contexts.append(context)
                yield self._shortened(question, options.max_question_len), context

        for decoded in answerer.decoded(asked(), reading):
            if isinstance(decoded, RefusedQuestion):
                raise decoded
            ranked = decoded.ranked(
                answerer.null_score_threshold, answerer.calibration, options.handle_impossible_answer
            )
            found = self._dictionaries(ranked, contexts.popleft(), options)
            yield found[0] if options.top_k == 1 else found

    def _shortened(self, question: str, tokens: int | None) -> str:
        if tokens is None:
            return question
        with self.answerer.lock:
            offsets = self.tokenizer(question, add_special_tokens=False, verbose=False).encodings[0].offsets
        return question[: offsets[tokens - 1][1]] if len(offsets) > tokens else question

    def _dictionaries(
        self, ranked: Sequence[Answer], context: str, options: _Options
    ) -> list[dict[str, Any]]:
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for answer in ranked:
            span = (answer.start, answer.end)
            if options.align_to_words and answer.answer:
                with self.answerer.lock:
                    span = aligned(self.tokenizer, context, *span)
            text = context[slice(*span)]
            # Of spans that are widened to the same words the likeliest comes first, and stays.
            found.setdefault(span, {"score": answer.score, "start": span[0], "end": span[1], "answer": text})
            if len(found) == options.top_k:
                break
        return list(found.values())


def aligned(tokenizer: Any, context: str, start: int, end: int) -> tuple[int, int]:
    """The span widened to whole words, as the tokenizer's own pre-tokenizer sees them."""
    first, last = start, end
    while first > max(0, start - _AROUND) and not context[first - 1].isspace():
        first -= 1
    while last < min(len(context), end + _AROUND) and not context[last].isspace():
        last += 1
    encoding = tokenizer(context[first:last], add_special_tokens=False, verbose=False).encodings[0]
    words: dict[int, tuple[int, int]] = {}
    for word, (left, right) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is not None:
            before = words.get(word, (left, right))
            words[word] = (min(left, before[0]), max(right, before[1]))
    touched = [(a + first, b + first) for a, b in words.values() if a + first < end and b + first > start]
    wide = (min([start, *(a for a, _ in touched)]), max([end, *(b for _, b in touched)]))
    text = context[slice(*wide)]
    return wide[1] - len(text.lstrip()), wide[0] + len(text.rstrip())


def _records(inputs: tuple[Any, ...], texts: dict[str, Any]) -> Any:
    """A call's questions: a list where it gave them at once, else the iterable it gave."""
    if len(inputs) == 2 and all(isinstance(one, str) for one in inputs):
        return [{"question": inputs[0], "context": inputs[1]}]
    if inputs:
        given: Any = inputs[0] if len(inputs) == 1 else list(inputs)
    elif "X" in texts or "data" in texts:
        given = texts["X"] if "X" in texts else texts["data"]
    elif "question" in texts and "context" in texts:
        given = texts
    else:
        raise ValueError(f"question and context are needed; given {', '.join(texts) or 'nothing'}")
    if isinstance(given, str):
        raise ValueError("question and context are needed; given one string")
    if isinstance(given, Mapping) or hasattr(given, "question_text"):
        return _spread(given)
    if isinstance(given, (list, tuple)):
        return list(chain.from_iterable(map(_spread, given)))
    if not isinstance(given, Iterable):
        raise ValueError(f"a {type(given).__name__} is no question with its context")
    return given


def _spread(record: Any) -> list[Any]:
    """A dictionary of lists as many dictionaries."""
    question = record.get("question") if isinstance(record, Mapping) else None
    context = record.get("context") if isinstance(record, Mapping) else None
    if not isinstance(question, list):
        return [record]
    contexts = context if isinstance(context, list) else [context] * len(question)
    if len(contexts) != len(question):
        raise ValueError(f"{len(question)} questions, but {len(contexts)} contexts: one context a question")
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]


def _texts(record: Any) -> tuple[str, str]:
    """Of a dictionary, or an object like transformers' SquadExample; KeyError or ValueError for another."""
    if hasattr(record, "question_text") and hasattr(record, "context_text"):
        record = {"question": record.question_text, "context": record.context_text}
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__} is no question with its context: pass a dictionary")
    for name in ("question", "context"):
        if name not in record:
            raise KeyError(f"a dictionary with question and context is needed; this one has no {name}")
        if not isinstance(record[name], str) or not record[name]:
            found = "empty" if record[name] == "" else f"a {type(record[name]).__name__}"
            raise ValueError(f"{name} is {found}; a string that is not empty is needed")
    return record["question"], record["context"]
