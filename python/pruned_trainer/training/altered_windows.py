"""Copies of training windows with words hidden or out of their order, which only a teacher can judge."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruned_trainer.tasks.windows import Features, Windows, lengths_of

# Of the tokens of a text so many are hidden, as in BERT's own pretraining (Devlin et al. 2019).
MASKED = 0.15
# What a model reads of a window; the rest are labels, which an altered text has none of.
READ = ("input_ids", "token_type_ids", "attention_mask")


class AlteredWindows(Windows):
    """Windows whose texts are altered, without labels; as long as the windows that they are made of.

    features: windows of one text or two. share: so many are made for each window. specials: ids of tokens
    that stay where they are, and that bound the texts. mask_token: hides MASKED of the tokens of a text, at
    least one; None shuffles the tokens of each text instead. The seed draws the windows and what happens to
    each: a window that is asked for again is the same. Each window is altered when it is asked for, so that
    features on disk stay there.
    """

    def __init__(
        self,
        features: Features,
        share: float,
        specials: Collection[int],
        mask_token: int | None = None,
        seed: int = 0,
    ) -> None:
        rng, size = random.Random(seed), len(features)
        self.features, self.mask_token, self.seed = features, mask_token, seed
        self.specials = np.array(sorted(specials))
        number = round(share * size)
        rounds = [rng.sample(range(size), size) for _ in range(-(-number // size))]
        self.rows = [row for rows in rounds for row in rows][:number]
        lengths = lengths_of(features)
        self.lengths = [lengths[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> dict[str, Any]:
        window = self.features[self.rows[position]]
        rng = np.random.default_rng((self.seed, position))
        altered = {name: window[name] for name in READ if name in window}
        ids = np.array(altered["input_ids"])
        for text in self._texts(ids):
            if self.mask_token is None:
                ids[text] = rng.permutation(ids[text])
            else:
                ids[rng.choice(text, max(1, round(MASKED * len(text))), replace=False)] = self.mask_token
        return {**altered, "input_ids": ids}

    def _texts(self, ids: NDArray[Any]) -> list[NDArray[Any]]:
        """The places of the tokens of each text."""
        places = np.flatnonzero(~np.isin(ids, self.specials))
        cuts = np.flatnonzero(np.diff(places) > 1) + 1
        return [text for text in np.split(places, cuts) if len(text)]
