"""`pruned-ops bench`: how long a batch takes here, in our runtime and in plain Hugging Face."""

from __future__ import annotations

import argparse
import io
import random
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.command_line import add_dtype, check_counts, say_skipped
from pruned_ops.files import check_writable, write_whole
from pruned_ops.shape import checked_int

if TYPE_CHECKING:
    from pruned_ops.measure.comparison import Benchmark
    from pruned_ops.measure.timing import Workload


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "bench",
        help="time a checkpoint here, beside Hugging Face's runtime and the dense model",
        description="Time the checkpoint in DIR in our runtime, and as saved in plain Hugging Face (padded, "
        "with the attention that it takes by default); with --dense that model, too. All take the same "
        "batches in turn, in one process. Leave the machine alone meanwhile.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint")
    parser.add_argument("--dense", type=Path, metavar="DIR2", help="folder of the checkpoint before pruning")
    _add_workload(parser)
    running = parser.add_argument_group("how the models run")
    add_dtype(running, "dtype of our runtime's linear layers, on a CPU")
    running.add_argument(
        "--threads", type=int, metavar="N", help="threads of the CPU (default: torch's number)"
    )
    running.add_argument("--device", help="where the models run (default: a GPU where there is one)")
    running.add_argument("--rounds", type=int, default=9, metavar="N", help="how often each batch is timed")
    output = parser.add_argument_group("output")
    output.add_argument("--html", type=Path, metavar="FILE", help="draw the times, as a page of its own")
    output.add_argument("--overwrite", action="store_true", help="replace the file of --html")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is timed."""
    workload = parser.add_argument_group("what is timed")
    lengths = workload.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths", "--length", type=int, nargs="+", default=[128], metavar="N",
        help="tokens of a sequence; several are mixed in the batches (default: 128)",
    )  # fmt: skip
    lengths.add_argument(
        "--data", type=Path, metavar="FILE", help="SQuAD-format JSON, or .jsonl, that gives the lengths"
    )
    workload.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences of a batch")
    workload.add_argument(
        "--batches", type=int, default=4, metavar="N", help="how many different batches there are"
    )
    workload.add_argument(
        "--padding", choices=["longest", "fixed"], default="longest",
        help="batches are as long as their longest sequence, or all as the longest of all",
    )  # fmt: skip
    workload.add_argument(
        "--skip-bad", action="store_true", help="skip and count questions of --data that cannot be cut"
    )


def run(arguments: argparse.Namespace) -> None:
    """Time the models, print the times, and draw them where that is asked for."""
    from pruned_ops.checkpoints.loading import load_folder
    from pruned_ops.measure.comparison import compare
    from pruned_ops.measure.timing import threads
    from pruned_ops.models.inputs import longest_sequence

    check_arguments(arguments)
    folders = {"pruned": arguments.folder, "dense": arguments.dense}
    if arguments.dense is None:
        folders = {"model": arguments.folder}
    models = {
        name: load_folder(folder, arguments.device, takes_int8=True) for name, folder in folders.items()
    }
    workload = make_workload(arguments, min(longest_sequence(model.config) for model in models.values()))
    with threads(arguments.threads):
        benchmark = compare(
            models, workload, arguments.rounds, arguments.dtype, fixed=arguments.padding == "fixed"
        )
        show(benchmark)
        if arguments.html is not None:
            write_whole(arguments.html, page(benchmark, arguments.command_line))
            print(f"drawn in {arguments.html}")


def check_arguments(arguments: argparse.Namespace) -> None:
    """OSError or ValueError for what can be known to fail before a model is loaded."""
    check_counts(arguments, "batch_size", "batches", "rounds", "threads")
    if arguments.skip_bad and arguments.data is None:
        raise ValueError("--skip-bad goes with --data")
    for length in arguments.lengths:
        checked_int("a length of --lengths", length, 1)
    sequences = arguments.batch_size * arguments.batches
    if len(arguments.lengths) > sequences:
        raise ValueError(
            f"{len(arguments.lengths)} lengths are more than the {sequences} sequences that are timed: give "
            "a larger --batch-size, or more --batches"
        )
    if arguments.html is not None:
        check_writable(arguments.html, "--html", arguments.overwrite)


def make_workload(arguments: argparse.Namespace, longest: int) -> Workload:
    """Batches of the lengths of a file's questions in arrival order, or of those given, mixed (seed 0).
    longest: tokens that the models take."""
    from pruned_ops.checkpoints.loading import load_tokenizer
    from pruned_ops.measure.timing import Workload
    from pruned_ops.qa.questions import window_lengths
    from pruned_ops.qa.windows import window_sizes

    size, batches = arguments.batch_size, arguments.batches
    if arguments.data is not None:
        tokenizer = load_tokenizer(str(arguments.folder))
        skipped: list[str] | None = [] if arguments.skip_bad else None
        sizes = window_sizes(longest)
        lengths = window_lengths(arguments.data, tokenizer, *sizes, needed=size * batches, skipped=skipped)
        say_skipped(skipped)
        return Workload.arrival_order(lengths, size, batches)
    choices: list[int] = arguments.lengths
    if len(choices) == 1:
        return Workload.fixed(choices[0], size, batches)
    mixed = [choices[i % len(choices)] for i in range(size * batches)]
    random.Random(0).shuffle(mixed)
    return Workload(
        f"mixed-b{size}", tuple(tuple(mixed[first : first + size]) for first in range(0, len(mixed), size))
    )


def show(benchmark: Benchmark) -> None:
    """Print the times, what they mean, and which backend ran each op."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("model", "runtime", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("ms p50", "ms p90", "seq/s", "speed-up", "M MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in benchmark.rows:
        numbers = (f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.sequences_per_s:.1f}")
        table.add_row(
            row.model, row.runtime, row.dtype, *numbers, f"{row.speedup:.2f}x", f"{row.macs / 1e6:,.1f}"
        )
    print(benchmark.title)
    Console().print(table)
    print("milliseconds, and millions of MACs, are a batch's; speed-ups are over Hugging Face's runtime")
    for row in benchmark.rows:
        if row.backends:
            ran = ", ".join(f"{op}: {names}" for op, names in row.backends.items())
            print(f"{row.model} ran {ran}")
    for sentence in benchmark.sentences:
        print(sentence)


_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,td:nth-child(2),td:nth-child(3){text-align:left}svg{max-width:100%;height:auto}"
)
_COLUMNS = ("model", "runtime", "dtype", "ms p50", "ms p90", "sequences/s", "against Hugging Face")


def page(benchmark: Benchmark, command: str) -> str:
    """An HTML page that loads nothing: a drawing of the times, the table, and what they mean."""
    lines = [
        (row.model, row.runtime, row.dtype, f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}",
         f"{row.sequences_per_s:.1f}", f"{row.speedup:.2f}x")
        for row in benchmark.rows
    ]  # fmt: skip
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines
    )
    sentences = "".join(f"<p>{escape(sentence)}.</p>\n" for sentence in benchmark.sentences)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pruned-ops bench</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>Milliseconds a batch</h1>\n<p>{escape(benchmark.title)}.</p>\n"
        f"{_drawing(benchmark)}\n<table><tr>{head}</tr>\n{body}</table>\n{sentences}"
        f"<p><code>{escape(command)}</code></p>\n</body></html>\n"
    )


def _drawing(benchmark: Benchmark) -> str:
    """Bars to p50 with whiskers to p90, as SVG."""
    from matplotlib.figure import Figure  # only for those who draw

    rows = benchmark.rows[::-1]
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
