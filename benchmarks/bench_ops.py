"""Every op alone, our backend against torch's own ways to compute it, beside the machine's ceilings.

Usage: python benchmarks/bench_ops.py [--device cpu|cuda] [--quick]
On a machine without a GPU, --device cuda prints bounds instead of times (kernels/bounds.py). A bound is not a
result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import harness
import pruned_ops
from harness import Row
from kernels.cases import MIXED, MODELS, Case, Runners, cases
from kernels.report import write_report
from pruned_ops.measure.timing import Timing, Workload, interleave
from pruned_ops.ops.registry import OPS


def timed(case: Case, device: str, rounds: int) -> dict[str, Timing]:
    """The times of a case's runners: interleaved on the CPU; on a GPU, where a kernel is shorter than its
    launch, by CUDA events with a cold L2."""
    workload = Workload(f"{case.op} {case.model}", (case.lengths,))
    if device == "cpu":
        return interleave(case.runners, workload, [{}], rounds, warmup=3)
    from triton.testing import do_bench

    def seconds(work: Callable[[Any], Any]) -> tuple[float, ...]:
        return tuple(ms / 1000 for ms in do_bench(lambda: work({}), quantiles=[0.2, 0.5, 0.8]))

    return {name: Timing(workload, seconds(work)) for name, work in case.runners.items()}


def ours_elsewhere(case: Case, ran: str) -> Runners:
    """Our op on each backend that takes this case, except `ran`, which was chosen by itself."""
    runners: Runners = {}
    for name, kernel in OPS[case.op].kernels.items():
        if name == ran or kernel.backend.missing is not None or kernel.backend.on_demand:
            continue

        def work(batch: Any, name: str = name) -> Any:
            with pruned_ops.use_backend(name):
                return case.runners["ours"](batch)

        try:
            work({})
        except pruned_ops.BackendError:
            continue
        runners[f"ours on {name}"] = work
    return runners


def row_table(title: str) -> Table:
    """An empty table for `show`."""
    table = Table(title=title)
    table.add_column("")
    for column in ("us p50 (p20-p80)", "GFLOP/s (of peak)", "GB/s (of copy)", "ours is"):
        table.add_column(column, justify="right")
    return table


def show(table: Table, case: Case, timings: dict[str, Timing], peak: dict[str, float]) -> None:
    """A line for each runner; how many times as fast ours is stands beside the others."""
    table.add_row(f"[bold]{case.op}[/], {case.model}")
    for name, timing in timings.items():
        seconds = timing.ms(50) / 1000
        flops, moved = case.flops / seconds, case.bytes / seconds
        table.add_row(
            f"  {name}",
            f"{timing.ms(50) * 1e3:.0f} ({timing.ms(20) * 1e3:.0f}-{timing.ms(80) * 1e3:.0f})",
            f"{flops / 1e9:.0f} ({100 * flops / peak['flops']:.0f}%)" if case.flops else "",
            f"{moved / 1e9:.1f} ({100 * moved / peak['bytes']:.0f}%)",
            "" if name == "ours" else f"{timings['ours'].speedup_over(timing):.2f}x",
        )
    table.add_section()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where ops run (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=51,
        help="times that every case runs on a CPU; on a GPU its time decides (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few rounds of one model: a look, not a result")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"),
        help="leave out, by name, what is not begun by then (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    return parser.parse_args()


def main() -> None:
    arguments, console = parsed(), Console()
    end = time.monotonic() + 60 * arguments.minutes
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print_bounds(console)
        return
    dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    many = 1 if arguments.device == "cpu" else 8
    peak = harness.ceilings(dtype, arguments.device)
    console.print(f"ceilings here: {peak['flops'] / 1e9:.0f} GFLOP/s, {peak['bytes'] / 1e9:.1f} GB/s copied")
    models = MODELS[:1] if arguments.quick else MODELS
    batches: list[tuple[int, ...]] = [MIXED * many, (128,) * 8 * many, (384,) * 8 * many]
    rows: list[Row] = []
    left_out: list[str] = []
    for lengths in batches[:1] if arguments.quick else batches:
        table = row_table(f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {dtype}")
        for model in models:
            for case in cases(model, lengths, dtype, arguments.device):
                if time.monotonic() > end:
                    left_out.append(f"{case.op}, {case.model}, {len(lengths)} sequences")
                else:
                    rows += measured(case, dtype, arguments, peak, table)
        console.print(table)
    written(rows, left_out, arguments, console)


def print_bounds(console: Console) -> None:
    """The least times on a GPU that is not here."""
    from kernels.bounds import bounds  # needs Triton

    for lengths in (MIXED * 8, (128,) * 8):
        console.print(*bounds(lengths))


def measured(
    case: Case, dtype: torch.dtype, arguments: argparse.Namespace, peak: dict[str, float], table: Table
) -> list[Row]:
    """A row for each runner of a case, which is shown in the table, too."""
    with torch.inference_mode(), pruned_ops.record() as ran:
        case.runners["ours"]({})
    (backend,) = ran[case.op]
    with torch.inference_mode():
        case.runners.update(ours_elsewhere(case, backend))
    timings = timed(case, arguments.device, 5 if arguments.quick else arguments.rounds)
    show(table, case, timings, peak)
    facts = {
        "op": case.op, "layer": case.model, "lengths": " ".join(map(str, case.lengths)),
        "gflop": case.flops / 1e9, "mb": case.bytes / 1e6, "dtype": str(dtype),
        "peak_gflops": peak["flops"] / 1e9, "copy_gb_per_s": peak["bytes"] / 1e9,
    }  # fmt: skip
    backends = {name: name.removeprefix("ours on ") for name in timings if name.startswith("ours on ")}
    backends["ours"] = backend
    return harness.rows(
        timings, "ours", {name: facts | {"backends": backends.get(name, "")} for name in timings}
    )


def written(rows: list[Row], left_out: list[str], arguments: argparse.Namespace, console: Console) -> None:
    """Write the files, and name what was left out."""
    for name in left_out:
        console.print(f"{name} is left out: the {arguments.minutes:g} minutes were used up")
    if not rows:
        return
    out = arguments.out or harness.result_path("ops", arguments.device)
    write_report(out, rows, left_out)
    console.print(f"written to {out}, and as .md and .png; {len(OPS)} ops")


if __name__ == "__main__":
    main()
