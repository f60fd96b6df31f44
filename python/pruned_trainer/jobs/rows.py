"""The data of a caller's own: rows with the columns that a model takes, and what is wrong with them, found
before any training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruned_trainer.tasks.output_kinds import IGNORED, OutputKind
from pruned_trainer.training.batches import GROUP, Collate, pad_batch

# The names that data sets give their labels, beside the one of the models' argument.
_LABEL_NAMES = ("label", "label_ids")
# Rows of which a batch is made to learn their lengths, where only the collator knows them.
_AT_ONCE = 64


class Rows(Sequence[dict[str, Any]]):
    """The rows of a dataset, or of any iterable of dictionaries, under the models' argument names.

    name: what the dataset is called in messages. columns: those that are kept, None for all. Errors:
    ValueError for data without rows, or with a row that is no dictionary.
    """

    def __init__(self, data: Iterable[Any], name: str, columns: Collection[str] | None = None) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, Mapping):
            if isinstance(data, (str, bytes, Mapping)):
                raise ValueError(
                    f"the {name} is a {type(data).__name__}: rows that are dictionaries are needed"
                )
            data = list(data)
        self.data: Any = data
        self.name, self.columns, self.lengths = name, columns, list[int]()
        if len(self) == 0:
            raise ValueError(f"the {name} has no rows")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        row = self.data[number]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} of the {self.name} is a {type(row).__name__}: a dictionary is needed"
            )
        named = {"labels" if name in _LABEL_NAMES else name: value for name, value in row.items()}
        if self.columns is None:
            return named
        return {name: value for name, value in named.items() if name in self.columns}

    def part(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers alone."""
        return Rows([self.data[number] for number in numbers], self.name, self.columns)


def columns_of(model: nn.Module, more: Collection[str] = ()) -> set[str] | None:
    """The columns that a model's forward takes, with `more` and GROUP; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return {*named, *more, "labels", GROUP} if "input_ids" in named else None


def default_collate(pad_token_id: int, limit: int) -> Collate:
    """A collator that pads rows of ids to the longest, and makes the mask where they have none. limit: as for
    `pad_batch`."""

    def collate(features: Any, multiple: int = 1) -> dict[str, Tensor]:
        masked = [
            row if "attention_mask" in row else {**row, "attention_mask": [1] * len(row["input_ids"])}
            for row in features
        ]
        return pad_batch(masked, pad_token_id, multiple, limit)

    return collate


def as_batch(collate: Callable[[Any], Mapping[str, Any]]) -> Collate:
    """The batches of the caller's own collator, as plain dictionaries of tensors."""

    def batch(features: Any, multiple: int = 1) -> dict[str, Tensor]:
        return {name: value for name, value in collate(list(features)).items() if isinstance(value, Tensor)}

    return batch


def check_rows(rows: Rows, collate: Collate, own_collator: bool, specials: Collection[int]) -> None:
    """Read all rows once, and note their lengths in tokens.

    own_collator: whether the caller gave the collator, which may then make ids of other columns. specials:
    ids of tokens that are no text. Errors: ValueError for a missing column, a collator without a mask, and
    an empty text, with the row.
    """
    _check_batch(rows, collate, own_collator)
    if "input_ids" in rows[0]:
        for number, row in enumerate(rows):
            ids = row.get("input_ids")
            if ids is None:
                raise ValueError(f"row {number} of the {rows.name} has no input_ids")
            rows.lengths.append(len(ids))
            _check_not_empty(rows, number, ids, specials)
        return
    for start in range(0, len(rows), _AT_ONCE):
        batch = collate(rows[start : start + _AT_ONCE])
        for place, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            real = ids[mask.bool()]
            rows.lengths.append(len(real))
            _check_not_empty(rows, start + place, real.tolist(), specials)


def _check_batch(rows: Rows, collate: Collate, own_collator: bool) -> None:
    if not own_collator and "input_ids" not in rows[0]:
        has = ", ".join(rows.data[0])
        raise ValueError(
            f"the {rows.name} has no column input_ids (it has {has or 'none'}): tokenise it first, or give a "
            "data_collator that does"
        )
    batch = collate(rows[:2])
    for name in ("input_ids", "attention_mask"):
        if name not in batch:
            raise ValueError(
                f"the data collator gives no {name} (it gives {', '.join(batch) or 'nothing'}): without it "
                "padding cannot be told from text"
            )


def _check_not_empty(rows: Rows, number: int, ids: Any, specials: Collection[int]) -> None:
    if not len(ids) or all(int(token) in specials for token in ids):
        raise ValueError(f"row {number} of the {rows.name} is an empty text: leave it out")


def check_labels(rows: Rows, kind: OutputKind, config: Any) -> None:
    """ValueError for a label that the model's config does not have, with the row."""
    number = getattr(config, "num_labels", None)
    if number is None or kind not in (OutputKind.CLASSES, OutputKind.TOKENS) or "labels" not in rows[0]:
        return
    for place, row in enumerate(rows):
        label = row["labels"]
        values = torch.as_tensor(label) if not isinstance(label, str) else None
        if values is None or values.is_floating_point():
            raise ValueError(
                f"row {place} of the {rows.name} has the label {label!r}: a number from 0 to {number - 1} is "
                "needed"
            )
        wrong = values[(values != IGNORED) & ((values < 0) | (values >= number))]
        if kind is OutputKind.CLASSES and wrong.numel() == 0:
            wrong = values[values == IGNORED]
        if wrong.numel():
            raise ValueError(
                f"row {place} of the {rows.name} has the label {int(wrong.flatten()[0])}, and the model's "
                f"config has {number} labels (0 to {number - 1})"
            )
