"""How bench_models.py's rows are shown: a table a workload on screen, and one of all in Markdown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pruned_ops.measure.timing import Workload

Row = dict[str, Any]


def spread(row: Row) -> str:
    """Milliseconds a batch: the median of the rounds, and their 20th to 80th percentile."""
    return f"{row['ms_p50']:.1f} ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})"


def against(row: Row | None) -> str:
    """How many times as fast as the best rival, and which that is; empty where there is none."""
    best = row.get("best_rival") if row else None
    return f"{row['speedup_vs_best_rival']:.2f}x {best.rsplit(' ', 1)[0]}" if row and best else ""


def for_screen(workload: Workload, rows: Sequence[Row]) -> Table:
    title = f"{workload.name}: {workload.sequences} sequences, {workload.tokens} tokens a round"
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
    return row["runtime"] in ("ours", "ours-int8", "ours-encode-many")


def markdown(rows: Sequence[Row]) -> str:
    """Workloads down, runtimes across, and how ours stands beside the best rival, won or lost; then what the
    int8 runtimes' logits are worth, who was left out and why, and where all this was measured."""
    timed = [row for row in rows if "refused" not in row]
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    cells = {(row["workload"], row["model"], row["runtime"]): row for row in timed}
    ratios = {"ours": f"ours / best {timed[0]['precision']} rival"}
    if "ours-int8" in runtimes:
        ratios["ours-int8"] = "ours-int8 / best int8 rival"
    ceilings = any("percent_of_copy" in row for row in timed)
    columns = ["workload", "model", *runtimes, *ratios.values()]
    columns += ["ours, pruned against dense", "ours, of the ceilings"] if ceilings else []
    lines = [
        "Milliseconds a batch, p50 (p20-p80) of the rounds. The last columns say how many times as fast as "
        "the fastest rival ours is: the median of the rounds' ratios; below 1 it loses.",
        *(
            ["Of the ceilings: of torch's products, and of copying, which all weights once would take."]
            * ceilings
        ),
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---' for _ in columns)} |",
    ]
    for workload, model in dict.fromkeys((row["workload"], row["model"]) for row in timed):
        found = [cells.get((workload, model, runtime)) for runtime in runtimes]
        shown = [spread(row) if row else "-" for row in found]
        shown += [against(cells.get((workload, model, name))) or "-" for name in ratios]
        if ceilings:
            shown += _beside_ceilings(cells.get((workload, model, "ours")))
        lines.append(f"| {' | '.join([workload, model, *shown])} |")
    cosines = {row["runner"]: row["cosine"] for row in timed if row["precision"] == "int8"}
    lines += ["", *(f"- {name}: cosine of its logits with hf's {c:.5f}" for name, c in cosines.items())]
    lines += _left_out(rows)
    return "\n".join([*lines, "", *_origin(timed[0])]) + "\n"


def _beside_ceilings(row: Row | None) -> list[str]:
    if row is None:
        return ["-", "-"]
    dense = f"{row['speedup_vs_own_dense']:.2f}x" if row["model"] != "dense" else "-"
    return [dense, f"{row['percent_of_peak']:.0f}%, {row['percent_of_copy']:.0f}%"]


def _left_out(rows: Sequence[Row]) -> list[str]:
    """A line a runner and reason, with the workloads where that was not all."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "refused" in row:
            where.setdefault((row["runner"], row["refused"]), []).append(row["workload"])
    every = {row["workload"] for row in rows}
    lines = []
    for (name, reason), some in where.items():
        place = "" if some == ["all"] or set(some) == every else f" of {', '.join(some)}"
        lines.append(f"- {name} is left out{place}: {reason}")
    return lines


def _origin(row: Row) -> list[str]:
    """Machine, peak, versions and command, a line each."""
    versions = [(key[8:], value) for key, value in row.items() if key.startswith("version_") and value]
    return [
        f"Machine: {row['machine_accelerator'] if row['device'] == 'cuda' else row['machine_processor']}, "
        f"{row['machine_threads']} threads, {row['machine_cpu_capability']}; "
        f"{row['peak_gflops']:.0f} GFLOP/s in torch's {row['precision']} products.\n",
        f"Versions: {', '.join(f'{name} {value}' for name, value in versions)}.\n",
        f"{row['date']}, {row['rounds']} rounds: `{shlex.join(['python', *sys.argv])}`",
    ]


COLORS = {"dense": "#9aa7b1", "pruned": "#1f6f8b"}


def draw(rows: Sequence[Row], path: Path) -> str | None:
    """Write the PNG; why it cannot be drawn, where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return f"no figure: matplotlib cannot be imported ({error})"
    timed = [row for row in rows if "refused" not in row]
    workloads = list(dict.fromkeys(row["workload"] for row in timed))
    if not workloads:
        return "no figure: nothing was timed"
    most = max(sum(row["workload"] == name for row in timed) for name in workloads)
    figure, axes = pyplot.subplots(
        len(workloads), 1, figsize=(9, len(workloads) * (0.6 + 0.22 * most)), squeeze=False
    )
    for axis, name in zip(axes[:, 0], workloads, strict=True):
        some = [row for row in timed if row["workload"] == name]
        spread = [
            [row["ms_p50"] - row["ms_p20"] for row in some],
            [row["ms_p80"] - row["ms_p50"] for row in some],
        ]
        axis.barh(
            [row["runner"] for row in some], [row["ms_p50"] for row in some], xerr=spread,
            color=[COLORS[row["model"]] for row in some],
        )  # fmt: skip
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("milliseconds a batch, median and 20th to 80th percentile", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return None
