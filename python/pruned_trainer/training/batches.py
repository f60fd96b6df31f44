"""Training windows as sequences, in memory or on disk alike: their lengths, and a part of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices


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


def pad_batch(features: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Collate features of unequal length: id lists right-padded to the longest (batch, seqlen), positions
    (batch,)."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {}
    for name, first in features[0].items():
        if not hasattr(first, "__len__"):
            batch[name] = torch.tensor([feature[name] for feature in features])
            continue
        fill = pad_token_id if name == "input_ids" else 0
        padded = torch.full((len(features), longest), fill, dtype=torch.long)
        for row, feature in enumerate(features):
            padded[row, : len(feature[name])] = torch.as_tensor(feature[name])
        batch[name] = padded
    return batch


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Indices in which each `batch_size` consecutive ones are of like lengths, in an order that depends on
    seed and epoch alone: equal on every process, and after a resumed run. epoch: asked at each start, because
    loaders that skip what a resumed run has seen pass no epoch on.

    Full batches only (other examples are left out in each epoch), so that processes share each evenly; a data
    set smaller than a batch is one batch.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int] = lambda: 0
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        number = len(self.lengths)
        return number - number % self.batch_size if number > self.batch_size else number

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        grouped = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # Grouped they fall in length; shuffled, neighbouring steps have nothing in common. The longest stays
        # first, so that too large a batch fails at once.
        starts = range(self.batch_size, len(self), self.batch_size)
        order = [starts[i] for i in torch.randperm(len(starts), generator=generator).tolist()]
        for start in [0, *order]:
            yield from grouped[start : start + self.batch_size]
