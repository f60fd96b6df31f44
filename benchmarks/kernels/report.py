"""bench_ops.py's rows as Markdown, and as a figure: each op's rate beside the machine's ceilings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(out: Path, rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """Beside the CSV `out`, with its name."""
    out.with_suffix(".md").write_text(markdown(rows, left_out), encoding="utf-8")
    reason = draw(rows, out.with_suffix(".png"))
    if reason is not None:
        print(reason)


def of_ceiling(row: Row) -> float:
    """The larger of its shares of the machine's products and of its copying, in percent."""
    seconds = row["ms_p50"] / 1000
    products = row["gflop"] / seconds / row["peak_gflops"]
    return 100 * max(products, row["mb"] / 1000 / seconds / row["copy_gb_per_s"])


def markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """A line a runner; how many times as fast ours is stands beside the others."""
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
    first = rows[0]
    machine = first["machine_accelerator"] or first["machine_processor"]
    lines += ["", *(f"- {name} is left out: no time was left" for name in left_out)]
    lines += ["", f"{machine}, {first['dtype']}: {first['peak_gflops']:.0f} GFLOP/s in torch's products, "]
    lines[-1] += (
        f"{first['copy_gb_per_s']:.0f} GB/s copied. {first['date']}: `{shlex.join(['python', *sys.argv])}`"
    )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> str | None:
    """The PNG of our rows; why it cannot be drawn, where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return f"no figure: matplotlib cannot be imported ({error})"
    ours = [row for row in rows if row["runner"] == "ours"]
    names = [f"{row['op']}, {row['layer']}, {len(row['lengths'].split())} sequences" for row in ours]
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.2 * len(ours)))
    axis.barh(range(len(ours)), [of_ceiling(row) for row in ours], color="#1f6f8b")
    axis.set_yticks(range(len(ours)), names, fontsize=6)
    axis.invert_yaxis()
    axis.axvline(100, color="#9aa7b1")
    axis.set_xlabel("percent of the machine's ceiling (products, or copying), ours", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return None
