"""What models lose that `pruned-trainer sweep` or `prune` made on SQuAD data, beside the dense model and a
control: the dense model, trained on for some minutes as they were.

Each model is scored on eval.json, with the null threshold that is best for it on validation.json; the losses
have 95% intervals over the questions. All are timed in turn, in fp32, in batches of 8 as the questions come.
Steps and minutes are those that the runs reported.
Usage: python benchmarks/bench_family.py FAMILY [OUT ...] --dense TEACHER --data SQUAD_FOLDER [--control OUT]
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

import harness
from bench_int8 import prepared
from harness import Row
from option_types import at_least
from presentation import counted, table
from pruned_ops.checkpoints.loading import check_source, load_model
from pruned_ops.files import read_json, write_whole
from pruned_ops.measure.timing import Workload
from pruned_ops.models.model_card import REPORT
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.jobs.evaluation import model_facts, time_models
from pruned_trainer.jobs.job import BATCH_SIZE, TIMED_BATCHES
from pruned_trainer.tasks.squad.metrics import EvaluationResult

SCORES = {"f1": "F1", "f1_span": "span F1"}
DENSE, CONTROL = "dense", "control"
SWEEP = "sweep.json"  # what `pruned-trainer sweep` leaves


def scored(model: Any, checkpoint: str, data: Path, questions: int | None = None) -> EvaluationResult:
    """What the model of a checkpoint reaches on the evaluation questions, or on so many of them, drawn with
    seed 0."""
    validation, evaluation = (
        prepared(data / name, checkpoint, questions) for name in ("validation.json", "eval.json")
    )
    with optimized(model) as fast:
        return evaluation.evaluate(fast, validation.best_thresholds(fast))


def facts(report: dict[str, Any]) -> Row:
    """What a run says of the model that it made."""
    plan = report["plan"]
    return {
        "asked": ", ".join(f"{unit} {value:g}" for unit, value in report["target"]["asked"].items()),
        "layers": " ".join(f"{layer['num_heads']}/{layer['ffn_width']}" for layer in report["shape"]),
        "gate_steps": plan["gate_steps"], "retrain_steps": plan["retrain_steps"],
        "minutes": round(report["training"]["minutes"], 1), "run": without_folders(report["command"]),
    }  # fmt: skip


def measured(models: dict[str, Any], lengths: Sequence[int]) -> dict[str, Row]:
    """How many times as fast as the dense model each one is, and the share of its multiply-accumulates."""
    workload = Workload.arrival_order(lengths, min(BATCH_SIZE, len(lengths)), TIMED_BATCHES)
    timings, _ = time_models(models, workload)
    macs = {name: model_facts(model, lengths)["macs"] for name, model in models.items()}
    rows = {}
    for name in models.keys() - {DENSE}:
        low, high = timings[name].speedup_interval(timings[DENSE])
        rows[name] = {
            "times_as_fast": round(timings[name].speedup_over(timings[DENSE]), 4),
            "times_as_fast_low": round(low, 4), "times_as_fast_high": round(high, 4),
            "macs": round(macs[name] / macs[DENSE], 4),
        }  # fmt: skip
    return rows


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


def models_in(family: Path) -> dict[str, Path]:
    """The folders of the models that a sweep made, by their names; or the one that a prune made."""
    if not (family / SWEEP).is_file():
        return {family.resolve().name: family}
    points = read_json(family / SWEEP, "sweep")["points"]
    return {point["folder"]: family / point["folder"] for point in points}


def measure(
    families: Sequence[Path], dense: str, control: Path | None, data: Path, questions: int | None
) -> list[Row]:
    """A row for the dense model, for the control, and for each model of the families."""
    folders = {} if control is None else {CONTROL: control}
    for family in families:
        for name, folder in models_in(family).items():
            folders[f"{family.resolve().name}/{name}" if name in folders else name] = folder
    reports = {name: read_json(folder / REPORT, "report") for name, folder in folders.items()}
    sources = {DENSE: dense, **{name: str(folder) for name, folder in folders.items()}}
    models = {name: load_model(source) for name, source in sources.items()}
    results = {name: scored(models[name], source, data, questions) for name, source in sources.items()}
    speeds = measured(models, prepared(data / "eval.json", dense, questions).arrival_lengths())
    rows = []
    for name, result in results.items():
        row: Row = {"model": name, **{score: round(getattr(result, score), 3) for score in SCORES}}
        for against in (DENSE, CONTROL):
            if against in results and name not in (DENSE, against):
                row |= losses(result, results[against], against)
        row |= {**speeds[name], **facts(reports[name])} if name in reports else {}
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
        "number is a loss. Steps are those of the run's gates (or minibatches scored) and those of the "
        "narrow model after them; minutes are counted from the run's start to the model's end. A gradual "
        "sweep divides its gate steps among the models, and each model has also had the steps of those above "
        f"it. All were timed in turn, in batches of 8, on an {rows[0]['machine_processor']}, "
        f"{counted(rows[0]['machine_threads'], 'thread')}."
    )
    if CONTROL in against:
        words += " The control is the dense model, trained on with the same teacher."
    commands = dict.fromkeys(f"- `{row['run']}`" for row in rows if "run" in row)
    layers = [f"- {row['model']}: {row['layers']}" for row in rows if "layers" in row]
    title = "# What the models of a family lose"
    return [title, "", words, "", *table(header, lines), "Heads/FFN width of each layer:", "", *layers, "",
            "The runs:", "", *commands]  # fmt: skip


def command_of(arguments: argparse.Namespace) -> str:
    """The command, without this machine's paths, so that it can be repeated elsewhere."""
    words = "python benchmarks/bench_family.py FAMILY"
    words += " OUT" * (len(arguments.family) - 1) + " --dense TEACHER --data SQUAD"
    words += " --control OUT" if arguments.control else ""
    return words + (f" --questions {arguments.questions}" if arguments.questions else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "family",
        type=Path,
        nargs="+",
        metavar="FAMILY",
        help="folders that pruned-trainer sweep or prune made",
    )
    parser.add_argument("--dense", required=True, metavar="TEACHER", help="the model that was pruned")
    parser.add_argument("--data", type=Path, required=True, help="folder with validation.json and eval.json")
    parser.add_argument(
        "--control", type=Path, metavar="OUT",
        help="folder of the dense model, trained on: prune --recipe random --macs 0.999 (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--questions", type=at_least(1), metavar="N", help="of validation and evaluation each (default: all)"
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
