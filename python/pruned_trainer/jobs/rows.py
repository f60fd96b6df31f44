"""The data of a caller's own: rows with the columns that a model takes, and the batches made of them;
`row_checks` finds what is wrong with them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pruned_trainer.tasks.windows import Windows
from pruned_trainer.training.batches import GROUP, Collate, pad_batch

# The names that data sets give their labels, beside the one of the models' argument.
_LABEL_NAMES = ("label", "label_ids")


class Rows(Windows):
    """The rows of a dataset, or of any iterable of dictionaries, under the models' argument names.

    name: what the dataset is called in messages. columns: those that are kept, None for all. renames: whether
    a data set's own name of the labels becomes the models'; a collator of the caller's does that itself.
    Errors: ValueError for data without rows, or with a row that is no dictionary.
    """

    def __init__(
        self, data: Iterable[Any], name: str, columns: Collection[str] | None = None, renames: bool = True
    ) -> None:
        is_table = hasattr(data, "to_dict") and hasattr(data, "columns")  # pandas' and its like
        if is_table or isinstance(data, (str, bytes, Mapping)) or not _is_iterable(data):
            remedy = ' (to_dict("records") makes them)' if is_table else ""
            raise ValueError(
                f"the {name} is a {type(data).__name__}: rows that are dictionaries are needed{remedy}"
            )
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            data = list(data)
        self.data: Any = data
        self.name, self.columns, self.renames, self.lengths = name, columns, renames, list[int]()
        if len(self) == 0:
            raise ValueError(f"the {name} has no rows")

    def __len__(self) -> int:
        return len(self.data)

    def at(self, position: int) -> dict[str, Any]:
        row = self.data[position]
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {position} of the {self.name} is a {type(row).__name__}: a dictionary is needed"
            )
        named = {name: value for name, value in row.items() if self._keeps(name)}
        label_name = _label_name(named)
        if self.renames and label_name in _LABEL_NAMES:
            named["labels"] = named[label_name]
        return {k: v for k, v in named.items() if k not in _LABEL_NAMES} if self.renames else named

    def _keeps(self, column: str) -> bool:
        return self.columns is None or column in self.columns or column in _LABEL_NAMES

    def part(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers alone."""
        return Rows([self.data[number] for number in numbers], self.name, self.columns, self.renames)

    def digest(self) -> str:
        """The SHA-256 of the rows' names and values; an object that is no plain value counts by its class."""
        content = hashlib.sha256()
        for row in self:
            content.update(repr(sorted(_plain(row).items())).encode(errors="surrogatepass"))
        return content.hexdigest()

    @property
    def left_out(self) -> list[str]:
        """The columns of the first row that are not kept."""
        return [name for name in self.data[0] if not self._keeps(name)]


def _label_name(row: Mapping[str, Any]) -> str | None:
    """What a row calls its labels: as the models do, where it has more than one such name."""
    return next((name for name in ("labels", *_LABEL_NAMES) if name in row), None)


def label_of(row: Mapping[str, Any], name: str) -> Any:
    """The labels of a row, by the models' name for them; None where it has none."""
    column = _label_name(row) if name == "labels" else name
    return None if column is None else row.get(column)


def _plain(value: Any) -> Any:
    """A value in Python's own types, which say the same in every process."""
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__  # tensors, arrays


def _is_iterable(data: Any) -> bool:
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


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
        collated = collate(list(features))
        if not isinstance(collated, Mapping):
            raise TypeError(f"it gives a {type(collated).__name__}, and a dictionary of tensors is needed")
        return {name: value for name, value in collated.items() if isinstance(value, Tensor)}

    return batch
