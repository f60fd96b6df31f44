"""`pruned-ops latency-table`: measure a latency table, write it, print what it holds."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.command_line import add_dtype, check_counts, dtype_of, say_skipped
from pruned_ops.files import check_writable
from pruned_ops.shape import LayerShape

if TYPE_CHECKING:
    from pruned_ops.measure.latency import LatencyTable
    from pruned_ops.measure.timing import Workload


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "latency-table",
        help="measure what layers of every size take on this machine",
        description="Measure what layers of every size take on this machine, and write the times to "
        "FILE. Leave the machine alone meanwhile: other work would be measured too.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE", help="where the table is written, as JSON")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a checkpoint")
    workload = parser.add_argument_group("workload")
    lengths = workload.add_mutually_exclusive_group(required=True)
    lengths.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="SQuAD-format JSON, or .jsonl, whose questions give the lengths",
    )
    lengths.add_argument(
        "--length", type=int, metavar="N", help="tokens of every sequence, in place of --data"
    )
    workload.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences of a batch")
    workload.add_argument("--batches", type=int, default=16, metavar="N", help="batches of the workload")
    workload.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a window of --data, at most (default: 384, or as many as the model takes)",
    )
    workload.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that two windows of --data share (default: a third of --max-length)",
    )
    workload.add_argument(
        "--skip-bad", action="store_true", help="skip and count questions of --data that cannot be cut"
    )
    running = parser.add_argument_group("how the model will run")
    add_dtype(running, "dtype of the linear layers; bfloat16 and int8 run on a CPU")
    running.add_argument(
        "--threads", type=int, metavar="N", help="threads that the model will run on (default: torch's own)"
    )
    running.add_argument("--device", help="where the model will run (default: a GPU where there is one)")
    running.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="how often each size is timed; medians are kept"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the latency table that is in FILE")


def run(arguments: argparse.Namespace) -> None:
    """Measure a latency table, write it, and print what is in it."""
    from pruned_ops.checkpoints.loading import checked_device, default_device, load_config, only_errors
    from pruned_ops.measure.layer_times import measure_table
    from pruned_ops.measure.timing import threads

    start = time.perf_counter()
    check_counts(arguments, "batch_size", "batches", "rounds", "length", "max_length", "threads")
    if arguments.data is None and (arguments.max_length is not None or arguments.stride is not None):
        raise ValueError("--max-length and --stride go with --data")
    if arguments.data is None and arguments.skip_bad:
        raise ValueError("--skip-bad goes with --data")
    check_output(arguments.file, arguments.overwrite)
    only_errors()
    config = load_config(arguments.model)
    device = arguments.device or default_device()
    checked_device(device)
    workload, dtype = make_workload(arguments, config), dtype_of(arguments)
    with threads(arguments.threads):
        table = measure_table(
            config, workload, arguments.rounds, device, command=arguments.command_line, dtype=dtype
        )
    table.save(arguments.file)
    print_table(table, config.num_hidden_layers)
    print(f"written to {arguments.file} after {time.perf_counter() - start:.0f} s")


def check_output(path: Path, overwrite: bool) -> None:
    """OSError or ValueError where a table cannot be written to `path`, or would replace a file that is no
    table: asked before a minute of measuring."""
    from pruned_ops.measure.latency import LatencyTable

    check_writable(path, "FILE", overwrite)
    if path.exists():
        try:
            LatencyTable.load(path)
        except ValueError as error:
            raise ValueError(f"{error}; it is not replaced") from error


def make_workload(arguments: argparse.Namespace, config: Any) -> Workload:
    """Batches of the lengths of a file's questions in arrival order, or of one length. config: the model's,
    which says how long its sequences may be."""
    from pruned_ops.checkpoints.loading import load_tokenizer
    from pruned_ops.measure.timing import Workload
    from pruned_ops.models.inputs import longest_sequence
    from pruned_ops.qa.questions import window_lengths
    from pruned_ops.qa.windows import window_sizes

    size, batches = arguments.batch_size, arguments.batches
    if arguments.data is None:
        return Workload.fixed(arguments.length, size, batches)
    sizes = window_sizes(longest_sequence(config), arguments.max_length, arguments.stride)
    tokenizer = load_tokenizer(str(arguments.model))
    skipped: list[str] | None = [] if arguments.skip_bad else None
    lengths = window_lengths(arguments.data, tokenizer, *sizes, needed=size * batches, skipped=skipped)
    say_skipped(skipped)
    return Workload.arrival_order(lengths, size, batches)


def print_table(table: LatencyTable, num_layers: int) -> None:
    """Print the times of parts of a few sizes, the alignment, and the time of a whole dense model of
    num_layers layers."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=f"ms per batch of {table.workload.name}, one layer in {table.dtype}")
    grid.add_column("part")
    for column in ("none", "a quarter", "half", "dense"):
        grid.add_column(column, justify="right")
    heads, width = table.attention[-1][0], table.ffn[-1][0]
    for name, dense, ms in (("num_heads", heads, table.attention_ms), ("ffn_width", width, table.ffn_ms)):
        sizes = (0, dense // 4, dense // 2, dense)
        grid.add_row(name, *(f"{ms(size):.2f} ({size})" for size in sizes))
    Console().print(grid)
    dense_ms, empty_ms = (
        table.predict([shape] * num_layers) for shape in (LayerShape(heads, width), LayerShape(0, 0))
    )
    costs = ", ".join(f"{align}: {cost:.3f}" for align, cost in table.alignment)
    print(
        f"{num_layers} dense layers take {dense_ms:.1f} ms, empty ones {empty_ms:.1f}, of which "
        f"{table.base_ms:.1f} are spent outside the layers"
    )
    print(f"relative cost of FFN widths by alignment: {costs}; {table.align} is enough")
