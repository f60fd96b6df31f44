"""What the benchmarks' reports share: Markdown tables and figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pruned_ops.files import write_whole


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line; every column but the first is aligned to the right."""
    marks = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *lines)] + [""]


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 thread, 2 threads."""
    return f"{number} {noun}" + "s" * (int(number) != 1)


def save_figure(
    path: Path,
    size: tuple[float, float],
    fill: Callable[[Any], None],
    dpi: int = 130,
    description: str | None = None,
) -> str | None:
    """Write a PNG that `fill` draws on a matplotlib figure of this size in inches; `description` becomes the
    PNG's text of that name. The file is there whole, or as it was before. Returns None, or the reason why no
    figure can be drawn here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no figure: matplotlib cannot be imported ({error})"
    figure = Figure(figsize=size, layout="constrained")
    fill(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, facecolor="white", metadata={"Description": description})
    write_whole(path, drawn.getvalue())
    return None
