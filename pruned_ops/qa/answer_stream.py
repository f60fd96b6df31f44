"""From a stream of questions to what a model says on each, in order, in bounded memory.

Windows are made ahead, in a thread, while the model computes (tokenizers and our ops release the GIL). They
come in blocks of a few batches' tokens, which `scheduling` sorts by length and runs. Of a question only its
context and its best spans are kept, of a context only the windows of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from pruned_ops.models.configuration import SCORED
from pruned_ops.qa.decoding import Candidates, Decoded
from pruned_ops.qa.logits import select_logits, split_logits
from pruned_ops.qa.windows import RefusedQuestion, Window, cut_each
from pruned_ops.runtime.streaming import LOOK_AHEAD, BatchRunner, Tensors

# What a token takes of English text; only how far ahead is read depends on it.
_CHARACTERS_PER_TOKEN = 4
# Questions that are read ahead at most, however short their contexts.
_QUESTIONS_AHEAD = 512

Asked = tuple[str, str]  # question, context


@dataclass(frozen=True)
class Reading:
    """How questions are read. max_length: tokens of a window; stride: tokens that two of a question's share;
    max_answer_tokens: a span's at most; n_best: spans kept of a question; tokens_per_batch: of the model's
    batches, padding included. Errors: ValueError for what cannot be."""

    max_length: int = 384
    stride: int = 128
    max_answer_tokens: int = 30
    n_best: int = SCORED
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_length", "max_answer_tokens", "n_best", "tokens_per_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number of at least 1 is needed")


Event = Window | tuple[int, RefusedQuestion | None]


@dataclass
class _Block:
    """Some windows, in order, and the questions that have no more after them, with the reason where one was
    refused. last: the records at hand are used up."""

    windows: list[Window] = field(default_factory=list)
    ended: dict[int, RefusedQuestion | None] = field(default_factory=dict)
    last: bool = False


def as_asked(record: Any, index: int) -> Asked:
    """Question and context of a record: a mapping with these keys, or a pair. RefusedQuestion for another."""
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


class AnswerStream:
    """One run over many questions, to be iterated once.

    It yields for each record, in order, what the model says, or the RefusedQuestion that says why it cannot
    be asked. An error of `records` itself is raised once all that came before it is answered. lock: held
    while the tokenizer works.
    """

    def __init__(
        self, model: Any, tokenizer: Any, records: Iterable[Any], reading: Reading, lock: Lock
    ) -> None:
        self._tokenizer, self._reading, self._lock = tokenizer, reading, lock
        device = next(model.parameters()).device
        self._runner = BatchRunner(model, model.config.pad_token_id, device, select_logits)
        self._tokens = LOOK_AHEAD * reading.tokens_per_batch
        self._records = enumerate(records)
        self._failure: Exception | None = None
        self._contexts: dict[int, str] = {}
        self._candidates: dict[int, Candidates] = {}
        self._ended: dict[int, RefusedQuestion | None] = {}
        self._left: Counter[int] = Counter()  # a question's windows that are cut, and not yet run
        self._next = 0  # the question whose answer comes next

    def __iter__(self) -> Iterator[Decoded | RefusedQuestion]:
        with ThreadPoolExecutor(1, "pruned_ops-windows") as thread:
            tokens = self._reading.tokens_per_batch
            for batch, logits in self._runner.scheduled(self._blocks(thread), tokens):
                self._take(batch, logits)
                yield from self._complete()
        yield from self._complete()
        if self._failure is not None:
            raise self._failure

    def _blocks(self, thread: ThreadPoolExecutor) -> Iterator[list[Window]]:
        """The blocks' windows; while one is computed the thread cuts the next."""
        events = self._events(self._read())
        ahead: Future[_Block] | None = thread.submit(self._block, events)
        while ahead is not None:
            block = ahead.result()
            if block.last:
                records = self._read()
                events = self._events(records)
                ahead = thread.submit(self._block, events) if records else None
            else:
                ahead = thread.submit(self._block, events)
            self._left.update(window.question_index for window in block.windows)
            self._ended |= block.ended
            yield block.windows

    def _read(self) -> list[tuple[int, Asked | RefusedQuestion]]:
        """The next records, about a block of them. They are read by the caller's own thread: a generator of
        theirs may be tied to it, and Ctrl-C reaches it."""
        found: list[tuple[int, Asked | RefusedQuestion]] = []
        characters = 0
        while characters < self._tokens * _CHARACTERS_PER_TOKEN and len(found) < _QUESTIONS_AHEAD:
            if self._failure is not None:
                break
            try:
                index, record = next(self._records)
            except StopIteration:
                break
            except Exception as error:  # whatever the caller's iterable raises; it comes back to them
                self._failure = error
                break
            try:
                asked = as_asked(record, index)
            except RefusedQuestion as refused:
                found.append((index, refused))
                continue
            found.append((index, asked))
            self._contexts[index] = asked[1]
            characters += len(asked[0]) + len(asked[1])
        return found

    def _events(self, records: list[tuple[int, Asked | RefusedQuestion]]) -> Iterator[Event]:
        """The windows of these records, and after the last of each its end."""
        asked = {index: pair for index, pair in records if not isinstance(pair, RefusedQuestion)}
        questions, contexts = ([pair[place] for pair in asked.values()] for place in (0, 1))
        cut = (self._reading.max_length, self._reading.stride)
        cuts = cut_each(self._tokenizer, questions, contexts, *cut, indices=list(asked))
        for index, pair in records:
            refused = pair if isinstance(pair, RefusedQuestion) else None
            if refused is None:
                try:
                    yield from next(cuts)
                except RefusedQuestion as found:
                    refused = found
            yield index, refused

    def _block(self, events: Iterator[Event]) -> _Block:
        """In the thread: the next windows, about twice a block's where the questions at hand have so many."""
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
        """Keep a batch's best spans."""
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
        """What is complete, in order."""
        while self._next in self._ended and not self._left[self._next]:
            index = self._next
            self._next += 1
            refused = self._ended.pop(index)
            for kept in (self._contexts, self._left):
                kept.pop(index, None)
            candidates = self._candidates.pop(index, None)
            if refused is not None:
                yield refused
                continue
            assert candidates is not None  # every question has a window
            decoded = candidates.decoded()
            assert decoded is not None
            yield decoded
