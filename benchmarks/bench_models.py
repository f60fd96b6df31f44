"""Whole models, the same weights dense and pruned: Hugging Face eager (sdpa, padded) against our runtime.

Real lengths in arrival order at batch 1, 8 and 32 (a SQuAD file's questions, shuffled); all 128 or 384.
Usage: python benchmarks/bench_models.py --dense TEACHER --pruned OUT --data SQUAD/eval.json
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import harness
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import pruned_ops
from pruned_ops.measure import Timing, Workload, interleave
from pruned_trainer.evaluation import Prepared
from pruned_trainer.loading import load_model, load_tokenizer
from pruned_trainer.tasks.squad import load_squad

RIVAL = "HF eager dense"
# Sequences a round: enough batches for a stable sum, few enough for a round of seconds.
SEQUENCES = {1: 48, 8: 128, 32: 256}


def workloads(lengths: list[int] | None, quick: bool) -> list[Workload]:
    """Arrival order where lengths are given, and fixed lengths."""
    made = []
    for batch_size, sequences in SEQUENCES.items():
        batches = max(1, sequences // batch_size // (8 if quick else 1))
        if lengths is not None:
            made.append(Workload.arrival_order(lengths, batch_size, batches))
        if batch_size == 8:
            made += [Workload.fixed(length, batch_size, max(1, batches // 4)) for length in (128, 384)]
    return made


def runners(dense: Any, pruned: Any | None) -> dict[str, Any]:
    """Stock models as they are (sdpa is their default), and optimised copies of the same weights."""
    models = {RIVAL: dense, "ours dense": pruned_ops.optimize(copy.deepcopy(dense))}
    if pruned is not None:
        models["torch pruned, padded"] = pruned
        models["ours pruned"] = pruned_ops.optimize(copy.deepcopy(pruned))
    return {name: (lambda batch, model=model: model(**batch)) for name, model in models.items()}


def backends(run: dict[str, Any], batch: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Which backend ran each op, for the runners that have ops."""
    found = {}
    for name, runner in run.items():
        with pruned_ops.record() as ran:
            runner(batch)
        found[name] = {
            "backends": "; ".join(f"{op}: {', '.join(counts)}" for op, counts in ran.items()) or "torch"
        }
    return found


def show(timings: dict[str, Timing]) -> Table:
    workload = next(iter(timings.values())).workload
    table = Table(title=f"{workload.name}: {workload.sequences} sequences, {workload.tokens} tokens a round")
    for column in ("", "ms/batch p50 (p20-p80)", "sequences/s", f"vs {RIVAL}"):
        table.add_column(column, justify="right" if column else "left")
    for name, timing in timings.items():
        spread = f"{timing.ms(50):.1f} ({timing.ms(20):.1f}-{timing.ms(80):.1f})"
        table.add_row(
            name, spread, f"{timing.sequences_per_s:.1f}", f"{timing.speedup_over(timings[RIVAL]):.2f}x"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", default="build/demo.teacher", help="fine-tuned stock checkpoint")
    parser.add_argument("--pruned", default="build/demo", help="pruned checkpoint; 'none' leaves it out")
    parser.add_argument("--data", type=Path, help="SQuAD file for real lengths (default: fixed lengths only)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="an eighth of the batches: a look, not a result")
    parser.add_argument(
        "--out", type=Path, help="CSV (default: benchmarks/results/, named after the machine)"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    dense = load_model(arguments.dense)
    pruned = None if arguments.pruned == "none" else load_model(arguments.pruned)
    lengths = None
    if arguments.data is not None:
        tokenizer = load_tokenizer(arguments.dense)
        lengths = Prepared.cut(load_squad(arguments.data).examples, tokenizer, 384, 128).arrival_lengths()
    run, console, made = runners(dense, pruned), Console(), []
    for workload in workloads(lengths, arguments.quick):
        inputs = workload.inputs(dense.config.vocab_size, dense.config.pad_token_id)
        timings = interleave(run, workload, inputs, arguments.rounds)
        console.print(show(timings))
        made += harness.rows(timings, RIVAL, backends(run, inputs[0]))
    out = arguments.out or harness.result_path("models")
    harness.write(out, made)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
