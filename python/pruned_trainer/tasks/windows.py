"""Training windows: rows of ids and labels under the models' argument names, as sequences that may lie in
memory or on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

# Training windows: ids and labels by the models' argument names.
Features = Sequence[dict[str, Any]]


def lengths_of(features: Features) -> list[int]:
    """Tokens of each window, from the sequence's own `lengths` where it has them (windows on disk are then
    not read)."""
    known = getattr(features, "lengths", None)
    return list(known) if known is not None else [len(feature["input_ids"]) for feature in features]


class Windows(Sequence[dict[str, Any]]):
    """Windows that are made when they are asked for: subclasses say their number and make the one at a
    position. A slice is a list of windows, and negative numbers count from the end."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, position: int) -> dict[str, Any]:
        """The window at 0 <= position < len(self)."""

    def __getitem__(self, number: Any) -> Any:
        positions = range(len(self))[number]
        return self.at(positions) if isinstance(positions, int) else [self.at(i) for i in positions]
