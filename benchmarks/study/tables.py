"""Numbers of the study's rows, and of the paper's, as cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from study.records import Row, over_seeds

# BERT-large on SQuAD 2.0 dev in the paper, by row: % heads and % FFN removed, F1 before and after retraining,
# speed-up on a K80 at batch 1. None: not given, or its column not certain.
PAPERS: dict[str, tuple[Any, ...]] = {
    "a": (0.0, 0.0, None, 84.6, 1.0),
    "b": (44.3, 0.0, None, None, 1.19),
    "c": (0.0, 48.1, None, None, 1.29),
    "d": (44.0, 48.1, 82.6, 83.7, 1.63),
    "e": (53.1, 64.9, 80.9, 83.2, 1.95),
    "f": (57.6, 73.7, 76.8, 82.4, 2.24),
    "g": (60.1, 78.4, 67.8, 81.5, 2.40),
}


def mean(rows: Sequence[Row], value: str, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A number without its interval; - where none has it."""
    found = over_seeds(rows, value)
    return form.format(found[0] * scale) if found else "-"


def change(rows: Sequence[Row], loss: str) -> str:
    """What was won (+) or lost (-) of the dense model's score, with its interval."""
    found = over_seeds(rows, loss)
    if found is None:
        return "-"
    value, low, high = found
    if low == high == 0:  # the dense model itself
        return "-"
    return f"{-value:+.2f} ({-high:+.2f} to {-low:+.2f})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    marks = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *lines)] + [""]


def papers(letter: str) -> list[str]:
    """The paper's row: what it removed, its F1 before and after retraining."""
    heads, ffn, before, after, _ = PAPERS[letter]
    shown = ["-" if value is None else f"{value:.1f}" for value in (before, after)]
    return [f"{heads:.1f}%, {ffn:.1f}%", ", ".join(shown)]


def machine_of(row: Row) -> str:
    """The accelerator that a row names, else the processor with its threads."""
    if row.get("machine_accelerator"):
        return str(row["machine_accelerator"])
    threads = row["machine_threads"]
    return f"{row['machine_processor']}, {threads} thread{'' if threads == 1 else 's'}"
