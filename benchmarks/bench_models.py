"""Whole models, the same weights dense and pruned: our runtime beside those that a user would take instead.

Real lengths in arrival order at batch 1, 8 and 32 (a SQuAD file's questions, shuffled); all 128 or 384.
Every runner's logits are compared with Hugging Face's before it is timed; all are timed in one process, batch
by batch in turn, with a short rest between. Writes a CSV with a row for each, a Markdown table and a figure.
On a GPU (--device cuda) it is another benchmark, of the goals' workloads in fp16 with other rivals:
cuda_models.py; --goals runs that on the CPU, in fp32, where most rivals refuse.
Usage: python benchmarks/bench_models.py --dense TEACHER --pruned OUT --data SQUAD/eval.json --rivals all
       python benchmarks/bench_models.py --device cuda --random large --rivals all --minutes 8
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

import harness
import pruned_ops
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.stock import model_shape
from pruned_ops.shape import ModelShape
from rivals import cpu as cpu_rivals
from rivals.cuda import CUDA_RIVALS
from whole_models import memory
from whole_models import on_gpu as cuda_models
from whole_models import report as model_tables
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

OURS = "ours"
OURS_INT8 = "ours-int8"
# What a service without dynamic shapes would do, and one goal is stated against. Arrival order only.
PADDED = "hf padded to 384"


@dataclass(frozen=True)
class Contender:
    """A runner of one model, checked. facts: fields of its rows."""

    runtime: str
    model: str
    precision: str
    run: cpu_rivals.Run
    shape: ModelShape
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.model}"


def contenders(
    source: Source, names: Sequence[str], device: str, folder: Path, cached: bool
) -> tuple[list[Contender], list[dict[str, str]]]:
    """Ours and each rival on each model of the source; and, for each that cannot run, a sentence why.

    Errors: ValueError where a runner's logits are not Hugging Face's."""
    made, refusals = [], []
    for model_name in source.names:
        model = source.load(model_name, device)
        files = folder / (fingerprint(model) if cached else model_name)
        samples = SAMPLES.inputs(model.config.vocab_size, model.config.pad_token_id, device)
        int8 = [OURS_INT8] if device == "cpu" else []
        for runtime in (OURS, *int8, *(name for name in names if name != PADDED or model_name == "dense")):
            try:
                made.append(_contender(runtime, model_name, model, samples, files))
            except cpu_rivals.Refused as reason:
                who = {"runner": f"{runtime} {model_name}", "runtime": runtime, "model": model_name}
                refusals.append(who | {"refused": str(reason)})
    return made, refusals


def _contender(
    runtime: str, model_name: str, model: Any, samples: Sequence[cpu_rivals.Batch], folder: Path
) -> Contender:
    precision = cpu_rivals.RIVALS[runtime].precision if runtime in cpu_rivals.RIVALS else "fp32"
    precision = "int8" if runtime == OURS_INT8 else precision
    with torch.inference_mode():
        run = _runner(runtime, model, samples, folder)
    try:
        facts = cpu_rivals.compared(run, cpu_rivals.hf(model, samples, folder), samples, precision)
    except ValueError as error:
        raise ValueError(f"{runtime} {model_name}: {error}") from error
    shape = model_shape(model)
    return Contender(runtime, model_name, precision, run, shape, _backends(run, samples) | facts)


def _runner(runtime: str, model: Any, samples: Sequence[cpu_rivals.Batch], folder: Path) -> cpu_rivals.Run:
    if runtime == OURS:
        return cpu_rivals.hf(pruned_ops.optimize(copy.deepcopy(model)), samples, folder)
    if runtime == OURS_INT8:
        try:
            return cpu_rivals.hf(pruned_ops.optimize(copy.deepcopy(model), dtype="int8"), samples, folder)
        except ValueError as reason:
            raise cpu_rivals.Refused(str(reason)) from None
    if runtime == PADDED:
        return padded_to(cpu_rivals.hf(model, samples, folder), 384, model.config.pad_token_id)
    return cpu_rivals.build(runtime, model, samples, folder)


def _backends(run: cpu_rivals.Run, samples: Sequence[cpu_rivals.Batch]) -> dict[str, Any]:
    """Which backend ran each op, where the runner has ops."""
    with torch.inference_mode(), pruned_ops.record() as ran:
        run(samples[0])
    return {"backends": "; ".join(f"{op}: {', '.join(counts)}" for op, counts in ran.items()) or "its own"}


def compared(timings: dict[str, Timing], entries: list[Contender], peak: float) -> dict[str, dict[str, Any]]:
    """Each runner's fields besides its times: the best rival of its model and precision, and the rate of real
    work."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        timing = timings[entry.name]
        others: dict[str, list[str]] = {"fp32": [], "int8": []}
        for other in entries:
            if other.runtime not in (OURS, OURS_INT8) and other.model == entry.model:
                others[other.precision].append(other.name)
        best = harness.best_rival(timings, entry.name, others[entry.precision])
        flops = 2.0 * sum(entry.shape.macs(lengths) for lengths in timing.workload.batches)
        rate = timing.sequences_per_s / timing.workload.sequences * flops
        found[entry.name] = {
            **{"runtime": entry.runtime, "model": entry.model, "precision": entry.precision},
            **best,
            "gflops": round(rate / 1e9, 1),
            "peak_gflops": round(peak / 1e9, 1),
            "percent_of_peak": round(100 * rate / peak, 1),
            **entry.facts,
        }
    return found


def measure(
    source: Source, names: Sequence[str], chosen: list[Workload], arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """All rows, shown as they come: the refusals, and every workload."""
    console, device, made = Console(), arguments.device, []
    peak = harness.ceilings(torch.float32, device)["flops"]
    console.print(f"ceiling here: {peak / 1e9:.0f} GFLOP/s in torch's fp32 products")
    found, refusals = contenders(source, names, device, folder, arguments.cache is not None)
    for refusal in refusals:
        console.print(f"{refusal['runner']} is left out: {refusal['refused']}", markup=False, highlight=False)
        made.append({"workload": "all", **refusal, **harness.stamp(), "device": device})
    for workload in chosen:
        entries = [one for one in found if one.runtime != PADDED or workload.name.startswith("arrival")]
        inputs = workload.inputs(source.config.vocab_size, source.config.pad_token_id, device)
        timings = harness.interleaved(
            {one.name: one.run for one in entries}, workload, inputs, arguments.rounds
        )
        first = "hf dense" if "hf" in names else "ours dense"
        rows = harness.rows(timings, first, compared(timings, entries, peak))
        console.print(model_tables.for_screen(workload, rows))
        made += [row | {"device": device} for row in rows]
    # Timed rows first: the header takes its order from them.
    return sorted(made, key=lambda row: "refused" in row)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", default="build/demo.teacher", help="fine-tuned stock checkpoint")
    parser.add_argument("--pruned", default="build/demo", help="pruned checkpoint; 'none' leaves it out")
    parser.add_argument(
        "--random",
        choices=tuple(SIZES),
        help="random weights of this size, dense and half of it, instead of checkpoints: which they are "
        "costs no time (with --data, --dense is still read for its tokenizer)",
    )
    parser.add_argument("--data", type=Path, help="SQuAD file for real lengths (default: fixed lengths only)")
    parser.add_argument(
        "--rivals",
        nargs="+",
        default=["hf"],
        choices=(*dict.fromkeys((*cpu_rivals.RIVALS, *CUDA_RIVALS)), "all", "none"),
        help="runtimes to compare with (default: hf)",
    )
    parser.add_argument("--goals", action="store_true", help="the GPU's benchmark, on the CPU")
    parser.add_argument(
        "--minutes", type=float, help="with --device cuda or --goals: what is not begun by then is left out"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workloads", nargs="+", default=["*"], help="names or patterns, as arrival-*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="an eighth of the batches: a look, not a result")
    parser.add_argument("--cache", type=Path, help="folder to keep and reuse exported models in")
    parser.add_argument(
        "--memory", action="store_true", help="instead: memory of ours and hf over 1,000 batches"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV (default: benchmarks/results/, named after the machine)"
    )
    return checked(parser, parser.parse_args(argv))


def checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """What goes together, and the names of the rivals; the parser's error for what does not."""
    if len(arguments.rivals) > 1 and {"all", "none"} & set(arguments.rivals):
        parser.error("--rivals takes names, or all, or none")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    arguments.goals = arguments.goals or arguments.device == "cuda"
    if arguments.minutes is not None and not arguments.goals:
        parser.error("--minutes goes with --device cuda or --goals")
    known = CUDA_RIVALS if arguments.goals else cpu_rivals.RIVALS
    for name in arguments.rivals:
        if name not in (*known, "all", "none"):
            parser.error(f"--rivals {name}: here there are {', '.join(known)}")
    arguments.rivals = {"all": list(known), "none": []}.get(arguments.rivals[0], arguments.rivals)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    logging.set_verbosity_error()
    source = Source(arguments.dense, arguments.pruned, arguments.random)
    lengths = None
    if arguments.data is not None:
        lengths = arrival_lengths(arguments.data, arguments.dense)
    else:
        print("arrival order is left out: its lengths come from --data")
    chosen = (goal_workloads if arguments.goals else workloads)(lengths, arguments.quick, arguments.workloads)
    if arguments.memory:
        memory.report(source, chosen[0], arguments.device)
        return
    names = arguments.rivals
    kind = "goals" if arguments.goals and arguments.device == "cpu" else "models"
    stem = f"{kind}-random-{arguments.random}" if arguments.random else kind
    out = arguments.out or harness.result_path(stem, arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        if arguments.goals:
            made = cuda_models.measure(source, names, chosen, arguments, folder, shown_and_kept(out))
        else:
            if "hf" in names and any(workload.name.startswith("arrival") for workload in chosen):
                names = [*names, PADDED]
            made = measure(source, names, chosen, arguments, folder)
    write(out, made)
    print(f"written to {out}, {out.with_suffix('.md').name} and {out.with_suffix('.png').name}")


def shown_and_kept(out: Path) -> Callable[[Workload, list[dict[str, Any]]], None]:
    """Shows a workload's rows when they are there, and writes all so far: who stops early keeps them."""
    console, kept = Console(), dict[str, list[dict[str, Any]]]()

    def show(workload: Workload, rows: list[dict[str, Any]]) -> None:
        kept[workload.name] = rows  # measured anew beside slower rivals, it replaces what was there
        timed = [row for row in rows if "refused" not in row]
        if timed:
            console.print(model_tables.for_screen(workload, timed))
            write(out, sorted(sum(kept.values(), []), key=lambda row: "refused" in row))
        for row in rows:
            if "refused" in row:
                text = f"{row['runner']} is left out: {row['refused']}"
                console.print(text, markup=False, highlight=False)

    return show


def write(out: Path, made: list[dict[str, Any]]) -> None:
    """CSV, Markdown and PNG."""
    harness.write_rows(out, made)
    if any("refused" not in row for row in made):
        out.with_suffix(".md").write_text(model_tables.markdown(made), encoding="utf-8")
    reason = model_tables.draw(made, out.with_suffix(".png"))
    if reason is not None:
        print(reason)


if __name__ == "__main__":
    main()
