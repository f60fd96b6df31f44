"""What the models of a family lose that `pruned-trainer sweep` made on SQuAD data, beside the dense model and
a control: the dense model, trained on for some minutes as they were.

Each model is scored on eval.json, with the null threshold that is best for it on validation.json; the losses
have 95% intervals over the questions. Speed, size and steps are those that the runs reported.
Usage: python benchmarks/bench_family.py FAMILY --dense TEACHER --data SQUAD_FOLDER [--control OUT]
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

import harness
import pruned_ops
from bench_int8 import prepared
from harness import Row
from presentation import counted, table
from pruned_ops.checkpoints.loading import check_source
from pruned_ops.files import read_json, write_whole
from pruned_ops.models.model_card import REPORT
from pruned_trainer.jobs.output import load_model
from pruned_trainer.tasks.squad.metrics import EvaluationResult

SCORES = {"f1": "F1", "f1_span": "span F1"}
DENSE, CONTROL = "dense", "control"


def scored(checkpoint: str, data: Path, questions: int | None = None) -> EvaluationResult:
    """What a checkpoint reaches on the evaluation questions, or on so many of them, drawn with seed 0."""
    model = pruned_ops.optimize(load_model(checkpoint))
    validation, evaluation = (
        prepared(data / name, checkpoint, questions) for name in ("validation.json", "eval.json")
    )
    return evaluation.evaluate(model, validation.best_thresholds(model))


def facts(report: dict[str, Any]) -> Row:
    """What a run says of the model that it made."""
    speed, plan, machine = report["speedup"], report["plan"], report["machine"]
    low, high = speed["interval"]
    return {
        "asked": ", ".join(f"{unit} {value:g}" for unit, value in report["target"]["asked"].items()),
        "times_as_fast": round(speed["reached"], 4), "times_as_fast_low": low, "times_as_fast_high": high,
        "timed_on": f"{machine['processor']}, {counted(machine['threads'], 'thread')}",
        "macs": round(report["pruned"]["macs"] / report["dense"]["macs"], 4),
        "layers": " ".join(f"{layer['num_heads']}/{layer['ffn_width']}" for layer in report["shape"]),
        "gate_steps": plan["gate_steps"], "retrain_steps": plan["retrain_steps"],
        "minutes": round(report["training"]["minutes"], 1), "run": without_folders(report["command"]),
    }  # fmt: skip


def without_folders(command: str) -> str:
    """A command with the names alone of files and folders whose place on this machine it tells."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in shlex.split(command)]
    return shlex.join(words)


def losses(model: EvaluationResult, other: EvaluationResult, against: str) -> Row:
    """The points that a model has lost against another."""
    row: Row = {}
    lost_points = other.losses(model)
    for score in SCORES:
        low, high = lost_points[f"{score}_loss_interval"]
        values = {"": lost_points[f"{score}_loss"], "_low": low, "_high": high}
        row |= {f"{score}_lost_to_{against}{end}": round(value, 3) for end, value in values.items()}
    return row


def measure(family: Path, dense: str, control: Path | None, data: Path, questions: int | None) -> list[Row]:
    """A row for the dense model, for the control, and for each model of the family."""
    points = read_json(family / "sweep.json", "sweep")["points"]
    folders = {point["folder"]: family / point["folder"] for point in points}
    reports = {name: read_json(folder / REPORT, "report") for name, folder in folders.items()}
    if control is not None:
        folders, reports = {CONTROL: control, **folders}, {CONTROL: read_json(control / REPORT), **reports}
    results = {DENSE: scored(dense, data, questions)}
    results |= {name: scored(str(folder), data, questions) for name, folder in folders.items()}
    rows = []
    for name, result in results.items():
        row: Row = {"model": name, **{score: round(getattr(result, score), 3) for score in SCORES}}
        for against in (DENSE, CONTROL):
            if against in results and name not in (DENSE, against):
                row |= losses(result, results[against], against)
        row |= facts(reports[name]) if name in reports else {}
        rows.append(row | {"questions": len(result.question_f1), **harness.stamp()})
    return rows


def page(rows: Sequence[Row]) -> list[str]:
    """The rows as Markdown."""

    def lost(row: Row, score: str, against: str) -> str:
        key = f"{score}_lost_to_{against}"
        if key not in row:
            return "-"
        return f"{row[key]:+z.2f} ({row[f'{key}_low']:+z.2f} to {row[f'{key}_high']:+z.2f})"

    against = [name for name in (DENSE, CONTROL) if any(f"f1_lost_to_{name}" in row for row in rows)]
    header = ["model", "times as fast", "MACs left", "steps of training, minutes"]
    for label in SCORES.values():
        header += [label, *(f"lost to {name}" for name in against)]
    lines = []
    for row in rows:
        cells = [str(row["model"]), "-", "-", "-"]
        if "minutes" in row:
            steps = f"{row['gate_steps']} + {row['retrain_steps']}, {row['minutes']:.0f}"
            cells[1:] = [f"{row['times_as_fast']:.2f}x", f"{row['macs']:.3f}", steps]
        for score in SCORES:
            cells += [f"{row[score]:.2f}", *(lost(row, score, name) for name in against)]
        lines.append(cells)
    words = (
        f"{rows[0]['questions']:,} questions; the intervals are over them, of one training. A positive "
        "number is a loss. Steps are those of the run's gates and those of the narrow model after them; "
        "minutes are counted from the run's start to the model's end. A gradual sweep divides its gate steps "
        "among the models, and each model has also had the steps of those above it."
    )
    if machines := dict.fromkeys(row["timed_on"] for row in rows if "timed_on" in row):
        words += f" The runs themselves timed the models: {'; '.join(machines)}."
    if CONTROL in against:
        words += " The control is the dense model, trained on with the same teacher."
    commands = dict.fromkeys(f"- `{row['run']}`" for row in rows if "run" in row)
    layers = [f"- {row['model']}: {row['layers']}" for row in rows if "layers" in row]
    title = "# What the models of a family lose"
    return [title, "", words, "", *table(header, lines), "Heads/FFN width of each layer:", "", *layers, "",
            "The runs:", "", *commands]  # fmt: skip


def command_of(arguments: argparse.Namespace) -> str:
    """The command, without this machine's paths, so that it can be repeated elsewhere."""
    words = "python benchmarks/bench_family.py FAMILY --dense TEACHER --data SQUAD"
    words += " --control OUT" if arguments.control else ""
    return words + (f" --questions {arguments.questions}" if arguments.questions else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", type=Path, metavar="FAMILY", help="folder that pruned-trainer sweep made")
    parser.add_argument("--dense", required=True, metavar="TEACHER", help="the model that was pruned")
    parser.add_argument("--data", type=Path, required=True, help="folder with validation.json and eval.json")
    parser.add_argument(
        "--control", type=Path, metavar="OUT",
        help="folder of the dense model, trained on: prune --recipe random --macs 0.999 (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=int, metavar="N", help="of validation and evaluation each (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    arguments = parser.parse_args()
    out = harness.out_path(arguments.out, "family", "cpu")
    logging.set_verbosity_error()
    check_source(arguments.dense)
    command = command_of(arguments)
    rows = measure(arguments.family, arguments.dense, arguments.control, arguments.data, arguments.questions)
    rows = [{**row, "command": command} for row in rows]
    harness.write_rows(out, rows)
    lines = [*page(rows), f"- `{command}`"]
    write_whole(out.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written to {out}")


if __name__ == "__main__":
    harness.run(main)
