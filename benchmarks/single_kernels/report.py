"""How bench_ops.py's rows are shown: as Markdown, and as a figure of each op's rate beside the ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Row
from presentation import save_figure
from pruned_ops.files import write_whole


def write_tables(out: Path, rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """Write the rows as CSV and Markdown. left_out: the cases that there was no time for, or that failed."""
    harness.write_rows(out, rows)
    write_whole(out.with_suffix(".md"), markdown(rows, left_out))


def write_report(out: Path, rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """The same with a PNG."""
    write_tables(out, rows, left_out)
    reason = draw(rows, out.with_suffix(".png"))
    if reason is not None:
        print(reason)


def of_ceiling(row: Row) -> float:
    """The percentage of the machine's products or of its copying that a row reaches, the larger of both."""
    seconds = row["ms_p50"] / 1000
    products = row["gflop"] / seconds / row["peak_gflops"]
    return 100 * max(products, row["mb"] / 1000 / seconds / row["copy_gb_per_s"])


def markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """A line for each runner; how many times as fast ours is stands beside the others."""
    lines = [
        "Microseconds, p50 (p20-p80). Of the ceiling: of torch's products or of copying, whichever is more.",
        "",
        "| op | layer | sequences | runner | us | of the ceiling | ours is | backend |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        us = [f"{1000 * row[f'ms_p{p}']:.0f}" for p in (50, 20, 80)]
        ours = "" if row["runner"] == "ours" else f"{1 / row['speedup_vs_rival']:.2f}x"
        lengths = row["lengths"].split()
        cells = [
            row["op"],
            row["layer"],
            f"{len(lengths)} of {min(map(int, lengths))} to {max(map(int, lengths))}",
        ]
        cells += [row["runner"], f"{us[0]} ({us[1]}-{us[2]})", f"{of_ceiling(row):.0f}%", ours]
        lines.append(f"| {' | '.join([*cells, row.get('backends', '')])} |")
    lines += ["", *(f"- {reason}" for reason in left_out)]
    first = rows[0]
    machine = first["machine_accelerator"] or first["machine_processor"]
    origin = (
        f"{machine}, {first['dtype']}: {first['peak_gflops']:.0f} GFLOP/s in torch's products, "
        f"{first['copy_gb_per_s']:.0f} GB/s copied. {first['date']}: `{first['command']}`"
    )
    lines += ["", origin]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> str | None:
    """Write the PNG of our rows. Returns the reason where it cannot be drawn."""
    ours = [row for row in rows if row["runner"] == "ours"]
    names = [f"{row['op']}, {row['layer']}, {len(row['lengths'].split())} sequences" for row in ours]

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(range(len(ours)), [of_ceiling(row) for row in ours], color="#1f6f8b")
        axes.set_yticks(range(len(ours)), names, fontsize=6)
        axes.invert_yaxis()
        axes.axvline(100, color="#9aa7b1")
        axes.set_xlabel("percent of the machine's ceiling (products, or copying), ours", fontsize=8)

    return save_figure(path, (9, 1 + 0.2 * len(ours)), fill)
