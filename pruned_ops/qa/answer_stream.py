"""AnswerStream: one run over many questions, which reads, cuts and computes them beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pruned_ops.models.configuration import SCORED
from pruned_ops.models.inputs import padding_id
from pruned_ops.qa.decoding import Candidates, Decoded
from pruned_ops.qa.logits import select_logits, split_logits
from pruned_ops.qa.windows import RefusedQuestion, Window, cut_each
from pruned_ops.runtime.arrivals import Arrivals, ForkLock, blocks_of, in_one_process
from pruned_ops.runtime.batch_runner import LOOK_AHEAD, BatchRunner, Tensors
from pruned_ops.shape import checked_int

# A token of English text takes about so many. Only how far ahead is read depends on it.
_CHARACTERS_PER_TOKEN = 4
# At most so many questions are a block, however short their contexts are.
_QUESTIONS_OF_A_BLOCK = 512

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


def _characters(read: Read, least: int) -> int:
    """The characters that a record counts among those of a block."""
    texts = read[1]
    return least if isinstance(texts, RefusedQuestion) else max(least, sum(map(len, texts)))


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
        lock: ForkLock,
    ) -> None:
        self._tokenizer, self._reading, self._lock = tokenizer, reading, lock
        device = next(model.parameters()).device
        self._runner = BatchRunner(model, padding_id(model.config), device, select_logits)
        self._tokens = LOOK_AHEAD * reading.tokens_per_batch
        enough = self._tokens * _CHARACTERS_PER_TOKEN
        least = enough // _QUESTIONS_OF_A_BLOCK  # what the shortest question counts, in characters
        # A method would hold this object, and so keep a generator of the caller's open until gc runs.
        self._records = blocks_of(self._read(records), are_there, enough, partial(_characters, least=least))
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
        check_text(index, name, text)
    return texts


def check_text(index: int, name: str, text: str) -> None:
    """RefusedQuestion for a string that no tokenizer takes, because it holds half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedQuestion(
            index,
            f"cannot be read: its {name} has half a surrogate pair (U+{ord(text[error.start]):04X}) at "
            f"character {error.start}, which is no text",
        ) from None
