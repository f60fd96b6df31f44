"""Windows that nobody labelled: a question with another window's text, which only a teacher can judge."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from pruned_trainer.tasks.windows import Features, Windows, lengths_of


class CrossPairs(Windows):
    """Pairs of a window's first text (the question) and another window's second text, without labels.

    features: windows of two texts, of which the second may be empty. share: so many pairs are made for each
    window. separator: the id of the token between the two texts and at the end. max_length: the tokens of a
    pair; a longer second text is cut. The seed draws which texts go together. They are put together when they
    are asked for, so that features on disk stay there. Errors: ValueError where no window has a second text.
    """

    def __init__(
        self, features: Features, share: float, separator: int, max_length: int, seed: int = 0
    ) -> None:
        rng, size = random.Random(seed), len(features)
        self.features, self.separator, self.max_length = features, separator, max_length
        number = round(share * size)
        self.first = [row for _ in range(-(-number // size)) for row in rng.sample(range(size), size)][
            :number
        ]
        self.second = [rng.randrange(size) for _ in self.first]
        lengths = lengths_of(features)
        # Nearly: the length of the window that the longer of the two texts comes from.
        self.lengths = [lengths[row] for row in self.second]
        ids = (feature["input_ids"] for feature in features)
        if number and all(_question(window_ids, separator) == len(window_ids) for window_ids in ids):
            raise ValueError(
                "the windows hold one text each: pairs are made of a question and a text (squad, "
                "natural_questions, pair-classification, reranking)"
            )

    def __len__(self) -> int:
        return len(self.first)

    def at(self, position: int) -> dict[str, Any]:
        first, second = (self.features[rows[position]] for rows in (self.first, self.second))
        question = slice(0, _question(first["input_ids"], self.separator))
        text = slice(_question(second["input_ids"], self.separator), None)
        pair: dict[str, Any] = {}
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            if name in first:
                whole = np.concatenate([first[name][question], second[name][text]])
                # The last token of a window that is cut is the separator all the same.
                kept = whole[: self.max_length].copy()
                kept[-1] = whole[-1]
                pair[name] = kept
        return pair


def _question(ids: Any, separator: int) -> int:
    """The number of tokens of the first text, with the separators that follow it (RoBERTa has two): all of
    them where no second text follows."""
    separators = np.flatnonzero(np.asarray(ids) == separator)
    end = int(separators[0]) + 1 if len(separators) else len(ids)
    while end < len(ids) and ids[end] == separator:
        end += 1
    return end
