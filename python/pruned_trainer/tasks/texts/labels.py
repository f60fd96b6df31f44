"""Names of labels: a model's own, those that a training file brings, and a row's label among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import normalize

from pruned_ops.files import shown
from pruned_trainer.tasks.faults import FormatError

# The names that transformers gives to labels that nobody named.
_DEFAULT = re.compile(r"LABEL_\d+")
_NUMBER = re.compile(r"\d+")


# Labels that are numbers lie below this: a head has a row for each, and more would be ids of something else.
MOST_NUMBERED = 100_000


@dataclass(frozen=True)
class Labels:
    """The names of a model's labels, in the order of its logits."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, config: Any) -> Labels:
        """The names in a model's config."""
        return cls(tuple(str(config.id2label[number]) for number in range(config.num_labels)))

    @classmethod
    def found_in(cls, values: Iterable[Any], names: Sequence[str] = ()) -> Labels:
        """The labels for a new head: the source's own names where it has some; else LABEL_0 and so on where
        all labels are whole numbers, and else their names in alphabetical order."""
        if names:
            return cls(tuple(names))
        distinct = {str(value) for value in values}
        if all(_NUMBER.fullmatch(value) for value in distinct):
            largest = max(map(int, distinct))
            if largest >= MOST_NUMBERED:
                raise ValueError(
                    f"a label is {largest}, and a head has a row for each number up to the largest label: "
                    f"number the {len(distinct)} labels from 0 on"
                )
            return cls(tuple(f"LABEL_{number}" for number in range(largest + 1)))
        return cls(tuple(sorted(distinct)))

    @property
    def are_named(self) -> bool:
        """Whether somebody named them."""
        return not all(_DEFAULT.fullmatch(name) for name in self.names)

    @cached_property
    def are_numbers(self) -> bool:
        """Whether any of the names is a whole number."""
        return any(_NUMBER.fullmatch(name) for name in self.names)

    def to_config(self) -> dict[str, Any]:
        """The config's fields of these labels."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }

    def number(self, value: str | int, where: str, names: Sequence[str] = ()) -> int:
        """The number of a row's label: by the name that the source gives to its number; by its name, which
        may be a number, or false or true in capitals or not; else by the number itself, 0 and 1 of the two.
        Errors: FormatError, with the place, for a label that the model does not have."""
        name = self._truth(value) if isinstance(value, bool) else value
        is_number = isinstance(value, int) or (
            value not in self.names and _NUMBER.fullmatch(value) is not None
        )
        if is_number and names and 0 <= int(value) < len(names):
            name = names[int(value)]
        if str(name) in self.names:
            return self.names.index(str(name))
        # Names of the source that the model does not know are no names of other labels, unless nobody named
        # the model's; and where names are numbers themselves, any other number is none.
        is_place = is_number and not self.are_numbers and not (names and self.are_named)
        if is_place and 0 <= int(value) < len(self.names):
            return int(value)
        listed = ", ".join(map(shown, self.names[:8])) + (", ..." if len(self.names) > 8 else "")
        looks_alike = normalize("NFC", str(name)) in (normalize("NFC", name) for name in self.names)
        why = " (which has the one that looks like it in other Unicode characters)" if looks_alike else ""
        raise FormatError(f"{where}: label {shown(name)} is none of the model's: {listed}{why}")

    def _truth(self, value: bool) -> str | int:
        """What the model calls false or true, by whatever case; the number where it has no such name."""
        return next((name for name in self.names if name.lower() == str(value).lower()), int(value))

    def fit(self, values: Iterable[Any], names: Sequence[str] = ()) -> bool:
        """Whether all of these labels are among the model's, by name."""
        try:
            for value in set(values):
                self.number(value, "", names)
        except FormatError:
            return False
        return True
