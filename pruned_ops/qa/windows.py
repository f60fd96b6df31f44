"""Windows: questions with contexts of any length, cut into inputs that a model takes.

`windows` makes a model's inputs here; `decoding.decode` reads its start and end logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.runtime.arrivals import RefusedItem
from pruned_ops.shape import checked_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Int32Array = NDArray[np.int32]
Tokens = tuple[Int32Array, Int32Array]  # ids, (tokens,), and offsets, (tokens, 2), of a piece of context

# So many characters of a context are tokenised at once. A tokenizer takes a hundred times their memory.
PIECE = 1 << 16
# The defaults of Hugging Face's question-answering scripts, and of this project's trainer.
MAX_LENGTH, _STRIDE_PARTS = 384, 3


class RefusedQuestion(RefusedItem):
    """A question that cannot be asked. index: its place among the questions; reason: what is wrong with
    it."""

    noun = "question"


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


def windows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int = 384,
    stride: int = 128,
    batch_size: int = 256,
    progress: bool = False,
    refused: list[RefusedQuestion] | None = None,
) -> list[Window]:
    """Cut each (question, context) into windows of at most max_length tokens, in the order of the questions.

    stride: how many tokens two neighbouring windows share, as in Hugging Face (not the step). Every context
    token is in at least one window; a context without tokens gives one window. Blanks around a question are
    left out, because some tokenizers make a token of each. Special tokens, token types
    and the question's place come from the tokenizer: the question is first where padding is on the right,
    else the context is, which is Hugging Face's convention. Truncation and padding stored in tokenizer.json
    do not apply and, as after any call of a tokenizer, are no longer set afterwards. refused: collects the
    questions that cannot be cut, which then have no window.

    Raises ValueError for a question that leaves no room for its context, with its index and the numbers, and
    TypeError for a tokenizer that does not know offsets.
    """
    if isinstance(questions, str) or isinstance(contexts, str):
        raise TypeError("questions and contexts are sequences of strings; pass [question] and [context]")
    check_pairs(questions, contexts)
    checked_int("batch_size", batch_size, 1)
    check_cut(tokenizer, max_length, stride)
    all_windows: list[Window] = []
    for first in _batches(len(questions), batch_size, progress):
        batch = slice(first, first + batch_size)
        indices = range(len(questions))[batch]
        for cut in cut_each(tokenizer, questions[batch], contexts[batch], max_length, stride, indices):
            try:
                all_windows += list(cut)
            except RefusedQuestion as error:
                if refused is None:
                    raise
                refused.append(error)
    return all_windows


def window_sizes(longest: int, max_length: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """The max_length and the stride of windows for a model that takes sequences of `longest` tokens: by
    default MAX_LENGTH, or `longest` where that is less, and a third of max_length. Errors: ValueError for
    sizes that cannot be, and for windows that are too long for the model."""
    max_length = min(MAX_LENGTH, longest) if max_length is None else checked_int("max_length", max_length, 1)
    if max_length > longest:
        raise ValueError(
            f"windows of {max_length} tokens are too long: the model takes sequences of {longest}"
        )
    stride = max_length // _STRIDE_PARTS if stride is None else checked_int("stride", stride, 0)
    if stride >= max_length:
        raise ValueError(f"stride {stride} must be at least 0 and less than max_length {max_length}")
    return max_length, stride


def check_pairs(questions: Sequence[Any], contexts: Sequence[Any]) -> None:
    """ValueError unless there are as many contexts as questions."""
    if len(questions) != len(contexts):
        raise ValueError(f"{len(questions)} questions, but {len(contexts)} contexts: one context a question")


def check_cut(tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int) -> None:
    """The errors that `windows` raises for these whatever the questions: ValueError for sizes that cannot be,
    TypeError for a tokenizer that does not know offsets."""
    window_sizes(max_length, max_length, stride)
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed")


def cut_each(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int,
    indices: Sequence[int],
) -> Iterator[Iterator[Window]]:
    """The windows of each question, made one by one as they are iterated over; see `windows`. indices: the
    `question_index` of each question.

    A context longer than PIECE characters is tokenised piece by piece, each of which ends before whitespace
    (where it has any), so that its tokens are those of the whole. The inner iterator raises RefusedQuestion.
    """
    ends = [_piece_end(context, 0) for context in contexts]
    pieces = [context[:end] for context, end in zip(contexts, ends, strict=True)]
    encodings = _encodings(tokenizer, questions, pieces) if questions else ()
    for index, question, context, end, encoding in zip(
        indices, questions, contexts, ends, encodings, strict=True
    ):
        whole = _whole_window(tokenizer, encoding, index)
        while whole.context_range == (0, 0) and end < len(context):
            begin, end = end, _piece_end(context, end)
            (encoding,) = _encodings(tokenizer, [question], [context[begin:end]])
            whole = _whole_window(tokenizer, encoding, index, begin)
        more = _tokens_after(tokenizer, context, end) if end < len(context) else None
        yield _cut(whole, more, max_length, stride)


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


def _encodings(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], contexts: Sequence[str]
) -> Sequence[Any]:
    """The tokenizer's encoding of each question with its context, whole and unpadded."""
    questions = [question.strip() for question in questions]
    pair = (questions, contexts) if _question_first(tokenizer) else (contexts, questions)
    # The cut is made here, because the tokenizer's own fails without naming the question. verbose would warn
    # of sequences that are longer than the model takes, as they are before the cut.
    encoded = tokenizer(*map(list, pair), truncation=False, padding=False, verbose=False)
    return encoded.encodings or ()


def _question_first(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer.padding_side == "right"


def _piece_end(context: str, begin: int) -> int:
    """The end of the piece of context that begins here: before whitespace, if possible the first after a
    word."""
    limit = begin + PIECE
    if limit >= len(context):
        return len(context)
    for after_word in (True, False):
        for end in range(limit, begin, -1):
            if context[end].isspace() and not (after_word and context[end - 1].isspace()):
                return end
    return limit


def _tokens_after(tokenizer: PreTrainedTokenizerFast, context: str, begin: int) -> Iterator[Tokens]:
    """The tokens of the context from this character on, piece by piece."""
    while begin < len(context):
        end = _piece_end(context, begin)
        piece = [context[begin:end]]
        encoded = tokenizer(piece, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        assert encoded.encodings is not None
        encoding = encoded.encodings[0]
        yield np.array(encoding.ids, dtype=np.int32), _offsets(encoding) + np.int32(begin)
        begin = end


def _offsets(encoding: Any) -> Int32Array:
    return np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)


def _whole_window(
    tokenizer: PreTrainedTokenizerFast, encoding: Any, question_index: int, begin: int = 0
) -> Window:
    """A question with all of a piece of context, which begins at the character `begin`."""
    context_sequence = int(_question_first(tokenizer))
    ids = np.array(encoding.ids, dtype=np.int32)
    added = -1  # the sequence of what the tokenizer added
    sequences = np.array([added if number is None else number for number in encoding.sequence_ids])
    cls = np.flatnonzero((sequences == added) & (ids == tokenizer.cls_token_id))
    if not len(cls):
        raise ValueError(f"{type(tokenizer).__name__} adds no CLS token, whose logits would say 'no answer'")
    offsets = _offsets(encoding) + np.int32(begin)
    offsets[sequences != context_sequence] = -1
    has_types = "token_type_ids" in tokenizer.model_input_names
    types = np.array(encoding.type_ids, dtype=np.int32) if has_types else np.zeros_like(ids)
    return Window(question_index, ids, types, offsets, int(cls[0]))


def _cut(whole: Window, more: Iterator[Tokens] | None, max_length: int, stride: int) -> Iterator[Window]:
    """The windows of a question. whole: the question with the first piece of its context; more: the tokens of
    the other pieces, of which one is held at a time."""
    if more is None and len(whole) <= max_length:
        yield whole
        return
    first, last = whole.context_range
    room = max_length - (len(whole) - (last - first))
    ids, offsets = whole.input_ids[first:last], whole.offsets[first:last]
    for more_ids, more_offsets in itertools.chain([(ids[:0], offsets[:0])], more or ()):
        ids, offsets = np.concatenate([ids, more_ids]), np.concatenate([offsets, more_offsets])
        if len(ids) > room and room <= stride:
            taken = max_length - room
            raise RefusedQuestion(whole.question_index, _no_room(taken, len(ids), max_length, stride))
        while len(ids) > room:
            yield _with_context(whole, ids[:room], offsets[:room])
            ids, offsets = ids[room - stride :], offsets[room - stride :]
    yield _with_context(whole, ids, offsets)


def _no_room(taken: int, context: int, max_length: int, stride: int) -> str:
    """Why a question that takes so many tokens, and its context of at least so many, cannot be cut."""
    room = max(max_length - taken, 0)
    if room and 2 * taken <= max_length:  # the question is short: it is not to blame
        return (
            f"cannot be cut: the stride of {stride} is too large; beside the question, which takes {taken} "
            f"of max_length {max_length} tokens with special tokens, {room} are left for its context of "
            f"{context}, and neighbouring windows can share {room - 1} of them at most"
        )
    return (
        f"is too long: with special tokens it takes {taken} of max_length {max_length} tokens; {room} are "
        f"left for its context of {context}, and windows that share {stride} (the stride) need at least "
        f"{stride + 1}"
    )


def _with_context(whole: Window, ids: Int32Array, offsets: Int32Array) -> Window:
    """The same window with other tokens in the place of the context's."""
    first, last = whole.context_range

    def put(values: Int32Array, context: Int32Array) -> Int32Array:
        return np.concatenate([values[:first], context, values[last:]])

    types = np.full(len(ids), whole.token_type_ids[first] if last > first else 0, dtype=np.int32)
    moved = len(ids) - (last - first) if whole.cls_index >= last else 0
    return Window(
        whole.question_index,
        put(whole.input_ids, ids),
        put(whole.token_type_ids, types),
        put(whole.offsets, offsets),
        whole.cls_index + moved,
    )


def span_tokens(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of the context's characters [start, end); None where the window does not
    hold them all."""
    first, last = window.context_range
    if first == last:
        return None
    starts, ends = window.offsets[first:last].T
    if start < starts[0] or end > ends[-1]:
        return None
    # Tokens that share a character with the span: several tokens may be parts of one character.
    inside = np.flatnonzero((ends > start) & (starts < end))
    return (first + int(inside[0]), first + int(inside[-1])) if len(inside) else None
