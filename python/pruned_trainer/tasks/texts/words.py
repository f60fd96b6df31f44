"""Sentences in words, as a tokenizer cuts them: which token each word begins with, in windows that together
hold all of a sentence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.texts.encoding import Encoded, encoded


@dataclass(frozen=True, eq=False)
class Sentence(Encoded):
    """A window of a sentence. sentence: its number. words, tokens: (words,) the words that begin here, and
    the token that each begins with; every word that has a token at all begins in one window of its
    sentence."""

    sentence: int
    words: NDArray[np.int64]
    tokens: NDArray[np.int64]


def encode_words(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sequence[str]], max_length: int, stride: int
) -> list[Sentence]:
    """Each sentence's words, joined by spaces, in windows of at most max_length tokens that share `stride`,
    or half of their words' tokens where that is less: a stride as long as a window would make one for each
    token.

    A word that lies in several windows counts in the one where it is farthest from both ends. A word of which
    the tokenizer leaves nothing (one of zero-width characters alone) begins nowhere, and the words after it
    keep their numbers, because tokens are found by their place in the text. Errors: FormatError where
    max_length leaves no room.
    """
    windows: list[Sentence] = []
    room = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if room < 1:
        raise FormatError(f"max_length {max_length} leaves no room for a word beside the special tokens")
    for number, words in enumerate(sentences):
        rows = tokenizer(
            " ".join(words), truncation=True, max_length=max_length, stride=min(stride, room // 2),
            padding=False, return_overflowing_tokens=True, return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )  # fmt: skip
        windows += _windows(rows, words, number)
    return windows


def _windows(rows: Any, words: Sequence[str], sentence: int) -> list[Sentence]:
    first_tokens = [_first_tokens(rows, row, words) for row in range(len(rows["input_ids"]))]
    # A window may begin inside a word: the word begins where its first token is, over all windows.
    begins: dict[int, int] = {}
    for firsts in first_tokens:
        for word, (start, _) in firsts.items():
            begins[word] = min(start, begins.get(word, start))
    homes: dict[int, tuple[int, int]] = {}  # each word's window, with the tokens that it sees on both sides
    for row, firsts in enumerate(first_tokens):
        for word, (start, token) in firsts.items():
            margin = min(token, len(rows["input_ids"][row]) - 1 - token)
            if start == begins[word] and (word not in homes or margin > homes[word][0]):
                homes[word] = margin, row
    windows = []
    for row, firsts in enumerate(first_tokens):
        own_words = [(word, token) for word, (_, token) in firsts.items() if homes[word][1] == row]
        window, pairs = encoded(rows, row), np.array(own_words, np.int64).reshape(-1, 2)
        windows.append(Sentence(window.input_ids, window.token_type_ids, sentence, pairs[:, 0], pairs[:, 1]))
    return windows


def _first_tokens(rows: Any, row: int, words: Sequence[str]) -> dict[int, tuple[int, int]]:
    """The first token that a window has of each word: number of the word -> (place in the text, token).

    Offsets may keep the space before a word, so the first character that is no space decides."""
    text = " ".join(words)
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    firsts: dict[int, tuple[int, int]] = {}
    special = rows["special_tokens_mask"][row]
    for token, (start, end) in enumerate(rows["offset_mapping"][row]):
        while start < end and text[start].isspace():
            start += 1
        if start < end and not special[token]:
            firsts.setdefault(bisect_right(starts, start) - 1, (start, token))
    return firsts
