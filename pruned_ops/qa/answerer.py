"""QuestionAnswerer: questions and texts in, answers out, for one question or for millions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, overload

import torch

from pruned_ops.checkpoints.loading import checked_device, default_device, load_model, load_tokenizer
from pruned_ops.models.configuration import SCORED, ScoreCalibration
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import is_encoder_class
from pruned_ops.qa.decoding import Answer, Candidates, Decoded
from pruned_ops.qa.logits import select_logits, split_logits
from pruned_ops.qa.windows import RefusedQuestion, Window, check_cut, check_pairs, cut_each
from pruned_ops.runtime.arrivals import Arrivals, ForkLock, blocks_of, in_one_process, is_there
from pruned_ops.runtime.optimize import optimize
from pruned_ops.runtime.streaming import LOOK_AHEAD, BatchRunner, Tensors
from pruned_ops.shape import checked_int

# The defaults of Hugging Face's question-answering scripts, and of this project's trainer.
_MAX_LENGTH, _STRIDE_PARTS = 384, 3
# A token of English text takes about so many. Only how far ahead is read depends on it.
_CHARACTERS_PER_TOKEN = 4
# At most so many questions are a block, however short their contexts are.
_QUESTIONS_OF_A_BLOCK = 512

# The heads of transformers' own classes that find no answer in a text, by their names.
_OTHER_HEAD = re.compile(
    "For(SequenceClassification|TokenClassification|MaskedLM|MultipleChoice|NextSentencePrediction|"
    "PreTraining|CausalLM)$|LMHeadModel$"
)

Texts = tuple[str, str]  # question, context


@dataclass(frozen=True)
class Reading:
    """How questions are read.

    max_length: tokens of a window. stride: tokens that two neighbouring windows of a question share.
    max_answer_tokens: tokens of the longest answer. n_best: how many spans of a question are kept.
    tokens_per_batch: tokens of a batch, padding included. Errors: ValueError for numbers that cannot be.
    """

    max_length: int = 384
    stride: int = 128
    max_answer_tokens: int = 30
    n_best: int = SCORED
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_length", "max_answer_tokens", "n_best", "tokens_per_batch"):
            checked_int(name, getattr(self, name), 1)


class QuestionAnswerer:
    """Answers questions out of texts of any length with a BERT or RoBERTa, stock or pruned.

    model: a checkpoint's folder or hub name, or a question-answering model. A model that is passed in is
    optimised in place and stays so: its own weights read as NaN until `pruned_ops.restore(model)`.
    tokenizer: the fast tokenizer beside the model; needed with a model that is passed in.
    device: where the model runs; by default a checkpoint goes to the GPU where there is one, and a model
    passed in stays where it is. dtype: None, or "bfloat16" or "int8" on a CPU (see `optimize`).
    max_length, stride: tokens of a window, and tokens that two neighbouring windows of a text share; by
    default 384 (less where the model takes less) and a third of it. max_answer_tokens: tokens of the longest
    answer. null_score_threshold: the answer is "" where the score of "no answer" exceeds the best span's by
    more than this; by default the checkpoint's own, which the trainer chose on validation questions, else 0.
    tokens_per_batch: tokens of a batch, padding included.

    Scores: the probability that an answer is right, by the checkpoint's `score_calibration`, which the
    trainer fitted on the validation questions with the checkpoint's own threshold. A checkpoint without one
    gives the plain softmax over its 20 best spans and no answer, which nobody has compared with how often
    such answers are right.

    Errors: OSError where there is no checkpoint; ValueError for a checkpoint of another kind, for a model
    that `optimize` does not take, and for settings that the model does not allow.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        max_answer_tokens: int = 30,
        null_score_threshold: float | None = None,
        tokens_per_batch: int = 4096,
    ) -> None:
        if isinstance(model, (str, PathLike)):
            tokenizer = load_tokenizer(str(model)) if tokenizer is None else tokenizer
            model = load_model(str(model), takes_int8=True)
            device = default_device(model) if device is None else device
        elif tokenizer is None:
            raise ValueError(f"a {type(model).__name__} has no tokenizer with it: pass its tokenizer too")
        _check_kind(model)
        config = model.config
        if max_length is None:
            max_length = min(_MAX_LENGTH, longest_sequence(config))
        stride = max_length // _STRIDE_PARTS if stride is None else stride
        self.reading = Reading(max_length, stride, max_answer_tokens, tokens_per_batch=tokens_per_batch)
        _check_reading(self.reading, config, tokenizer)
        if null_score_threshold is None:
            null_score_threshold = getattr(config, "null_score_threshold", 0.0)
        self.null_score_threshold = _checked_threshold(null_score_threshold)
        stored = getattr(config, "score_calibration", None)
        self.calibration = ScoreCalibration() if stored is None else ScoreCalibration.parse(stored)
        if device is not None:
            model = model.to(checked_device(device))
        self.model, self.tokenizer = optimize(model, dtype=dtype), tokenizer
        # Held while the tokenizer works: it takes no two callers at once.
        self.lock: AbstractContextManager[Any] = ForkLock()

    @overload
    def answer(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, question: str, context: str, top_k: None = None, allow_none: bool = True
    ) -> Answer: ...
    @overload
    def answer(self, question: str, context: str, top_k: int, allow_none: bool = True) -> list[Answer]: ...
    @overload
    def answer(
        self,
        question: Sequence[str],
        context: str | Sequence[str],
        top_k: int | None = None,
        allow_none: bool = True,
        keep_refused: bool = False,
    ) -> list[Any]: ...
    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        top_k: int | None = None,
        allow_none: bool = True,
        keep_refused: bool = False,
    ) -> Any:
        """The answer to a question out of a context, or a list of answers to lists of the same length.

        One context may go with many questions, and one question with many contexts. top_k: gives in place of
        each answer a list of at most so many, likeliest first. allow_none: whether "" (from 0 to 0) may be
        the answer; without it the answer is the best span, and "" only where the context holds no token.
        keep_refused: gives a RefusedQuestion in the place of an entry that cannot be asked, so that it does
        not cost the others their answers.
        Errors: TypeError for arguments that are neither strings nor lists; RefusedQuestion, a ValueError,
        with the index of an entry that is no text, or of a question that leaves no room for its context.
        """
        questions, contexts = _lists(question, context)
        pairs = list(zip(questions, contexts, strict=True))
        answers = list(self.stream(pairs, top_k, allow_none, progress=False, keep_refused=keep_refused))
        return answers[0] if isinstance(question, str) and isinstance(context, str) else answers

    def stream(
        self,
        records: Iterable[Any],
        top_k: int | None = None,
        allow_none: bool = True,
        progress: bool = True,
        keep_refused: bool = False,
    ) -> Iterator[Any]:
        """The answers to any number of questions, in their order, in memory that does not grow with them.

        records: mappings with `question` and `context` (say a `datasets.Dataset`, or JSON objects), or pairs
        of texts. Some are read ahead (1,600 at most), so answers come in bursts. A generator is read in a
        thread of the stream's own; where its next record is waited for, those before it are answered at once.
        Which windows share a batch depends on when records came then, and with it a score's last bits.
        top_k: gives a list of at most so many Answers for each question, in place of one Answer. progress:
        shows a bar on stderr. keep_refused: gives a RefusedQuestion in the place of a record that cannot be
        asked; without it, the RefusedQuestion is raised after the answers to the records before it. So is an
        error of `records`. A forked child that goes on with its parent's stream gets a RuntimeError.
        """
        if top_k is not None:
            checked_int("top_k", top_k, 1)
        if isinstance(records, (str, bytes)) or not isinstance(records, Iterable):
            raise TypeError(f"records are a {type(records).__name__}; an iterable of questions is needed")
        return self._answers(records, top_k, allow_none, progress, keep_refused)

    def _answers(
        self, records: Iterable[Any], top_k: int | None, allow_none: bool, progress: bool, keep_refused: bool
    ) -> Iterator[Any]:
        reading = replace(self.reading, n_best=max(self.reading.n_best, top_k or 1))
        for decoded in self.decoded(records, reading, progress):
            if isinstance(decoded, RefusedQuestion):
                if not keep_refused:
                    raise decoded
                yield decoded
                continue
            ranked = decoded.ranked(self.null_score_threshold, self.calibration, allow_none)
            yield ranked[0] if top_k is None else ranked[:top_k]

    def decoded(
        self,
        records: Iterable[Any],
        reading: Reading,
        progress: bool = False,
        are_there: bool | None = None,
    ) -> Iterator[Decoded | RefusedQuestion]:
        """Every record's best spans and null score, in logits, of which `stream` chooses the answers.

        are_there: whether no record has to be waited for; by default what `is_there` says of `records`."""
        _check_reading(reading, self.model.config, self.tokenizer)
        are_there = is_there(records) if are_there is None else are_there
        stream = AnswerStream(self.model, self.tokenizer, records, are_there, reading, self.lock)
        if not progress:
            yield from stream
            return
        from tqdm.auto import tqdm  # only for those who ask for a bar

        total = len(records) if isinstance(records, Sized) else None
        with tqdm(total=total, desc="answers", unit=" questions") as bar:
            for decoded in stream:
                yield decoded
                bar.update()


def _check_kind(model: Any) -> None:
    """ValueError for a classifier and other models without start and end logits, before they are changed."""
    name = type(model).__name__
    head = _OTHER_HEAD.search(name)
    if head is not None or any(map(is_encoder_class, type(model).__mro__)):
        raise ValueError(
            f"a {name} gives no start and end logits, of which answers are made; a question-answering model "
            f"is needed (pruned_ops.optimize(model) makes a {name} fast, for its own calls)"
        )


def _check_reading(reading: Reading, config: Any, tokenizer: Any) -> None:
    """ValueError for windows that are too long for the model; `check_cut`'s errors."""
    longest = longest_sequence(config)
    if reading.max_length > longest:
        raise ValueError(
            f"windows of {reading.max_length} tokens are too long: the model takes sequences of {longest}"
        )
    check_cut(tokenizer, reading.max_length, reading.stride)


def _checked_threshold(value: Any) -> float:
    """The threshold as a float; ValueError for NaN, -inf and anything that is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > float("-inf"):
        raise ValueError(f"null_score_threshold is {value!r}; a number is needed (inf: never no answer)")
    return float(value)


def _lists(question: Any, context: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Both as lists of one length; a single string is repeated."""
    for name, value in (("question", question), ("context", context)):
        if isinstance(value, (bytes, dict)) or not isinstance(value, (str, Sequence)):
            raise TypeError(f"{name} is a {type(value).__name__}; a string, or a list of them, is needed")
    if isinstance(question, str):
        question = [question] * (1 if isinstance(context, str) else len(context))
    if isinstance(context, str):
        context = [context] * len(question)
    check_pairs(question, context)
    return question, context


# A window, or the end of a question's windows: its index, and the reason where it was refused.
Event = Window | tuple[int, RefusedQuestion | None]
# A record that was read: its index, and what is asked, or the reason where that cannot be asked.
Read = tuple[int, Texts | RefusedQuestion]


@dataclass
class _Block:
    """Some windows, in order. ended: the questions that have no more windows after these, each with the
    reason where it was refused. last: whether no record that was read is left."""

    windows: list[Window] = field(default_factory=list)
    ended: dict[int, RefusedQuestion | None] = field(default_factory=dict)
    last: bool = False


class AnswerStream:
    """One run over many questions, to be iterated once.

    It yields for each record, in order, the best spans with their scores, or a RefusedQuestion that says why
    the record cannot be asked. An error of `records` itself is raised once the records before it are
    answered. are_there: whether no record has to be waited for. lock: is held while the tokenizer works.

    While the caller's thread computes a block of windows, another thread cuts the next. Records of a
    generator are read in a third.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        records: Iterable[Any],
        are_there: bool,
        reading: Reading,
        lock: AbstractContextManager[Any],
    ) -> None:
        self._tokenizer, self._reading, self._lock = tokenizer, reading, lock
        device = next(model.parameters()).device
        self._runner = BatchRunner(model, model.config.pad_token_id, device, select_logits)
        self._tokens = LOOK_AHEAD * reading.tokens_per_batch
        enough = self._tokens * _CHARACTERS_PER_TOKEN
        self._least = enough // _QUESTIONS_OF_A_BLOCK  # what the shortest question counts, in characters
        self._records = blocks_of(self._read(records), are_there, enough, self._characters)
        self._failure: Exception | None = None
        self._contexts: dict[int, str] = {}
        self._candidates: dict[int, Candidates] = {}
        self._ended: dict[int, RefusedQuestion | None] = {}
        self._left: Counter[int] = Counter()  # how many windows of a question are cut and not yet run
        self._next = 0  # the question whose answer comes next

    def __iter__(self) -> Iterator[Decoded | RefusedQuestion]:
        return in_one_process(self._results())

    def _results(self) -> Iterator[Decoded | RefusedQuestion]:
        for batch, logits in self._runner.scheduled(self._blocks(), self._reading.tokens_per_batch):
            self._take(batch, logits)
            yield from self._complete()
        yield from self._complete()
        if self._failure is not None:
            raise self._failure

    def _blocks(self) -> Iterator[list[Window]]:
        """The windows of block after block; an empty one where the next is waited for."""
        cut = Arrivals(self._cut(), 1)
        try:
            for blocks in cut:
                for block in blocks:
                    self._left.update(window.question_index for window in block.windows)
                    self._ended |= block.ended
                yield [window for block in blocks for window in block.windows]
        except Exception as error:  # the records' own may be any
            self._failure = error
        finally:
            self._records.close()
            cut.close(wait=True)

    @staticmethod
    def _read(records: Iterable[Any]) -> Iterator[Read]:
        """The records with their indices, checked."""
        for index, record in enumerate(records):
            try:
                yield index, _texts_of(record, index)
            except RefusedQuestion as refused:
                yield index, refused

    def _characters(self, read: Read) -> int:
        """The characters that a record counts among those of a block."""
        texts = read[1]
        return self._least if isinstance(texts, RefusedQuestion) else max(self._least, sum(map(len, texts)))

    def _cut(self) -> Iterator[_Block]:
        """Blocks of windows. This runs in the thread."""
        while (records := self._records.take()) is not None:
            events = self._events(records)
            while True:
                block = self._block(events)
                yield block
                if block.last:
                    break

    def _events(self, records: list[Read]) -> Iterator[Event]:
        """The windows of these records, and each record's end after the last of its windows."""
        accepted = {index: texts for index, texts in records if not isinstance(texts, RefusedQuestion)}
        questions, contexts = ([texts[place] for texts in accepted.values()] for place in (0, 1))
        self._contexts |= {index: context for index, (_, context) in accepted.items()}
        sizes = (self._reading.max_length, self._reading.stride)
        cuts = cut_each(self._tokenizer, questions, contexts, *sizes, indices=list(accepted))
        for index, texts in records:
            refused = texts if isinstance(texts, RefusedQuestion) else None
            if refused is None:
                try:
                    yield from next(cuts)
                except RefusedQuestion as too_long:
                    refused = too_long
            yield index, refused

    def _block(self, events: Iterator[Event]) -> _Block:
        """The next windows: tokens of about twice LOOK_AHEAD batches, where the records that were read have
        so many."""
        block, tokens = _Block(), 0
        with self._lock:
            for event in events:
                if not isinstance(event, Window):
                    block.ended[event[0]] = event[1]
                    continue
                block.windows.append(event)
                tokens += len(event)
                if tokens >= 2 * self._tokens:
                    return block
        block.last = True
        return block

    def _take(self, batch: list[Window], logits: Tensors) -> None:
        """Keep the best spans of a batch's windows."""
        if not batch:
            return
        for window, pair in zip(batch, split_logits(batch, logits), strict=True):
            index = window.question_index
            if index not in self._candidates:
                reading = self._reading
                self._candidates[index] = Candidates(
                    self._contexts[index], reading.n_best, reading.max_answer_tokens
                )
            self._candidates[index].add(window, pair, f"a window of question {index}")
            self._left[index] -= 1

    def _complete(self) -> Iterator[Decoded | RefusedQuestion]:
        """The results of the questions whose windows have all run, in order."""
        while self._next in self._ended and not self._left[self._next]:
            index = self._next
            self._next += 1
            refused = self._ended.pop(index)
            self._contexts.pop(index, None)
            self._left.pop(index, None)
            candidates = self._candidates.pop(index, None)
            if refused is not None:
                yield refused
                continue
            assert candidates is not None  # every question has a window
            decoded = candidates.decoded()
            assert decoded is not None
            yield decoded


def _texts_of(record: Any, index: int) -> Texts:
    """The question and the context of a record, which is a mapping with these keys or a pair; RefusedQuestion
    for any other, and where the record is one itself."""
    if isinstance(record, RefusedQuestion):
        raise record
    if isinstance(record, Mapping):
        missing = [name for name in ("question", "context") if name not in record]
        if missing:
            raise RefusedQuestion(index, f"has no {' and no '.join(missing)}")
        texts = (record["question"], record["context"])
    elif isinstance(record, (tuple, list)) and len(record) == 2:
        texts = (record[0], record[1])
    else:
        raise RefusedQuestion(
            index, f"is a {type(record).__name__}; a mapping with question and context, or a pair, is needed"
        )
    for name, text in zip(("question", "context"), texts, strict=True):
        if not isinstance(text, str):
            raise RefusedQuestion(index, f"has {type(text).__name__} for its {name}; a string is needed")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedQuestion(
                index,
                f"cannot be read: its {name} has half a surrogate pair (U+{ord(text[error.start]):04X}) at "
                f"character {error.start}, which is no text",
            ) from None
    return texts
