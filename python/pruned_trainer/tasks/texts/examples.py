"""Rows with texts, and with a label or a score where they have one: read, checked, and split."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pruned_ops.files import TextFile, shown
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping
from pruned_trainer.tasks.output_kinds import IGNORED
from pruned_trainer.tasks.sources import READ, find, read_rows, suffix_of
from pruned_trainer.tasks.task import HELD_OUT


@dataclass(frozen=True)
class Example:
    """A row. texts: one, or the two of a pair; of a sentence in words, the words. where: its place, for
    errors. label: as the source has it: a name, a number, a list of them for words; None where there is none.
    group: the query that it belongs to, where texts are ranked; by default its first text. unit: what rows
    that are held out have in common; by default their first text."""

    texts: tuple[str, ...]
    where: str
    label: Any = None
    group: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Examples:
    """The rows of a source. names: those that the source itself gives to labels that are whole numbers."""

    where: str
    rows: tuple[Example, ...]
    is_labelled: bool = True
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, seed: int) -> tuple[Examples, Examples]:
        """(training, held out): a share of HELD_OUT of the units, drawn with the seed, so that none is on
        both sides. Errors: FormatError where nothing would be left to train on."""
        places = [row.unit or row.texts[0] for row in self.rows]
        units = list(dict.fromkeys(places))
        random.Random(seed).shuffle(units)
        chosen = set(units[: max(1, round(HELD_OUT * len(units)))])
        pairs = list(zip(places, self.rows, strict=True))
        held_out = tuple(row for unit, row in pairs if unit in chosen)
        train = tuple(row for unit, row in pairs if unit not in chosen)
        if not train:
            raise FormatError(
                f"{self.where}: {len(self)} rows are too few to hold some out: give a validation file"
            )
        of_held_out = f"{self.where}, held out for want of a validation file"
        return replace(self, rows=train), replace(self, where=of_held_out, rows=held_out)


def read_labelled(
    source: str | Path,
    split: str,
    columns: Sequence[str],
    label: str,
    read_label: Any,
    skipped: Skipped | None = None,
) -> Examples:
    """The rows of a source with their labels.

    columns: of the texts. label: the column of the labels. read_label: takes a row's value and its place, and
    returns the label or raises FormatError. skipped: collects the faults of bad rows, which are left out;
    without it the first one is raised. Errors: as for `read_rows`; FormatError that names the place, for
    missing columns with those that there are, and where no row is left.
    """
    table = read_rows(source, split, {*columns, label}, skipped)
    hint = "" if label in table.columns else "; --texts takes texts without labels"
    table.require((*columns, label), hint)
    rows = []
    for where, row in table.placed():
        with skipping(skipped):
            rows.append(
                Example(texts_of(row, columns, where), where, read_label(value_of(row, label, where), where))
            )
    names = tuple(table.names.get(label, ()))
    return some(Examples(table.where, tuple(rows), True, names), skipped)


def read_unlabelled(
    source: str | Path,
    split: str,
    columns: Sequence[str],
    skipped: Skipped | None = None,
    pairs: bool = True,
) -> Examples:
    """The texts of a source: of the columns where its ending is one of READ, or where it is a folder or a hub
    name; of any other file, one text a line, without empty lines. pairs: whether the texts of several columns
    belong together, and so cannot be lines. Errors: as for `read_labelled`."""
    name, _ = find(source)
    if Path(name).is_file() and suffix_of(name) not in READ:
        if pairs and len(columns) > 1:
            raise FormatError(
                f"{source}: pairs are read from {', '.join(READ)} with the columns {', '.join(columns)}, not "
                "from lines of text"
            )
        rows = tuple(_lines(Path(name)))
        return some(Examples(str(source), rows, False), skipped)
    table = read_rows(source, split, columns, skipped)
    table.require(columns)
    read = []
    for where, row in table.placed():
        with skipping(skipped):
            read.append(Example(texts_of(row, columns, where), where))
    return some(Examples(table.where, tuple(read), False), skipped)


def _lines(path: Path) -> Iterator[Example]:
    try:
        for number, (line,) in TextFile(path).lines():
            yield Example((line.strip(),), f"{path}, line {number}")
    except ValueError as error:
        raise FormatError(str(error)) from None


def some(examples: Examples, skipped: Skipped | None) -> Examples:
    """The examples; FormatError where there are none."""
    if not examples.rows:
        left_out = f" ({len(skipped)} were skipped; the first: {skipped.faults[0]})" if skipped else ""
        raise FormatError(f"{examples.where}: no rows at all{left_out}")
    return examples


def value_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The row's value, of whatever kind; FormatError where it has none."""
    if column not in row:
        raise FormatError(f"{where}: no {column!r}")
    return row[column]


def texts_of(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The row's texts; FormatError for one that is none, or is empty."""
    texts = tuple(get_field(row, column, str, where) for column in columns)
    for column, text in zip(columns, texts, strict=True):
        if not text.strip():
            raise FormatError(f"{where}: {column!r} is empty")
    return texts


def read_class(value: Any, where: str) -> str | int:
    """A class: a name, a whole number, which 2.0 is as well, or false or true; FormatError for anything else,
    for an empty name, and for the number that stands for no label."""
    if isinstance(value, float) and value.is_integer():  # as a column is read that lacks some labels
        value = int(value)
    if value == IGNORED and isinstance(value, int):
        raise FormatError(f"{where}: the label is {IGNORED}, which stands for none")
    if not isinstance(value, str | int):
        raise FormatError(f"{where}: the label is {shown(value)}; a name or a whole number is needed")
    if isinstance(value, str) and not value.strip():
        raise FormatError(f"{where}: the label is empty")
    return value


def read_score(value: Any, where: str) -> float:
    """A finite number, or a text that is one; FormatError for anything else."""
    try:
        score = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        score = None
    if score is None or not math.isfinite(score):
        raise FormatError(f"{where}: the score is {shown(value)}; a finite number is needed")
    return score
