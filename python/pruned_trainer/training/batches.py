"""Batches of training windows: which windows a phase trains on, their order, and their padding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from pruned_trainer.tasks.output_kinds import IGNORED
from pruned_trainer.tasks.windows import Features, Windows, lengths_of

# What an example has for the trainer alone: its number among all of them, and the query that it belongs to
# where scores of one query are compared.
NUMBER, GROUP = "number", "group"
# Batches are padded to a multiple of so many tokens where a CPU trains under bf16 autocast. There oneDNN
# compiles its kernels anew for each length that it has not met lately, which took longer than the steps.
BF16_LENGTHS = 32


class Collate(Protocol):
    """Makes a padded batch of windows, whose length is a multiple of so many tokens where the windows' own
    padding is known; a collator of the caller's makes its batches as long as it does."""

    def __call__(self, features: Any, multiple: int = 1) -> dict[str, Tensor]: ...


def entries(value: Any) -> int | None:
    """How many entries a list, an array or a tensor has; None for a single number."""
    return len(value) if hasattr(value, "__len__") and getattr(value, "ndim", True) else None


class Numbered(Windows):
    """The same windows, each with its position among all of them as NUMBER."""

    def __init__(self, features: Features) -> None:
        self._features, self.lengths = features, lengths_of(features)

    def __len__(self) -> int:
        return len(self._features)

    def at(self, position: int) -> dict[str, Any]:
        return {**self._features[position], NUMBER: position}


class Share(Windows):
    """A fraction of the windows, drawn with a seed and kept in their order; at least one of them."""

    def __init__(self, features: Features, fraction: float, seed: int) -> None:
        number = max(1, round(fraction * len(features)))
        self._features = features
        self._rows = sorted(random.Random(seed).sample(range(len(features)), number))
        lengths = lengths_of(features)
        self.lengths = [lengths[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, position: int) -> dict[str, Any]:
        return self._features[self._rows[position]]


class Both(Windows):
    """The training windows, then unlabelled ones. Each batch of the trainer's is of one kind: `kinds` says
    which (0 or 1) each window is."""

    def __init__(self, windows: Features, *unlabelled: Features) -> None:
        self._parts = (windows, *unlabelled)
        self.lengths = [length for part in self._parts for length in lengths_of(part)]
        self.kinds = [0] * len(windows) + [1] * (len(self.lengths) - len(windows))

    def check_batches(self, size: int) -> None:
        """ValueError unless there is a batch of so many windows of each kind."""
        windows, unlabelled = self.kinds.count(0), self.kinds.count(1)
        if min(windows, unlabelled) < size:
            raise ValueError(
                f"{windows} windows and {unlabelled} unlabelled ones made of them: a batch of {size} of each "
                "is needed (--cross-pairs, --masked-texts, --shuffled-texts, --batch-size)"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, position: int) -> dict[str, Any]:
        for part in self._parts:
            if position < len(part):
                return part[position]
            position -= len(part)
        raise AssertionError("the parts are as long as their lengths")


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Indices of which each `batch_size` consecutive ones are of like lengths.

    Their order depends on seed and epoch alone, so that it is the same on every process and in a resumed run.
    There are only full batches, so that processes share each evenly: some examples are left out, others in
    each epoch. A data set smaller than a batch is one batch. steps: the batches that the training has had,
    asked for at each start, because loaders that skip what a resumed run has seen do not pass the epoch on.
    kinds: a number for each example; those of a batch have the same one, and of each number there must be a
    batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        steps: Callable[[], int] = lambda: 0,
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.steps = list(lengths), batch_size, seed, steps
        kinds = kinds or [0] * len(self.lengths)
        self._kinds = [
            [i for i, row_kind in enumerate(kinds) if row_kind == kind] for kind in sorted({*kinds})
        ]

    def __len__(self) -> int:
        return sum(self._full(len(rows)) for rows in self._kinds)

    @property
    def batches(self) -> int:
        """The batches of an epoch."""
        return sum(max(len(rows) // self.batch_size, 1) for rows in self._kinds)

    def _full(self, number: int) -> int:
        """The examples in full batches of so many, or all where there are fewer than a batch."""
        return number - number % self.batch_size if number > self.batch_size else number

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps() // self.batches
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        batches: list[list[int]] = []
        for rows in self._kinds:
            lengths = [self.lengths[row] for row in rows]
            grouped = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
            for start in range(0, self._full(len(rows)), self.batch_size):
                batches.append([rows[place] for place in grouped[start : start + self.batch_size]])
        # The groups fall in length. They are shuffled, so that neighbouring steps have nothing in common; the
        # longest stays first, so that a batch that is too large for the memory fails at once.
        order = torch.randperm(len(batches) - 1, generator=generator) + 1
        for number in [0, *order.tolist()]:
            yield from batches[number]


def pad_batch(
    features: Features, pad_token_id: int, multiple: int = 1, limit: int | None = None
) -> dict[str, Tensor]:
    """Collate features of unequal length: what has an entry for each token becomes (batch, seqlen),
    right-padded to the longest window (labels with IGNORED); other lists and numbers become (batch, ...).

    multiple: seqlen is rounded up to a multiple of it, but not beyond `limit` tokens (the model's)."""
    longest = max(len(feature["input_ids"]) for feature in features)
    rounded = -(-longest // multiple) * multiple
    longest = max(longest, rounded if limit is None else min(rounded, limit))
    batch = {}
    for name in features[0]:
        values = [torch.as_tensor(feature[name]) for feature in features]
        # Labels that are no whole numbers are of the text, and not of its tokens.
        of_tokens = not (name == "labels" and values[0].is_floating_point()) and all(
            value.dim() == 1 and len(value) == len(feature["input_ids"])
            for value, feature in zip(values, features, strict=True)
        )
        if not of_tokens:
            batch[name] = torch.stack(values)
            continue
        fill = {"input_ids": pad_token_id, "labels": IGNORED}.get(name, 0)
        dtype = values[0].dtype if values[0].is_floating_point() else torch.long
        padded = torch.full((len(features), longest), fill, dtype=dtype)
        for row, value in enumerate(values):
            padded[row, : len(value)] = value
        batch[name] = padded
    return batch
