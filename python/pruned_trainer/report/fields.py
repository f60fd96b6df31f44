"""Fields of report.json and sweep.json: read, checked, and formatted for people.

A report of an earlier version may lack any field; a field that is there must have its type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruned_ops import files
from pruned_trainer.tasks.natural_questions.task import SCORES as NQ_SCORES
from pruned_trainer.tasks.squad.metrics import SCORES as SQUAD_SCORES
from pruned_trainer.tasks.task import Score

# The lines of the result tables of reports that do not list them: earlier versions had these tasks alone.
_EARLIER = {"squad": SQUAD_SCORES, "natural_questions": NQ_SCORES[:2]}


@dataclass(frozen=True)
class Fields:
    """A JSON object of a report.

    A field that is absent or null reads as None, or as an empty list or object. A field of another type than
    its reader returns is a ValueError that names file and field. place: where in the file this object is.
    """

    file: Path
    values: Mapping[str, Any]
    place: str = ""

    @classmethod
    def read(cls, file: Path) -> Fields:
        """The object that a file holds; ValueError where it holds something else."""
        values = files.read_json(file)
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
        """A whole number from 0 to 2**31 - 1, such as a number of heads."""
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
        """The object of this name; an empty one where it is absent."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(self.file, value, f"{self.place}{name}.")

    def parts(self, name: str) -> list[Fields]:
        """The objects in the list of this name; an empty list where it is absent."""
        objects = []
        for number, value in enumerate(self._list(name)):
            if not isinstance(value, dict):
                raise self._wrong(f"{name}[{number}]", value, "an object")
            objects.append(Fields(self.file, value, f"{self.place}{name}[{number}]."))
        return objects

    def interval(self, name: str) -> tuple[float, float] | None:
        """The pair of numbers (low, high) of this name."""
        ends = [
            Fields(self.file, {"": value}, f"{self.place}{name}[{number}]").number("")
            for number, value in enumerate(self._list(name))
        ]
        if not ends:
            return None
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            raise self._wrong(name, ends, "a pair of numbers")
        return ends[0], ends[1]

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value or []

    def _wrong(self, name: str, value: Any, needed: str) -> ValueError:
        return ValueError(f"{self.file}: {self.place}{name} is {files.shown(value)}; {needed} is needed")


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number as a table's cell; "-" where there is none."""
    return "-" if value is None else form.format(value / scale)


def task_of(report: Fields) -> str:
    """The report's task; SQuAD where it names none, as reports did before there were several tasks."""
    return report.text("task") or "squad"


def scores_of(report: Fields) -> tuple[Score, ...]:
    """The lines of the report's result table; ValueError where it lists none and is of no task that had no
    need to."""
    listed = report.parts("score_lines")
    if not listed:
        task = task_of(report)
        if task not in _EARLIER:
            raise ValueError(
                f"{report.file}: task is {task!r}; one of {', '.join(_EARLIER)} is needed without score_lines"
            )
        return _EARLIER[task]
    return tuple(
        Score(line.text("key") or "", line.text("label") or "", line.values.get("has_loss") is not False)
        for line in listed
    )


def noun_of(report: Fields) -> str:
    """What the examples are called that the report's models were judged on."""
    return report.part("evaluated_on").text("noun") or "questions"


def shapes(report: Fields) -> list[tuple[int, int]]:
    """The (heads, FFN width) that each layer keeps, without layers of which one number is missing."""
    return _counts(report.parts("shape"))


def dense_shapes(report: Fields) -> list[tuple[int, int]]:
    """The (heads, FFN width) of each layer of the dense model; all as wide as the widest one in reports of
    earlier versions, which have that alone. Empty where the report has neither."""
    dense = report.part("dense_shape")
    return _counts(dense.parts("layers")) or _counts([dense]) * len(shapes(report))


def _counts(layers: Iterable[Fields]) -> list[tuple[int, int]]:
    counts = [(layer.count("num_heads"), layer.count("ffn_width")) for layer in layers]
    return [(heads, ffn) for heads, ffn in counts if heads is not None and ffn is not None]


def change(report: Fields, score: Score) -> tuple[float, float, float] | None:
    """(points gained, low, high) of a score, with its 95% interval; None where the report lacks either."""
    loss, ends = report.number(f"{score.key}_loss"), report.interval(f"{score.key}_loss_interval")
    return None if loss is None or ends is None else (-loss, -ends[1], -ends[0])


def change_text(report: Fields, score: Score) -> str:
    """`change` as a table's cell; the points alone where there is no interval."""
    gained = change(report, score)
    if gained is not None:
        return "{:+z.2f} ({:+z.2f} to {:+z.2f})".format(*gained)
    loss = report.number(f"{score.key}_loss")
    return "-" if loss is None else f"{-loss:+z.2f}"
