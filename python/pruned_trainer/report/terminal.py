"""What came out, for people at a terminal: the contents of report.json and sweep.json as tables and bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pruned_ops.models.model_card import REPORT
from pruned_trainer.report.fields import Fields, noun_of, scores_of
from pruned_trainer.tasks.task import Score

# The scores for which a line of 80 characters has room.
_SCORES_OF_A_SWEEP = 2
# Characters of a dense layer's bar, of which two fit a line of 80.
_BAR_WIDTH = 16


def _score_lines(report: Mapping[str, Any]) -> list[Score]:
    """The lines of the result table."""
    return list(scores_of(Fields(Path(REPORT), report)))


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result table, what is left of each layer, and the changes with their intervals."""
    console = console or Console()
    console.print(_result_table(report))
    console.print(_layer_bars(report))
    speed = report["speedup"]
    losses = [score for score in _score_lines(report) if score.has_loss]
    changes = [
        _change(report, score.label, f"{score.key}_loss")
        for score in losses
        if report[f"{score.key}_loss"] is not None
    ]
    faster = f"[bold]{speed['reached']:.2f}x[/]"
    if "interval" in speed:  # reports of earlier versions have none
        low, high = speed["interval"]
        faster += f" ({low:.2f} to {high:.2f})"
    faster += f" as fast as our own dense runtime on {speed['workload']}"
    if "against_hugging_face" in speed:
        stock = f"{speed['against_hugging_face']:.2f}x as fast as Hugging Face's dense model"
        faster += f" in {speed['dtype']}, {stock}"
    console.print(f"{'; '.join([faster, ', '.join(changes)] if changes else [faster])}.")
    _print_targets(report, console)


def _print_targets(report: Mapping[str, Any], console: Console) -> None:
    """Print what was asked and what was reached, and how far the latency table was off."""
    for unit, asked in report["target"]["asked"].items():
        console.print(f"target {unit}: asked {asked:g}, reached {report['target']['reached'][unit]:.4g}.")
    if "latency_table" in report:
        table = report["latency_table"]
        errors = ", ".join(f"{name} {100 * table[name]['error']:+z.1f}%" for name in ("dense", "pruned"))
        console.print(
            f"latency table: predicted {table['predicted_speedup']:.2f}x; its times are off by {errors}."
        )


def _change(report: Mapping[str, Any], name: str, loss: str) -> str:
    points, ends = f"{name} [bold]{-report[loss]:+z.2f}[/] points", report[f"{loss}_interval"]
    return points if ends is None else f"{points} (95% interval {-ends[1]:+z.2f} to {-ends[0]:+z.2f})"


def _result_table(report: Mapping[str, Any]) -> Table:
    dense, pruned, workload = report["dense"], report["pruned"], report["speedup"]["workload"]
    noun = noun_of(Fields(Path(REPORT), report))
    table = Table(title=f"{report['evaluated_on'][noun]} {noun}; timing: {workload}")
    for column, side in (("", "left"), ("dense", "right"), ("pruned", "right"), ("pruned / dense", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]

    def row(
        name: str, value_of: Callable[[Mapping[str, Any]], float | None], form: str, ratio: bool = True
    ) -> None:
        full, kept = value_of(dense), value_of(pruned)
        if full is not None and kept is not None:
            compared = f"{kept / full:.3f}" if ratio and full else f"{kept - full:+z.2f}"
            table.add_row(name, form.format(full), form.format(kept), compared)

    for score in _score_lines(report):
        row(score.label, itemgetter(score.key), "{:.2f}", ratio=False)
    row("encoder parameters", lambda m: m["params"], "{:,}")
    row("encoder MACs per sequence", lambda m: m["macs"] / 1e6, "{:,.0f} M")
    row("size on disk (fp32)", lambda m: m["bytes"] / 2**20, "{:.1f} MiB")
    row("ms per batch (p50)", lambda m: m["workloads"][workload]["ms"]["p50"], "{:.1f}")
    row("sequences/s", lambda m: m["workloads"][workload]["sequences_per_s"], "{:.1f}")
    table.add_row("speed-up (median of rounds)", "1.00", f"{report['speedup']['reached']:.2f}", "")
    return table


def _layer_bars(report: Mapping[str, Any]) -> Table:
    """Bars of what is left of each layer."""
    dense = report["dense_shape"]
    hidden = report["hidden_size"]
    narrower = f", hidden size {hidden} of {dense['hidden_size']}" if hidden != dense["hidden_size"] else ""
    table = Table(title=f"left in each layer{narrower}")
    for column in ("layer", f"heads of {dense['num_heads']}", "", f"FFN width of {dense['ffn_width']}", ""):
        table.add_column(column, no_wrap=True)

    def bar(kept: int, full: int) -> str:
        return "█" * round(_BAR_WIDTH * kept / max(full, 1))

    for i, layer in enumerate(report["shape"]):
        heads, ffn = layer["num_heads"], layer["ffn_width"]
        head_bar, ffn_bar = bar(heads, dense["num_heads"]), bar(ffn, dense["ffn_width"])
        table.add_row(str(i), str(heads), f"[cyan]{head_bar}[/]", str(ffn), f"[magenta]{ffn_bar}[/]")
    return table


def print_scores(scores: Mapping[str, Any], thresholds: Mapping[str, float], digits: int) -> None:
    """Print a checkpoint's scores, a line each: the official metric's keys with so many decimals, other
    scores, the thresholds."""
    official = scores["metrics"]
    others = {k: v for k, v in scores.items() if k != "metrics" and k not in official and v is not None}
    width = max(14, *(len(name) for name in (*official, *others, *thresholds)))
    for values, decimals in ((official, digits), (others, 2), (thresholds, 4)):
        for name, value in values.items():
            text = f"{value:.{decimals}f}" if isinstance(value, float) else str(value)
            print(f"{name:>{width}}  {text}")


def sweep_point(report: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The entry of a sweep's model in sweep.json, from the model's own report."""
    scores = _score_lines(report)
    names = (*(score.key for score in scores), "params", "macs", "bytes")
    losses = [f"{score.key}_loss" for score in scores if score.has_loss]
    return {
        "folder": folder,
        "target": report["target"],
        "speedup": report["speedup"],
        **{name: report["pruned"][name] for name in names},
        **{name: report[name] for loss in losses for name in (loss, f"{loss}_interval")},
        "shape": report["shape"],
    }


def print_sweep(sweep: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a line for each model of a family, with its first scores; sweep.json has them all."""
    table = Table(title="a model for each target")
    scores = [score for score in _score_lines(sweep) if score.has_loss][:_SCORES_OF_A_SWEEP]
    for name in ("model", "speed-up", *(n for score in scores for n in (score.label, "loss (95%)"))):
        table.add_column(name, justify="left" if name == "model" else "right")
    dense = [sweep["dense"][score.key] for score in scores]
    cells = [cell for value in dense for cell in ("-" if value is None else f"{value:.2f}", "")]
    table.add_row("dense", "1.00", *cells)
    for point in sweep["points"]:
        cells = [point["folder"], f"{point['speedup']['reached']:.2f}"]
        for key, _, _ in scores:
            score, loss, ends = (point[name] for name in (key, f"{key}_loss", f"{key}_loss_interval"))
            interval = "" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})"
            cells.append("-" if score is None else f"{score:.2f}")
            cells.append("" if loss is None else f"{loss:.2f}{interval}")
        table.add_row(*cells)
    (console or Console()).print(table)
