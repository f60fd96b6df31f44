"""What int8 costs in answers: F1 and span F1 of a checkpoint in fp32 and int8, and how near the logits stay.

Ours with every linear in int8, and with what a calibration on training questions leaves in it; rivals' int8
by their logits on the same real batches. The null threshold is chosen on the validation file, in fp32.
Usage: python benchmarks/bench_int8.py CHECKPOINT ... --data SQUAD_FOLDER
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import harness
import pruned_ops
from pruned_trainer.jobs.output import load_model, load_tokenizer
from pruned_trainer.tasks.squad.examples import load_squad
from pruned_trainer.tasks.squad.task import Questions
from pruned_trainer.training.batches import pad_batch
from rivals import cpu as cpu_rivals

CALIBRATION, COMPARED = 4, 8  # batches of 8 windows
RIVALS = ("ort-int8", "openvino-int8", "openvino-int8-static")


def prepared(path: Path, checkpoint: str, questions: int | None = None) -> Questions:
    examples = load_squad(path).examples
    return Questions.cut(examples[:questions], load_tokenizer(checkpoint), 384, 128)


def batches(source: Questions, model: Any, count: int) -> list[cpu_rivals.Batch]:
    """Evenly spread windows, in batches of 8."""
    step = max(1, len(source.windows) // (8 * count))
    chosen = source.windows[::step][: 8 * count]
    features = [
        {"input_ids": w.input_ids, "token_type_ids": w.token_type_ids, "attention_mask": [1] * len(w)}
        for w in chosen
    ]
    return [pad_batch(features[i : i + 8], model.config.pad_token_id) for i in range(0, len(chosen), 8)]


def measure(checkpoint: str, data: Path, names: list[str]) -> list[dict[str, Any]]:
    model = load_model(checkpoint)
    evaluation = prepared(data / "eval.json", checkpoint)
    thresholds = prepared(data / "validation.json", checkpoint).best_thresholds(model)
    calibration = batches(prepared(data / "train.json", checkpoint, 2000), model, CALIBRATION)
    # Of one token type, which is all that the rivals' graph knows.
    real = [
        {name: batch[name] for name in ("input_ids", "attention_mask")}
        for batch in batches(evaluation, model, COMPARED)
    ]
    made: list[dict[str, Any]] = []

    def row(runner: str, run: cpu_rivals.Run, **facts: Any) -> None:
        near = cpu_rivals.compared(run, cpu_rivals.hf(model, [], Path()), real, "int8")
        made.append(
            {"checkpoint": Path(checkpoint).name, "runner": runner, **near, **facts, **harness.stamp()}
        )

    for runner, arguments in (
        ("ours fp32", {}),
        ("ours int8", {"dtype": "int8"}),
        ("ours int8, calibrated", {"dtype": "int8", "calibration": calibration}),
    ):
        fast = pruned_ops.optimize(copy.deepcopy(model), **arguments)
        scores = evaluation.evaluate(fast, thresholds)
        encoder = fast.base_model.encoder
        row(
            runner,
            cpu_rivals.hf(fast, [], Path()),
            f1=scores.f1,
            f1_span=scores.f1_span,
            int8_linears=len(encoder.int8_linears),
            linears=len(encoder.linear_names),
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                row(name, cpu_rivals.build(name, model, real, Path(folder)))
            except cpu_rivals.Refused as reason:
                print(f"{name} is left out: {reason}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.json, validation.json, eval.json"
    )
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    made = [row for one in arguments.checkpoints for row in measure(one, arguments.data, arguments.rivals)]
    table = Table("checkpoint", "runner", "F1", "span F1", "int8 linears", "cosine to fp32")
    for one in made:
        shown = (f"{one[key]:.2f}" if key in one else "-" for key in ("f1", "f1_span"))
        linears = f"{one['int8_linears']} of {one['linears']}" if "linears" in one else "-"
        table.add_row(one["checkpoint"], one["runner"], *shown, linears, f"{one['cosine']:.6f}")
    Console().print(table)
    out = arguments.out or harness.result_path("int8", "cpu")
    harness.write_rows(out, made)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
