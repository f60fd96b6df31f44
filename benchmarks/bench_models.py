"""Whole models, dense and pruned: our runtime beside those that a user could take instead.

The workloads are real lengths in arrival order at batch 1, 8 and 32 (a SQuAD file's questions, shuffled), and
lengths of 128 or 384, and of 4,096 where the model takes texts as long. Every runner has the same weights,
and its logits are compared with Hugging Face's before it is timed; all are timed in one process, batch by
batch in turn, with a short rest between. The result is a CSV with a row for each, a Markdown table and a
figure.
With --device cuda it is the benchmark of the GPU's goals instead, in fp16 with other rivals
(whole_models/goals.py); --goals runs that on the CPU, in fp32, where most rivals refuse.
Usage: python benchmarks/bench_models.py --dense TEACHER --pruned OUT --data SQUAD/eval.json --rivals all
       python benchmarks/bench_models.py --device cuda --random large --rivals all --minutes 8
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

import harness
import pruned_ops
from harness import Row
from option_types import above, at_least
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import backends_of
from pruned_ops.shape import ModelShape
from rivals.cpu import CPU_RIVALS, build_cpu_rival
from rivals.cuda import CUDA_RIVALS
from rivals.rival import Batch, Refused, Run, compare_logits, forward
from single_kernels.journal import FAILED
from whole_models.cases import (
    SAMPLES,
    SIZES,
    Source,
    arrival_lengths,
    fingerprint,
    goal_workloads,
    padded_to,
    workloads,
)
from whole_models.goals import measure_goals
from whole_models.memory import report_memory
from whole_models.report import screen_table, write_report

OURS = "ours"
# Ours with its linears in another dtype, on a CPU: the runtime's name -> the dtype of `optimize`.
OURS_NARROW = {"ours-bfloat16": "bfloat16", "ours-int8": "int8"}
# What a service without dynamic shapes would do; one goal is stated against it. In arrival order only.
PADDED = "hf padded to 384"


@dataclass(frozen=True)
class Contender:
    """A runner of one model whose logits were checked. facts: fields of its rows."""

    runtime: str
    model: str
    precision: str
    run: Run
    shape: ModelShape
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.model}"


def contenders(
    source: Source, names: Sequence[str], device: str, folder: Path, cached: bool
) -> tuple[list[Contender], list[Row]]:
    """Ours and each rival on each model of the source; and for each that cannot run a row that says why.

    Errors: ValueError where a runner's logits are not Hugging Face's."""
    able, refused = [], []
    for model_name in source.names:
        model = source.load(model_name, device)
        files = folder / (fingerprint(model) if cached else model_name)
        samples = SAMPLES.inputs(model.config.vocab_size, model.config.pad_token_id, device)
        narrow = OURS_NARROW if device == "cpu" else ()
        for runtime in (OURS, *narrow, *(name for name in names if name != PADDED or model_name == "dense")):
            # An export or a calibration of a base size takes minutes.
            print(f"preparing {runtime} {model_name}", flush=True)
            try:
                able.append(_contender(runtime, model_name, model, samples, files))
            except Refused as reason:
                runner = {"runner": f"{runtime} {model_name}", "runtime": runtime, "model": model_name}
                refused.append(runner | {"refused": str(reason)})
    return able, refused


def _contender(
    runtime: str, model_name: str, model: Any, samples: Sequence[Batch], folder: Path
) -> Contender:
    precision = CPU_RIVALS[runtime].precision if runtime in CPU_RIVALS else "fp32"
    precision = OURS_NARROW.get(runtime, precision)
    with torch.inference_mode():
        run = _runner(runtime, model, samples, folder)
    try:
        errors = compare_logits(run, forward(model), samples, precision)
    except ValueError as error:
        raise ValueError(f"{runtime} {model_name}: {error}") from error
    backends = backends_of(lambda: run(samples[0]))
    shown = "; ".join(f"{op}: {backend}" for op, backend in backends.items()) or "its own"
    shape = model_shape(model)
    return Contender(runtime, model_name, precision, run, shape, {"backends": shown, **errors})


def _runner(runtime: str, model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    if runtime == OURS or runtime in OURS_NARROW:
        try:
            return forward(pruned_ops.optimize(copy.deepcopy(model), dtype=OURS_NARROW.get(runtime)))
        except ValueError as reason:
            raise Refused(str(reason)) from None
    if runtime == PADDED:
        return padded_to(forward(model), 384, model.config.pad_token_id)
    return build_cpu_rival(runtime, model, samples, folder)


def row_facts(timings: dict[str, Timing], entries: list[Contender], peak: float) -> dict[str, Row]:
    """Each runner's fields besides its times: the best rival of its model and precision, and its rate of real
    work."""
    rows: dict[str, Row] = {}
    for entry in entries:
        timing = timings[entry.name]
        rivals = [
            rival.name
            for rival in entries
            if rival.runtime not in (OURS, *OURS_NARROW)
            and (rival.model, rival.precision) == (entry.model, entry.precision)
        ]
        flops = 2.0 * sum(entry.shape.macs(lengths) for lengths in timing.workload.batches)
        rate = timing.sequences_per_s / timing.workload.sequences * flops
        rows[entry.name] = {
            "runtime": entry.runtime,
            "model": entry.model,
            "precision": entry.precision,
            **harness.best_rival(timings, entry.name, rivals),
            "gflops": round(rate / 1e9, 1),
            "peak_gflops": round(peak / 1e9, 1),
            "percent_of_peak": round(100 * rate / peak, 1),
            **entry.facts,
        }
    return rows


def measure(
    source: Source,
    names: Sequence[str],
    chosen: list[Workload],
    arguments: argparse.Namespace,
    folder: Path,
    keep: Callable[[list[Row]], None],
) -> list[Row]:
    """All rows, shown as they come: those that were timed on each workload, then the refused runners. keep:
    is given the rows so far after each workload, for a run that stops early."""
    console, device = Console(), arguments.device
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    able, refused = contenders(source, names, device, folder, arguments.cache is not None)
    for row in refused:
        console.print(f"{row['runner']} is left out: {row['refused']}", markup=False, highlight=False)
    left_out = [{"workload": "all", **row, **harness.stamp()} for row in refused]
    how = {"device": device, **({"clock": "cpu"} if arguments.cpu_time else {})}
    timed: list[Row] = []
    peak = 0.0
    for workload in chosen:
        # The largest so far: one that was measured while something else ran is too low to bound anything.
        peak = max(peak, harness.ceilings(torch.float32, device, clock)["flops"])
        entries = [e for e in able if e.runtime != PADDED or workload.name.startswith("arrival")]
        inputs = workload.inputs(source.config.vocab_size, source.config.pad_token_id, device)
        runners = {entry.name: entry.run for entry in entries}
        timings = harness.interleaved(
            runners, workload, inputs, arguments.rounds, cpu_time=arguments.cpu_time
        )
        first = f"{'hf' if 'hf' in names else OURS} {source.names[0]}"
        rows = harness.rows(timings, first, row_facts(timings, entries, peak))
        console.print(screen_table(workload, rows))
        timed += rows
        # Timed rows first: the header takes its order from them.
        keep([row | how for row in (*timed, *left_out)])
    return [row | how for row in (*timed, *left_out)]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_models(parser)
    _add_measuring(parser)
    return checked(parser, parser.parse_args(argv))


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense", default="build/demo.teacher", help="fine-tuned stock checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--pruned", default="build/demo",
        help="checkpoint pruned from it; 'none' leaves it out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--random", choices=tuple(SIZES),
        help="random weights of this size of BERT, or of this family in its base size, dense and half of it, "
        "instead of checkpoints, because speed does not depend on the weights (with --data, the tokenizer of "
        "--dense is still read)",
    )  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", choices=("dense", "pruned"), default=["dense", "pruned"],
        help="which of the two (default: both)",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="SQuAD file for real lengths (default: fixed lengths only)")
    parser.add_argument("--cache", type=Path, help="folder to keep exported models in, for a later run")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rivals", nargs="+", default=["hf"], metavar="NAME",
        choices=(*dict.fromkeys((*CPU_RIVALS, *CUDA_RIVALS)), "all", "none"),
        help=f"runtimes to compare with, or all, or none: on the CPU of {', '.join(CPU_RIVALS)}; with "
        f"--device cuda or --goals of {', '.join(CUDA_RIVALS)} (default: hf)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where models run (default: %(default)s)"
    )
    parser.add_argument("--goals", action="store_true", help="the benchmark of the GPU's goals, on the CPU")
    parser.add_argument(
        "--workloads", nargs="+", default=["*"], help="their names or patterns, as arrival-* (default: all)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, help="times that every workload runs (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the batches: a look, not a result")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="time what this process computes, with one thread (OMP_NUM_THREADS=1), beside other work",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=above(0),
        help="leave out what is not begun by then; with --device cuda or --goals (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory of ours and hf over 1,000 batches instead"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )


def checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with --goals set on a GPU and the rivals by name; the parser's error where they do not go
    together."""
    if len(arguments.rivals) > 1 and {"all", "none"} & set(arguments.rivals):
        parser.error("--rivals takes names, or all, or none")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if arguments.models == ["pruned"] and arguments.pruned == "none" and arguments.random is None:
        parser.error("--models pruned: --pruned none leaves that model out, so that there is none to time")
    if arguments.memory and arguments.out is not None:
        parser.error("--out: --memory prints what it measures, and writes no file")
    for name in ("rivals", "rounds", "minutes", "cpu_time"):
        if arguments.memory and getattr(arguments, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option}: --memory counts the memory of ours and hf, and times nothing")
    arguments.goals = arguments.goals or arguments.device == "cuda"
    if arguments.minutes is not None and not arguments.goals:
        parser.error("--minutes goes with --device cuda or --goals")
    if arguments.cpu_time and (arguments.goals or torch.get_num_threads() != 1):
        parser.error("--cpu-time counts one thread of this process alone: set OMP_NUM_THREADS=1")
    apart = [name for name in arguments.rivals if name == "all" or name.startswith("ctranslate2")]
    if arguments.cpu_time and apart:
        parser.error("--cpu-time does not count what ctranslate2 computes, in a process of its own")
    known = CUDA_RIVALS if arguments.goals else CPU_RIVALS
    for name in arguments.rivals:
        if name not in (*known, "all", "none"):
            parser.error(f"--rivals {name}: here there are {', '.join(known)}")
    arguments.rivals = {"all": list(known), "none": []}.get(arguments.rivals[0], arguments.rivals)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 where ours was wrong or failed."""
    arguments = parsed(argv)
    logging.set_verbosity_error()
    source = Source(arguments.dense, arguments.pruned, arguments.random, tuple(arguments.models))
    lengths = None
    if arguments.data is not None:
        lengths = arrival_lengths(arguments.data, arguments.dense)
    else:
        print("arrival order is left out: its lengths come from --data")
    if arguments.goals:
        chosen = goal_workloads(lengths, arguments.quick, arguments.workloads)
    else:
        longest = source.config.max_position_embeddings
        chosen = workloads(lengths, arguments.quick, arguments.workloads, longest)
    if arguments.memory:
        report_memory(source, chosen[0], arguments.device)
        return 0
    names = arguments.rivals
    kind = "goals" if arguments.goals and arguments.device == "cpu" else "models"
    stem = f"{kind}-random-{arguments.random}" if arguments.random else kind
    out = harness.out_path(arguments.out, stem, arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        if arguments.goals:
            rows = measure_goals(source, names, chosen, arguments, folder, shown_and_kept(out))
        else:
            if "hf" in names and any(workload.name.startswith("arrival") for workload in chosen):
                names = [*names, PADDED]
            rows = measure(source, names, chosen, arguments, folder, partial(write_report, out))
    write_report(out, rows)
    print(f"written to {out}, {out.with_suffix('.md').name} and {out.with_suffix('.png').name}")
    return int(any("fault" in row or row.get("without_graph") for row in rows))


def shown_and_kept(out: Path) -> Callable[[Workload, list[Row]], None]:
    """A function that shows a workload's rows and writes all rows so far, so that a run that stops early
    keeps them."""
    console, kept = Console(), dict[str, list[Row]]()

    def show(workload: Workload, rows: list[Row]) -> None:
        kept[workload.name] = rows  # measured anew beside slower rivals, it replaces what was there
        timed = [row for row in rows if "refused" not in row]
        if timed:
            console.print(screen_table(workload, timed))
            write_report(out, sorted(sum(kept.values(), []), key=lambda row: "refused" in row))
        for row in rows:
            if reason := why_left_out(row):
                console.print(reason, markup=False, highlight=False, soft_wrap=True)

    return show


def why_left_out(row: Row) -> str | None:
    """The line on a row that is not as it should be. Where ours is at fault, it begins WRONG or FAILED."""
    if "fault" in row:
        return f"{row['fault']}  {row['workload']}  {row['runner']}: {row['refused']}"
    if row.get("without_graph"):
        batches = row["without_graph"]
        return f"{FAILED}  {row['workload']}  {row['runner']}: {batches} batches ran without a graph"
    return f"{row['runner']} is left out: {row['refused']}" if "refused" in row else None


if __name__ == "__main__":
    harness.run(main)
