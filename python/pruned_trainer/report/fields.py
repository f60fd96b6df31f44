"""Reading report.json and sweep.json as they are: fields of any version may be missing, none may be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fields:
    """A JSON object of a report. What is absent or null is None, or empty; what has another type than is
    asked for is a ValueError that names file and field."""

    file: Path
    values: Mapping[str, Any]
    place: str = ""

    @classmethod
    def read(cls, file: Path) -> Fields:
        """A file's one object; ValueError where it holds something else."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}; a JSON object is needed")
        return cls(file, values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                if math.isfinite(value):
                    return value
            except OverflowError:  # an integer beyond every float
                pass
        raise self._wrong(name, value, "a finite number")

    def count(self, name: str) -> int | None:
        """How many of something a model has: a whole number, of at most 31 bits."""
        value = self.number(name)
        if value is not None and (value != int(value) or not 0 <= value < 2**31):
            raise self._wrong(name, value, "a count")
        return None if value is None else int(value)

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def part(self, name: str) -> Fields:
        """The object of this name; an empty one where there is none."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(self.file, value, f"{self.place}{name}.")

    def parts(self, name: str) -> list[Fields]:
        """The objects of the list of this name; none where there is none."""
        found = []
        for number, value in enumerate(self._list(name)):
            if not isinstance(value, dict):
                raise self._wrong(f"{name}[{number}]", value, "an object")
            found.append(Fields(self.file, value, f"{self.place}{name}[{number}]."))
        return found

    def interval(self, name: str) -> tuple[float, float] | None:
        """(low, high)."""
        ends = [self._sub(name, number).number("") for number in range(len(self._list(name)))]
        if not ends:
            return None
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            raise self._wrong(name, ends, "a pair of numbers")
        return ends[0], ends[1]

    def _sub(self, name: str, number: int) -> Fields:
        return Fields(self.file, {"": self.values[name][number]}, f"{self.place}{name}[{number}]")

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value or []

    def _wrong(self, name: str, value: Any, needed: str) -> ValueError:
        return ValueError(f"{self.file}: {self.place}{name} is {value!r:.60}; {needed} is needed")
