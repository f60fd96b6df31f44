"""Numbers of the study's rows as cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from study_records import Row, over_seeds


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
    return f"{-value:+.2f} ({-high:+.2f} to {-low:+.2f})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, numbers to the right."""
    marks = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *lines)] + [""]
