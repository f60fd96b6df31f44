"""What an FFN width costs on a CPU that is not a multiple of 16 or 32: six FFN parts in one call.

Prints, for batches of 1 and 8 sequences of 128 tokens, milliseconds, and the time per unit of width over that
of the middle width: the median of the rounds' ratios, widths interleaved.
Usage: python benchmarks/bench_widths.py [--hidden 384] [--around 768] [--rounds 200]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import harness
from option_types import at_least
from presentation import counted
from pruned_ops import ops
from pruned_ops.measure.timing import Runner, Workload, interleave
from pruned_ops.ops.panels import ffn_part, to_panels

PARTS, LENGTH, EPS = 6, 128, 1e-12
OFFSETS = (-16, -8, -4, -1, 0, 1, 4, 8, 15, 16, 24, 32)


def runner(width: int, hidden: int, lengths: tuple[int, ...]) -> Runner:
    """A runner of FFN parts of this width over a packed batch, on random weights."""
    weights: list[Tensor] = []
    for _ in range(PARTS):
        up, down = torch.randn(width, hidden) * 0.05, torch.randn(hidden, width) * 0.05
        weights += [to_panels(up), torch.zeros(width), to_panels(down), torch.zeros(hidden)]
        weights += [torch.ones(hidden), torch.zeros(hidden)]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(lengths), hidden)
    return lambda _: ops.encoder(x, bounds, max(lengths), weights, [ffn_part(width)] * PARTS, 32, EPS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hidden", type=at_least(1), default=384, help="the hidden size (default: %(default)s)"
    )
    parser.add_argument(
        "--around", type=at_least(1), default=768, help="the middle width (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=200, help="times that every width runs (default: %(default)s)"
    )
    arguments = parser.parse_args()
    console = Console()
    stamp = harness.stamp()
    console.print(
        f"{stamp['machine_processor']}, {counted(stamp['machine_threads'], 'thread')}, {stamp['date']}"
    )
    for lengths in ((LENGTH,), (LENGTH,) * 8):
        runners = {
            str(arguments.around + offset): runner(arguments.around + offset, arguments.hidden, lengths)
            for offset in OFFSETS
        }
        with torch.inference_mode():
            timings = interleave(runners, Workload("ffn", (lengths,)), [{}], arguments.rounds, warmup=3)
        table = Table(title=f"{PARTS} FFN parts, hidden size {arguments.hidden}, {sum(lengths)} tokens")
        for column in ("width", "ms p50 (p20-p80)", "time a unit"):
            table.add_column(column, justify="right")
        middle = timings[str(arguments.around)]
        for name, timing in timings.items():
            ratio = arguments.around / int(name) / timing.speedup_over(middle)
            spread = f"{timing.ms(50):.3f} ({timing.ms(20):.3f}-{timing.ms(80):.3f})"
            table.add_row(name, spread, f"{ratio:.3f}")
        console.print(table)


if __name__ == "__main__":
    harness.run(main)
