"""Every op alone, our backend against torch's own ways to compute it, beside the machine's ceilings.

Usage: python benchmarks/bench_ops.py [--device cpu|cuda] [--quick]
On a GPU the launches of CUDA graphs are timed, so that the host's share of a call does not count, over
inputs that L2 does not hold. Without a GPU, --device cuda prints bounds instead of times
(single_kernels/bounds.py, single_kernels/goals.py). A bound is not a result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import harness
import pruned_ops
from harness import Row
from option_types import above, at_least
from pruned_ops.measure.graph_timing import replay_seconds
from pruned_ops.measure.timing import Timing, Workload, interleave
from pruned_ops.ops.registry import OPS, backends_of
from single_kernels.cases import MIXED, MODELS, Case, Place, Runners, cases
from single_kernels.report import write_report, write_tables
from single_kernels.rotation import input_sets

REPLAYS = 9


def timed(case: Case, runners: Runners, device: str, rounds: int) -> tuple[dict[str, Timing], list[str]]:
    """The times of a case's runners, and for each that failed a line. On the CPU they are interleaved, and an
    error is raised. On a GPU each is timed by the launches of a graph of calls on several sets of inputs."""
    workload = Workload(f"{case.op} {case.model}", (case.lengths,))
    if device == "cpu":
        return interleave(runners, workload, [{}], rounds, warmup=3), []
    more = [case.make() for _ in range(input_sets(case.bytes) - 1)]
    sets = [runners, *(case_runners | ours_elsewhere(case, case_runners) for case_runners in more)]
    timings: dict[str, Timing] = {}
    failures = []
    for name in runners:
        calls = [lambda run=inputs[name]: run({}) for inputs in sets if name in inputs]
        try:
            timings[name] = Timing(workload, replay_seconds(calls, REPLAYS))
        except Exception as error:  # whatever a kernel raises; the next one may run
            failures.append(f"FAILED: {name} of {case.op}, {case.model}: {type(error).__name__}: {error}")
    return timings, failures


def ours_elsewhere(case: Case, own: Runners) -> Runners:
    """Our op on the inputs of `own`, on each backend that takes them, except the one that runs by itself."""
    runners: Runners = {}
    chosen = backends_of(lambda: own["ours"]({}))[case.op]
    for name, kernel in OPS[case.op].kernels.items():
        if name == chosen or kernel.backend.missing is not None or kernel.backend.on_demand:
            continue

        def work(batch: Any, name: str = name) -> Any:
            with pruned_ops.use_backend(name):
                return own["ours"](batch)

        try:
            with torch.inference_mode():
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
        "--rounds", type=at_least(1), default=51,
        help="times that every case runs on a CPU; on a GPU its time decides (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false",
        help="on a GPU: without torch.compile, whose autotuning takes most of the time",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few rounds of one model: a look, not a result")
    parser.add_argument(
        "--minutes", type=above(0), default=float("inf"),
        help="leave out, by name, what is not begun by then (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--measured", type=Path, help="kernels.jsonl of bench_kernels.py, whose times stand beside the bounds"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    return parser.parse_args()


def main() -> None:
    arguments, console = parsed(), Console()
    end = time.monotonic() + 60 * arguments.minutes
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print_bounds(console, arguments.measured)
        return
    if arguments.measured is not None:
        raise ValueError("--measured stands beside bounds, which --device cuda prints where there is no GPU")
    out = harness.out_path(arguments.out, "ops", arguments.device)
    place = Place(torch.float16 if on_gpu else torch.float32, arguments.device, on_gpu and arguments.compile)
    many = 8 if on_gpu else 1
    peak = harness.ceilings(place.dtype, arguments.device)
    console.print(f"ceilings here: {peak['flops'] / 1e9:.0f} GFLOP/s, {peak['bytes'] / 1e9:.1f} GB/s copied")
    rows: list[Row] = []
    left_out: list[str] = []
    # The sizes and lengths that goals are stated for come first: time may run out.
    models = MODELS[:1] if arguments.quick else (*MODELS[2:], *MODELS[:2])
    batches: list[tuple[int, ...]] = [(128,) * 8 * many, (384,) * 8 * many, MIXED * many]
    for lengths in batches[-1:] if arguments.quick else batches:
        for model in models:
            for case in cases(model, lengths, place):
                if time.monotonic() > end:
                    name = f"{case.op}, {case.model}, {len(lengths)} sequences"
                    left_out.append(f"{name} is left out: the {arguments.minutes:g} minutes were used up")
                    console.print(left_out[-1])
                    continue
                case_rows, failures = measured(case, place, arguments, peak, console)
                rows, left_out = rows + case_rows, left_out + failures
                if rows:
                    write_tables(out, rows, left_out)
    if rows:
        write_report(out, rows, left_out)
        console.print(f"written to {out}, and as .md and .png; {len(OPS)} ops")


def print_bounds(console: Console, measured: Path | None) -> None:
    """The least times on a GPU that is not here, by its ceilings and by the schedules of the kernels."""
    from single_kernels.bounds import bounds  # needs Triton
    from single_kernels.goals import goal_tables
    from single_kernels.names import measured_times
    from whole_models.cases import goal_workloads

    for lengths in (MIXED * 8, (128,) * 8):
        console.print(*bounds(lengths))
    goals = [(workload.name, workload.batches[0]) for workload in goal_workloads(None, False, ["*"])]
    for table in goal_tables(goals, measured_times(measured) if measured else {}):
        console.print(table)


def measured(
    case: Case, place: Place, arguments: argparse.Namespace, peak: dict[str, float], console: Console
) -> tuple[list[Row], list[str]]:
    """A row for each runner of a case, and a line for each that failed; both are shown at once."""
    torch.manual_seed(0)
    runners = case.make()
    backend = backends_of(lambda: runners["ours"]({}))[case.op]
    runners |= ours_elsewhere(case, runners)
    timings, failures = timed(case, runners, place.device, 5 if arguments.quick else arguments.rounds)
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    if "ours" not in timings:
        return [], failures
    lengths = case.lengths
    table = row_table(f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {place.dtype}")
    show(table, case, timings, peak)
    console.print(table)
    facts = {
        "op": case.op, "layer": case.model, "lengths": " ".join(map(str, lengths)),
        "gflop": case.flops / 1e9, "mb": case.bytes / 1e6, "dtype": str(place.dtype),
        "peak_gflops": peak["flops"] / 1e9, "copy_gb_per_s": peak["bytes"] / 1e9,
    }  # fmt: skip
    backends = {name: name.removeprefix("ours on ") for name in timings if name.startswith("ours on ")}
    backends["ours"] = backend
    extra = {name: facts | {"backends": backends.get(name, "")} for name in timings}
    return harness.rows(timings, "ours", extra), failures


if __name__ == "__main__":
    harness.run(main)
