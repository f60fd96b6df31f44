"""Training windows as sequences, in memory or on disk alike: their lengths, and a part of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def lengths_of(features: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of each window: a sequence's own `lengths`, where it has them (windows on disk are then not
    read)."""
    known = getattr(features, "lengths", None)
    return list(known) if known is not None else [len(one["input_ids"]) for one in features]


class Numbered(Sequence[dict[str, Any]]):
    """Windows with their place among all of them, as "number"."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self._features, self.lengths = features, lengths_of(features)

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return {**self._features[number], "number": range(len(self))[number]}


class Part(Sequence[dict[str, Any]]):
    """A share of some windows, drawn with a seed, in their order; at least one of them."""

    def __init__(self, features: Sequence[dict[str, Any]], fraction: float, seed: int) -> None:
        number = max(1, round(fraction * len(features)))
        self._features = features
        self._rows = sorted(random.Random(seed).sample(range(len(features)), number))
        lengths = lengths_of(features)
        self.lengths = [lengths[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._features[row] for row in self._rows[number]]
        return self._features[self._rows[number]]
