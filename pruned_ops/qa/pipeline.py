"""pipeline("question-answering", ...): for calls written for the pipeline that transformers 5 removed."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pruned_ops.qa.answer_stream import check_text
from pruned_ops.qa.answerer import QuestionAnswerer
from pruned_ops.qa.decoding import Answer, after_marks, is_mark
from pruned_ops.qa.windows import RefusedQuestion, check_pairs
from pruned_ops.runtime.arrivals import is_there
from pruned_ops.shape import checked_int

TASK = "question-answering"
# The word that an answer ends in is looked for among so many characters on either side of it.
_AROUND = 200
# Options of the old pipeline. Here batches are made by tokens, and texts are never padded.
_WITHOUT_MEANING = ("batch_size", "num_workers", "padding")


@dataclass(frozen=True)
class _Options:
    """The options of a call, with the old pipeline's names and defaults. None stands for a default that
    depends on the model."""

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    keep_refused: bool = False

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len", "max_seq_len", "max_question_len"):
            value = getattr(self, name)
            if value is not None:
                checked_int(name, value, 1)

    def updated(self, options: dict[str, Any]) -> _Options:
        """These options with those of a call, of which None leaves the default. TypeError for a name that is
        no option's."""
        options = {name: value for name, value in options.items() if name not in _WITHOUT_MEANING}
        if "topk" in options:
            warnings.warn("topk is the old name of top_k", FutureWarning, stacklevel=4)
            options.setdefault("top_k", options["topk"])
            del options["topk"]
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise TypeError(f"the {TASK} pipeline takes no {name}; it takes {', '.join(known)}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})


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

    model, tokenizer, dtype: as for QuestionAnswerer, to which they are passed on. device: as there, or a
    number as in the old pipeline (-1: CPU, n: GPU n). options: the defaults of each call's options.
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
    if isinstance(device, int):
        device = "cpu" if device < 0 else f"cuda:{device}"
    defaults = _Options().updated(options)
    return QuestionAnsweringPipeline(QuestionAnswerer(model, tokenizer, device=device, dtype=dtype), defaults)


class QuestionAnsweringPipeline:
    """Takes the calls of the old pipeline and gives its results: dictionaries with score, start, end, answer.

    One question gives a dictionary, or a list of them where top_k is above 1; several questions give a list
    of such results; a generator or a data set gives an iterator over them. Inputs are question= and context=
    (strings, or lists of them), dictionaries with these keys, objects with question_text and context_text,
    two strings, or a list of any of these.

    As before, "" is an answer only with handle_impossible_answer, and with align_to_words answers are widened
    to whole words. These differ: the score is QuestionAnswerer's, no product of two softmaxes. The
    checkpoint's null score threshold decides whether "" comes first (0 where it has none, as before).
    max_question_len, where it is given, shortens a longer question (it did nothing with fast tokenizers). A
    question that leaves no room for its context is refused. A refused question is raised by its place among
    the others, after their answers where they are iterated over; with keep_refused=True the RefusedQuestion
    stands in its place, and the others are answered. batch_size, num_workers and padding are accepted and
    mean nothing, because batches are made by tokens.
    """

    task = TASK

    def __init__(self, answerer: QuestionAnswerer, defaults: _Options) -> None:
        self.answerer, self._defaults = answerer, defaults
        self.model, self.tokenizer = answerer.model, answerer.tokenizer

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        names = ("question", "context", "X", "data")
        texts: dict[str, Any] = {name: keywords.pop(name) for name in names if name in keywords}
        options = self._defaults.updated(keywords)
        records = _records(inputs, texts)
        if not isinstance(records, list):
            return self._results(records, options)
        results = list(self._results(records, options))
        return results[0] if len(results) == 1 else results

    def _results(self, records: Iterable[Any], options: _Options) -> Iterator[Any]:
        """The result of each record, in order."""
        answerer = self.answerer
        reading = answerer.reading
        length = options.max_seq_len or reading.max_length
        stride = min(length // 2, 128) if options.doc_stride is None else options.doc_stride
        reading = replace(
            reading, max_length=length, stride=stride, max_answer_tokens=options.max_answer_len,
            n_best=max(reading.n_best, options.top_k),
        )  # fmt: skip
        contexts: deque[str] = deque()  # the contexts of the questions that are under way

        def asked(index: int, record: Any) -> Any:
            try:
                question, context = _texts(record, index)
                question = self._shortened(index, question, options.max_question_len)
            except RefusedQuestion as refused:
                contexts.append("")
                return refused
            contexts.append(context)
            return question, context

        questions = itertools.starmap(asked, enumerate(records))
        for decoded in answerer.decoded(questions, reading, are_there=is_there(records)):
            context = contexts.popleft()
            if isinstance(decoded, RefusedQuestion):
                if not options.keep_refused:
                    raise decoded
                yield decoded
                continue
            ranked = decoded.ranked(
                answerer.null_score_threshold, answerer.calibration, options.handle_impossible_answer
            )
            answers = self._dictionaries(ranked, context, options)
            yield answers[0] if options.top_k == 1 else answers

    def _shortened(self, index: int, question: str, tokens: int | None) -> str:
        """The question's first tokens, at most so many; None leaves it whole. Errors: RefusedQuestion."""
        if tokens is None:
            return question
        check_text(index, "question", question)
        with self.answerer.lock:
            offsets = self.tokenizer(question, add_special_tokens=False, verbose=False).encodings[0].offsets
        return question[: offsets[tokens - 1][1]] if len(offsets) > tokens else question

    def _dictionaries(
        self, ranked: Sequence[Answer], context: str, options: _Options
    ) -> list[dict[str, Any]]:
        """The best options.top_k answers as the old pipeline gave them, each span once."""
        results: dict[tuple[int, int], dict[str, Any]] = {}
        for answer in ranked:
            span = (answer.start, answer.end)
            if options.align_to_words and answer.answer:
                with self.answerer.lock:
                    span = aligned(self.tokenizer, context, *span)
            text = context[slice(*span)]
            # Where several spans are widened to the same words, the likeliest comes first and stays.
            result = {"score": answer.score, "start": span[0], "end": span[1], "answer": text}
            results.setdefault(span, result)
            if len(results) == options.top_k:
                break
        return list(results.values())


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
    wide = [min([start, *(a for a, _ in touched)]), max([end, *(b for _, b in touched)])]
    # Scripts without spaces: what a tokenizer takes for a word there may be the whole sentence.
    wide[0] = max([wide[0], *(i + 1 for i in range(wide[0], start) if _joins(context, i))])
    wide[1] = min([wide[1], *(i + 1 for i in range(end - 1, wide[1] - 1) if _joins(context, i))])
    wide[1] = after_marks(context, wide[1])
    text = context[slice(*wide)]
    return wide[1] - len(text.lstrip()), wide[0] + len(text.rstrip())


# Scripts that write words without spaces between them: Thai, Lao, Tibetan, Burmese, Khmer, Tai and Javanese
# ones, kana, and Han characters.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u19e0-\u19ff\u1a20-\u1aaf\u3005-\u3007"
    "\u3021-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua980-\ua9df\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)


def _joins(context: str, place: int) -> bool:
    """Whether a word may end between this character and the next, though no space is there: next to a
    character of a script without spaces, but not before a mark that belongs to it."""
    pair = context[place : place + 2]
    return len(pair) == 2 and _SPACELESS.search(pair) is not None and not is_mark(pair[1])


def _records(inputs: tuple[Any, ...], texts: dict[str, Any]) -> Any:
    """The questions of a call: a list where it passed them at once, else the iterable that it passed.
    TypeError where it passed some in one way and some in another, of which only one way would be read."""
    ways = ["inputs by place"] if inputs else []
    ways += [f"{name}=" for name in ("X", "data") if name in texts]
    ways += ["question= and context="] if "question" in texts or "context" in texts else []
    if len(ways) > 1:
        raise TypeError(f"questions are passed in one way; given {', and '.join(ways)}")
    if len(inputs) == 2 and all(isinstance(text, str) for text in inputs):
        return [{"question": inputs[0], "context": inputs[1]}]
    if inputs:
        records: Any = inputs[0] if len(inputs) == 1 else list(inputs)
    elif "X" in texts or "data" in texts:
        (records,) = texts.values()
    elif "question" in texts and "context" in texts:
        records = texts
    else:
        raise ValueError(f"question and context are needed; given {', '.join(texts) or 'nothing'}")
    if isinstance(records, str):
        raise ValueError("question and context are needed; given one string")
    if isinstance(records, Mapping) or hasattr(records, "question_text"):
        return _spread(records)
    if isinstance(records, (list, tuple)):
        return list(itertools.chain.from_iterable(map(_spread, records)))
    if isinstance(records, Iterable):
        return records
    if is_there(records):  # torch's data sets have places, and no iterator
        return (records[place] for place in range(len(records)))
    raise ValueError(f"a {type(records).__name__} is no question with its context")


def _spread(record: Any) -> list[Any]:
    """The dictionaries that a dictionary of lists stands for; a list of the record alone for any other."""
    question = record.get("question") if isinstance(record, Mapping) else None
    context = record.get("context") if isinstance(record, Mapping) else None
    if not isinstance(question, list):
        return [record]
    contexts = context if isinstance(context, list) else [context] * len(question)
    check_pairs(question, contexts)
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]


class _LacksKey(RefusedQuestion, KeyError):
    """A dictionary without question or context: the old pipeline raised KeyError for it."""

    __str__ = ValueError.__str__  # KeyError's own would put the sentence in quotes


def _texts(record: Any, index: int) -> tuple[str, str]:
    """The question and the context of a dictionary, or of an object like transformers' SquadExample;
    RefusedQuestion for any other record."""
    if hasattr(record, "question_text") and hasattr(record, "context_text"):
        record = {"question": record.question_text, "context": record.context_text}
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise RefusedQuestion(
            index, f"cannot be asked: a {kind} is no question with its context; pass a dictionary"
        )
    for name in ("question", "context"):
        if name not in record:
            raise _LacksKey(index, f"has no {name}; a dictionary with question and context is needed")
        if not isinstance(record[name], str) or not record[name]:
            kind = "empty" if record[name] == "" else f"a {type(record[name]).__name__}"
            raise RefusedQuestion(
                index, f"cannot be asked: its {name} is {kind}; a string that is not empty is needed"
            )
    return record["question"], record["context"]
