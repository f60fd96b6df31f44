"""SQuAD's examples from any source: its own JSON, or its columns in files and folders and on the hub.

The columns are id, question, context and answers {text: [...], answer_start: [...]}, and optionally title
and is_impossible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pruned_ops.files import shown
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping
from pruned_trainer.tasks.sources import ARROW, JSON_LINES, SEPARATED, Source, read_rows, suffix_of
from pruned_trainer.tasks.squad.examples import (
    Example,
    Placed,
    SquadFormatError,
    checked_examples,
    load_squad,
    read_question,
)

NEEDED = ("id", "question", "context", "answers")
OPTIONAL = ("title", "is_impossible")


def read_examples(
    source: str | Path,
    default_split: str,
    skipped: Skipped | None = None,
    repaired: list[str] | None = None,
    hint: str = "",
) -> list[Example]:
    """The questions of a file, a folder or a data set of the hub, checked as `load_squad` checks.

    source: .parquet, .jsonl or .arrow with SQuAD's columns, any other file as SQuAD's JSON; a folder or a hub
    name, and default_split, as for `read_rows`. skipped, repaired: as for `parse_squad`. hint: what ends an
    error that a file of rows with other columns gives.

    Errors name the source, split, row (from 0) and question: `read_rows`'s, and SquadFormatError (a
    ValueError) for everything that is not SQuAD.
    """
    suffix = suffix_of(source)
    if Path(source).is_file() and suffix in SEPARATED:
        raise SquadFormatError(
            f"{source}: a {suffix} file has no nested columns, and answers are nested: "
            f"write it as {', '.join((*JSON_LINES[:1], *ARROW))} or SQuAD's .json{hint}"
        )
    if Path(source).is_file() and suffix not in (*JSON_LINES, *ARROW):
        return list(load_squad(source, "raise", skipped, repaired).examples)
    try:
        rows = read_rows(source, default_split, NEEDED + OPTIONAL, skipped)
        rows.require(NEEDED, hint)
    except FormatError as error:
        raise SquadFormatError(str(error)) from None
    placed = _placed_examples(rows, skipped)
    return list(checked_examples(placed, rows.where, skipped, repaired))


def _placed_examples(source: Source, skipped: Skipped | None) -> Iterator[Placed]:
    for where, row in source.placed():
        with skipping(skipped):
            yield _placed_example(row, where)


def _placed_example(row: Mapping[str, Any], where: str) -> Placed:
    # A column has a value in every row: an optional field that is absent is null.
    entry = {key: value for key, value in row.items() if value is not None or key not in OPTIONAL}
    where = f"{where}, question {shown(get_field(entry, 'id', str, where))}"
    answers = get_field(entry, "answers", dict, where)
    texts = get_field(answers, "text", list, f"{where}, answers")
    starts = get_field(answers, "answer_start", list, f"{where}, answers")
    if len(texts) != len(starts):
        raise SquadFormatError(f"{where}: {len(texts)} answers' texts, but {len(starts)} answer_start")
    pairs = zip(texts, starts, strict=True)
    entry["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
    title = get_field(entry, "title", str, where, default="")
    return where, read_question(entry, title, get_field(entry, "context", str, where), where)
