"""What int8 and bfloat16 cost in answers: F1 and span F1 of a checkpoint, and how near the logits stay.

Our runtime runs in fp32, in bfloat16 where the processor has it, and in int8 with every linear layer in it,
and with those that a calibration on training questions leaves in it. Rivals' int8 is calibrated on the same
questions, and judged by its logits on evaluation questions, as ours is. The null threshold is chosen on the
validation file, in fp32, or given.
Usage: python benchmarks/bench_int8.py CHECKPOINT ... --data SQUAD_FOLDER
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import harness
import pruned_ops
from harness import Row
from option_types import at_least
from pruned_ops.checkpoints.loading import check_source, load_model, load_tokenizer
from pruned_ops.runtime.batch_runner import padded
from pruned_trainer.tasks.squad.examples import load_squad
from pruned_trainer.tasks.squad.task import THRESHOLD, Questions
from rivals.cpu import build_cpu_rival
from rivals.rival import Batch, Refused, Run, compare_logits, forward

CALIBRATION, COMPARED = 4, 8  # batches of 8 windows
# The arguments of `optimize` for each of ours, but for the calibration itself.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int8, calibrated": {"dtype": "int8"},
}
RIVALS = ("ort-int8", "openvino-int8", "openvino-int8-static")


def prepared(path: Path, checkpoint: str, questions: int | None = None) -> Questions:
    """The windows of a SQuAD file, or of so many of its questions, drawn with seed 0."""
    examples = load_squad(path).examples
    if questions is not None and questions < len(examples):
        examples = random.Random(0).sample(examples, questions)
    return Questions.cut(examples, load_tokenizer(checkpoint), 384, 128)


def batches(source: Questions, model: Any, count: int) -> list[Batch]:
    """`count` batches of 8 windows, which are spread evenly over the source."""
    number, size = len(source.windows), min(8 * count, len(source.windows))
    chosen = [source.windows[place * number // size] for place in range(size)]
    return [padded(chosen[i : i + 8], model.config.pad_token_id) for i in range(0, len(chosen), 8)]


def without_types(whole: list[Batch]) -> list[Batch]:
    """The batches as the rivals' graph takes them, which knows one token type alone."""
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in whole]


def measure(checkpoint: str, arguments: argparse.Namespace) -> list[Row]:
    """The rows of one checkpoint: ours in the precisions asked for, then the named rivals that can run."""
    model, data, questions = load_model(checkpoint), arguments.data, arguments.questions
    evaluation = prepared(data / "eval.json", checkpoint, questions)
    thresholds = {THRESHOLD: arguments.threshold}
    if arguments.threshold is None:
        fast = pruned_ops.optimize(copy.deepcopy(model))
        thresholds = prepared(data / "validation.json", checkpoint, questions).best_thresholds(fast)
    real, calibration = without_types(batches(evaluation, model, COMPARED)), list[Batch]()
    if arguments.rivals or "int8, calibrated" in arguments.precisions:
        calibration = batches(prepared(data / "train.json", checkpoint, 2000), model, CALIBRATION)

    def row(runner: str, run: Run, facts: Row) -> Row:
        errors = compare_logits(run, forward(model), real, "int8")
        origin = {"questions": len(evaluation.examples), **harness.stamp()}
        return {"checkpoint": Path(checkpoint).name, "runner": runner, **errors, **facts, **origin}

    runs = ours(model, evaluation, thresholds, arguments.precisions, calibration)
    rows = [row(runner, run, facts) for runner, run, facts in runs]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.rivals:
            try:
                run = build_cpu_rival(name, model, without_types(calibration), Path(folder))
                rows.append(row(name, run, {}))
            except Refused as reason:
                print(f"{name} is left out: {reason}")
    return rows


def ours(
    model: Any,
    evaluation: Questions,
    thresholds: dict[str, float],
    precisions: list[str],
    calibration: list[Batch],
) -> Iterator[tuple[str, Run, Row]]:
    """Name, runner and scores of our runtime in each of these precisions."""
    for precision in precisions:
        arguments, runner = dict(PRECISIONS[precision]), f"ours {precision}"
        if precision == "int8, calibrated":
            arguments["calibration"] = calibration
        try:
            fast = pruned_ops.optimize(copy.deepcopy(model), **arguments)
        except ValueError as reason:
            print(f"{runner} is left out: {reason}")
            continue
        scores = evaluation.evaluate(fast, thresholds)
        encoder = fast.base_model.packed.encoder
        counts = {"int8_linears": len(encoder.int8_linears), "linears": len(encoder.linear_names)}
        yield runner, forward(fast), {"f1": scores.f1, "f1_span": scores.f1_span, **counts}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="fine-tuned or pruned models")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.json, validation.json, eval.json"
    )
    parser.add_argument(
        "--questions",
        type=at_least(1),
        metavar="N",
        help="of validation and evaluation each, at most (default: all)",
    )
    parser.add_argument(
        "--threshold", type=float, help="the null threshold (default: the best on validation questions)"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS,
        help="ours to measure (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rivals", nargs="*", default=list(RIVALS), choices=RIVALS,
        help="runtimes to compare with; without names, none (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    out = harness.out_path(arguments.out, "int8", "cpu")
    logging.set_verbosity_error()
    for checkpoint in arguments.checkpoints:
        check_source(checkpoint)
    rows = [row for checkpoint in arguments.checkpoints for row in measure(checkpoint, arguments)]
    table = Table("checkpoint", "runner", "F1", "span F1", "int8 linears", "cosine to fp32")
    for row in rows:
        scores = (f"{row[key]:.2f}" if key in row else "-" for key in ("f1", "f1_span"))
        linears = f"{row['int8_linears']} of {row['linears']}" if "linears" in row else "-"
        table.add_row(row["checkpoint"], row["runner"], *scores, linears, f"{row['cosine']:.6f}")
    Console().print(table)
    harness.write_rows(out, rows)
    print(f"written to {out}")


if __name__ == "__main__":
    harness.run(main)
