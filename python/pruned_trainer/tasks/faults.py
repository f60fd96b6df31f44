"""What is wrong with the files of a task: errors that name the place, and a record of what did not end the
run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pruned_trainer.distributed import is_main

T = TypeVar("T")


class FormatError(ValueError):
    """A file that is not of its task's format; the message names the file and the place in it."""


@dataclass
class Skipped:
    """The faults of the lines and questions that were left out, of which `len` gives the number."""

    faults: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.faults)


@contextmanager
def skipping(skipped: Skipped | None) -> Iterator[None]:
    """Collect a FormatError that is raised inside the block in `skipped`, or let it pass where that is
    None."""
    try:
        yield
    except FormatError as error:
        if skipped is None:
            raise
        skipped.faults.append(str(error))


@dataclass
class DataFaults:
    """What a task left out of its files (skipped) and put right in them (repaired): a sentence for each, once
    however often a file is read."""

    skipped: dict[str, None] = field(default_factory=dict)
    repaired: dict[str, None] = field(default_factory=dict)

    def add(self, skipped: Skipped | None, repaired: Iterable[str] = ()) -> None:
        """Record these, and print how many are new, with the first of them."""
        for record, faults, what in (
            (self.skipped, skipped.faults if skipped else (), "bad lines skipped"),
            (self.repaired, repaired, "answers moved to where their text stands"),
        ):
            new_faults = [fault for fault in dict.fromkeys(faults) if fault not in record]
            number = f"{len(new_faults)} more" if record else f"{len(new_faults)}"
            record.update(dict.fromkeys(new_faults))
            if new_faults and is_main():
                print(f"-- {what}: {number}; the first: {new_faults[0]}", flush=True)

    def to_json(self) -> dict[str, Any]:
        """The numbers, with the first few sentences, as report.json holds them."""
        first = [*list(self.skipped)[:5], *list(self.repaired)[:5]]
        return {"skipped": len(self.skipped), "repaired": len(self.repaired), "first": first}


def get_field(holder: object, key: str, kind: type[T], where: str, default: T | None = None) -> T:
    """holder[key], which must be of this kind (True is no int); `default`, if given, where it is absent.

    FormatError, with `where`, for anything else.
    """
    if not isinstance(holder, dict):
        raise FormatError(f"{where}: an object is needed, not {type(holder).__name__}")
    if key not in holder:
        if default is not None:
            return default
        raise FormatError(f"{where}: no {key!r}")
    value = holder[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{where}: {key!r} has type {type(value).__name__}, not {kind.__name__}")
    return value
