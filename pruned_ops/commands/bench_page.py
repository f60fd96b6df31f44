"""What `pruned-ops bench` measured as one HTML file, with nothing outside it."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruned_ops.commands.bench import Benchmark

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,td:nth-child(2),td:nth-child(3){text-align:left}svg{max-width:100%;height:auto}"
)
_COLUMNS = ("model", "runtime", "dtype", "ms p50", "ms p90", "sequences/s", "against Hugging Face")


def write_page(found: Benchmark, path: Path, command: str) -> None:
    """A drawing of the times, the table, and the sentences; the file is there whole, or as it was before."""
    cells = [
        (row.model, row.runtime, row.dtype, f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}",
         f"{row.sequences_per_s:.1f}", f"{row.speedup:.2f}x")
        for row in found.rows
    ]  # fmt: skip
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in cells
    )
    said = "".join(f"<p>{escape(one)}.</p>\n" for one in found.sentences)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pruned-ops bench</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>Milliseconds a batch</h1>\n<p>{escape(found.title)}.</p>\n"
        f"{_drawing(found)}\n<table><tr>{head}</tr>\n{body}</table>\n{said}"
        f"<p><code>{escape(command)}</code></p>\n</body></html>\n"
    )
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _drawing(found: Benchmark) -> str:
    """Bars to p50, whiskers to p90, as SVG."""
    from matplotlib.figure import Figure  # only for those who draw

    rows = found.rows[::-1]
    figure = Figure(figsize=(7.5, 0.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.model}, {row.runtime} {row.dtype}" for row in rows]
    p50 = [row.p50_ms for row in rows]
    above = [max(0.0, row.p90_ms - row.p50_ms) for row in rows]
    colours = ["#1f77b4" if row.backends else "#b0b0b0" for row in rows]
    axes.barh(names, p50, xerr=[[0.0] * len(rows), above], color=colours, capsize=3)
    axes.set_xlabel("milliseconds a batch: bar to p50, whisker to p90")
    axes.grid(axis="x", alpha=0.3)
    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawn, format="svg", metadata=no_metadata)
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue, which has no place inside HTML
