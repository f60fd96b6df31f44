"""How bench_models.py's rows are shown: a table on screen for each workload, Markdown and a figure of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import harness
from harness import Row
from presentation import counted, save_figure
from pruned_ops.files import write_whole
from pruned_ops.measure.timing import Workload

CEILINGS_NOTE = "Of the ceilings: of torch's products, and of copying, which all weights once would take."
COLOURS = {"dense": "#9aa7b1", "pruned": "#1f6f8b"}


def write_report(out: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV, Markdown and PNG."""
    harness.write_rows(out, rows)
    if any("refused" not in row for row in rows):
        write_whole(out.with_suffix(".md"), markdown(rows))
    reason = draw(rows, out.with_suffix(".png"))
    if reason is not None:
        print(reason)


def spread(row: Row) -> str:
    """Milliseconds a batch: the median of the rounds, and their 20th to 80th percentile. A GPU may take less
    than one."""
    digits = 3 if row.get("device") == "cuda" else 1
    middle, low, high = (f"{row[f'ms_p{p}']:.{digits}f}" for p in (50, 20, 80))
    return f"{middle} ({low}-{high})"


def against(row: Row | None) -> str:
    """How many times as fast as the best rival a row is, and the rival's name; empty where there is none."""
    best = row.get("best_rival") if row else None
    return f"{row['speedup_vs_best_rival']:.2f}x {best.rsplit(' ', 1)[0]}" if row and best else ""


def screen_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """One workload's rows."""
    title = (
        f"{workload.name}: {workload.sequences} sequences, {workload.tokens} tokens a round; "
        f"peak: {rows[0]['peak_gflops']:.0f} GFLOP/s, of torch's products"
    )
    table = Table(title=title)
    table.add_column("")
    for column in ("ms/batch p50 (p20-p80)", "sequences/s", "GFLOP/s (of peak)", f"vs {rows[0]['rival']}"):
        table.add_column(column, justify="right")
    table.add_column("ours is, beside the best rival")
    for row in rows:
        table.add_row(
            row["runner"],
            spread(row),
            f"{row['sequences_per_s']:.1f}",
            f"{row['gflops']:.0f} ({row['percent_of_peak']:.0f}%)",
            f"{row['speedup_vs_rival']:.2f}x",
            against(row) if _ours(row) else "",
        )
    return table


def _ours(row: Row) -> bool:
    return row["runtime"] in ("ours", "ours-bfloat16", "ours-int8", "ours-encode-many")


def markdown(rows: Sequence[Row]) -> str:
    """All workloads: a column for each runtime, and how many times as fast as the best rival ours is; then
    the accuracy of the logits in bfloat16 and int8, the runners that were left out, and the machine."""
    timed = [row for row in rows if "refused" not in row]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    cells = {(row["workload"], row["model"], row["runtime"]): row for row in timed}
    ratios = {"ours": f"ours / best {timed[0]['precision']} rival"}
    for dtype in ("bfloat16", "int8"):
        if f"ours-{dtype}" in runtimes:
            ratios[f"ours-{dtype}"] = f"ours-{dtype} / best {dtype} rival"
    narrow = [name for name in ("ours-bfloat16", "ours-int8") if name in runtimes and "ours" in runtimes]
    ceilings = any("percent_of_copy" in row for row in timed)
    columns = ["workload", "model", *runtimes, *ratios.values(), *(f"{name} / ours" for name in narrow)]
    columns += ["ours, pruned against dense", "ours, of the ceilings"] if ceilings else []
    lines = [
        f"Milliseconds {'that one thread computes for ' if timed[0].get('clock') else ''}a batch, "
        "p50 (p20-p80) of the rounds. The last columns say how many times as fast as the fastest rival ours "
        "is (the median of the rounds' ratios; below 1 it loses), and as ours in fp32 (by the medians).",
        *([CEILINGS_NOTE] if ceilings else []),
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    for workload, model in dict.fromkeys((row["workload"], row["model"]) for row in timed):
        measured = [cells.get((workload, model, runtime)) for runtime in runtimes]
        shown = [spread(row) if row else "-" for row in measured]
        shown += [against(cells.get((workload, model, name))) or "-" for name in ratios]
        shown += [_beside(cells, workload, model, name) for name in narrow]
        if ceilings:
            shown += _beside_ceilings(cells.get((workload, model, "ours")))
        lines.append(f"| {' | '.join([workload, model, *shown])} |")
    cosines = {row["runner"]: row["cosine"] for row in timed if row["precision"] in ("bfloat16", "int8")}
    lines += ["", *(f"- {name}: cosine of its logits with hf's {c:.5f}" for name, c in cosines.items())]
    lines += _left_out(rows)
    return "\n".join([*lines, "", *_origin(timed[0], max(row["peak_gflops"] for row in timed))]) + "\n"


def _beside(cells: dict[tuple[Any, Any, Any], Row], workload: str, model: str, name: str) -> str:
    """How many times as fast a runtime of ours is as ours in fp32, by their medians."""
    row, plain = cells.get((workload, model, name)), cells.get((workload, model, "ours"))
    return f"{plain['ms_p50'] / row['ms_p50']:.2f}x" if row and plain else "-"


def _beside_ceilings(row: Row | None) -> list[str]:
    if row is None:
        return ["-", "-"]
    speedup = row.get("speedup_vs_own_dense")  # which may have been left out
    dense = "-" if speedup is None or row["model"] == "dense" else f"{speedup:.2f}x"
    return [dense, f"{row['percent_of_peak']:.0f}%, {row['percent_of_copy']:.0f}%"]


def _left_out(rows: Sequence[Row]) -> list[str]:
    """A line for each runner and reason, with the workloads where it was not every workload."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "refused" in row:
            where.setdefault((row["runner"], row["refused"]), []).append(row["workload"])
    every = {row["workload"] for row in rows}
    lines = []
    for (name, reason), workloads in where.items():
        place = "" if workloads == ["all"] or set(workloads) == every else f" of {', '.join(workloads)}"
        lines.append(f"- {name} is left out{place}: {reason}")
    return lines


def _origin(row: Row, peak: float) -> list[str]:
    """The machine with its peak, the versions, and the command: a line each."""
    versions = [(key[8:], value) for key, value in row.items() if key.startswith("version_") and value]
    return [
        f"Machine: {row['machine_accelerator'] if row['device'] == 'cuda' else row['machine_processor']}, "
        f"{counted(row['machine_threads'], 'thread')}, {row['machine_cpu_capability']}; "
        f"{peak:.0f} GFLOP/s in torch's {row['precision']} products.\n",
        f"Versions: {', '.join(f'{name} {value}' for name, value in versions)}.\n",
        f"{row['date']}, {row['rounds']} rounds: `{row['command']}`",
    ]


def draw(rows: Sequence[Row], path: Path) -> str | None:
    """Write the PNG: a panel of bars for each workload. Returns the reason where nothing is drawn."""
    timed = [row for row in rows if "refused" not in row]
    workloads = list(dict.fromkeys(row["workload"] for row in timed))
    if not workloads:
        return "no figure: nothing was timed"
    most = max(sum(row["workload"] == name for row in timed) for name in workloads)

    def fill(figure: Any) -> None:
        panels = figure.subplots(len(workloads), 1, squeeze=False)[:, 0]
        for axes, name in zip(panels, workloads, strict=True):
            _bars(axes, [row for row in timed if row["workload"] == name])
            axes.set_title(name, fontsize=9, loc="left")
        panels[-1].set_xlabel("milliseconds a batch, median and 20th to 80th percentile", fontsize=8)

    return save_figure(path, (9, len(workloads) * (0.6 + 0.22 * most)), fill)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """A bar for each runner, with its 20th and 80th percentiles."""
    below = [row["ms_p50"] - row["ms_p20"] for row in rows]
    above = [row["ms_p80"] - row["ms_p50"] for row in rows]
    axes.barh(
        [row["runner"] for row in rows], [row["ms_p50"] for row in rows], xerr=[below, above],
        color=[COLOURS[row["model"]] for row in rows],
    )  # fmt: skip
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
