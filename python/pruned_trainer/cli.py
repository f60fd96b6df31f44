"""pruned-trainer: prune | sweep | demo | finetune | compact | evaluate | report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from pruned_ops.files import write_json
from pruned_trainer.cli_options import (
    TARGETS,
    add_model_and_data,
    add_target,
    add_task,
    add_training_options,
    settings_of,
    target_of,
)
from pruned_trainer.demo.run import demo
from pruned_trainer.distributed import is_main, leave
from pruned_trainer.jobs.finetune import FineTuneSettings, fine_tune
from pruned_trainer.jobs.output import OutputFolder, load_model, load_tokenizer, save_checkpoint
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PRECISIONS, make_task
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.report import terminal as reporting
from pruned_trainer.tasks.task import own_thresholds
from pruned_trainer.training.phase import InterruptedTraining


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can mend is one line on stderr, not a
    traceback."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["pruned-trainer", *argv])
    logging.set_verbosity_error()
    try:
        arguments.run(arguments)
        leave()
    except InterruptedTraining as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"pruned-trainer {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line, with every default shown."""
    parser = argparse.ArgumentParser(prog="pruned-trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.set_defaults(run=run)
        return one

    one = command(
        "prune", _prune, "prune a question-answering model on SQuAD-format data or Natural Questions"
    )
    add_model_and_data(one)
    add_target(one, several=False)
    add_training_options(one, required=True)
    one = command("sweep", _sweep, "a family of pruned models from one training of the gates")
    add_model_and_data(one)
    add_target(one, several=True)
    add_training_options(one, required=True)
    one = command("demo", _demo, "fine-tune, prune and measure a small model, offline")
    one.add_argument(
        "--model", default="", help="encoder to fine-tune (default: the all-MiniLM-L6-v2 package)"
    )
    one.add_argument(
        "--train-file", type=Path, default=Path(), help="SQuAD JSON (default: generated questions)"
    )
    add_target(one, several=False)
    add_training_options(one, required=False)
    one.set_defaults(out=Path("build/demo"))
    one = command("compact", _compact, "make the narrow model of a recorded decision")
    one.add_argument("--model", required=True, help="the checkpoint that the decision was made for")
    one.add_argument("--decision", type=Path, required=True, help="decision.json")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--overwrite", action="store_true")
    one = command("finetune", _finetune, "make a dense model for a task, to be pruned")
    add_model_and_data(one)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--overwrite", action="store_true")
    one.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="autocast")
    for name in ("epochs", "learning_rate"):
        one.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(FineTuneSettings, name))
    for name in ("batch_size", "max_length", "stride", "seed"):
        one.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(FineTuneSettings, name))
    one = command("evaluate", _evaluate, "a checkpoint's scores, by the task's official metric")
    add_task(one, training=False)
    one.add_argument("--model", required=True)
    one.add_argument("--eval-file", type=Path, required=True)
    one.add_argument(
        "--validation-file", type=Path, help="choose the score thresholds here (default: the config's)"
    )
    one.add_argument("--max-length", type=int, default=384)
    one.add_argument("--stride", type=int, default=128)
    one.add_argument("--predictions", type=Path, help="write the official prediction file here")
    one = command("report", _report, "a page of a finished run: report.html, and its figures as PNG")
    one.add_argument("out", type=Path, metavar="OUT", help="a folder that prune, sweep or demo wrote")
    return parser


def _prune(arguments: argparse.Namespace) -> None:
    report = prune(settings_of(arguments, target_of(arguments)))
    if is_main():
        reporting.print_report(report)
        print(f"written to {arguments.out}")


def _sweep(arguments: argparse.Namespace) -> None:
    (unit,) = (name for name in TARGETS if getattr(arguments, name) is not None)
    targets = [Target(**{unit: value}) for value in getattr(arguments, unit)]
    found = sweep(settings_of(arguments, targets[0]), targets)
    if is_main():
        reporting.print_sweep(found)
        print(f"written to {arguments.out}: a folder for each model, sweep.json, sweep.png, report.html")


def _demo(arguments: argparse.Namespace) -> None:
    report = demo(settings_of(arguments, target_of(arguments) or Target(macs=0.45)))
    if is_main():
        reporting.print_report(report)
        print(f"written to {arguments.out}; its teacher and data lie beside it")


def _finetune(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    fine_tune(FineTuneSettings(**{name: given[name] for name in FineTuneSettings.__dataclass_fields__}))
    if is_main():
        print(f"written to {arguments.out}")


def _compact(arguments: argparse.Namespace) -> None:
    inputs = (arguments.model, arguments.decision)
    OutputFolder.check(arguments.out, arguments.overwrite, inputs)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    narrow = compact(model, Decision.load(arguments.decision))
    folder = OutputFolder(arguments.out, arguments.overwrite, inputs)
    save_checkpoint(narrow, folder.partial, arguments.model, tokenizer)
    folder.publish()
    print(f"written to {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.predictions is not None and not arguments.predictions.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{arguments.predictions.parent} is no folder; --predictions writes a file into it"
        )
    task = make_task(arguments.task, arguments.max_length, arguments.stride, skip_bad=arguments.skip_bad)
    files = [
        task.read(f, "validation") for f in (arguments.eval_file, arguments.validation_file) if f is not None
    ]
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    task.check_model(model)
    prepared = [task.cut(examples, tokenizer) for examples in files]
    thresholds = prepared[1].best_thresholds(model) if len(prepared) == 2 else own_thresholds(model, task)
    result = prepared[0].evaluate(model, thresholds)
    reporting.print_scores(result.scores(), thresholds, arguments.task)
    if arguments.predictions is not None:
        write_json(arguments.predictions, result.predictions)


def _report(arguments: argparse.Namespace) -> None:
    from pruned_trainer.report.page import write_pages  # draws: slow to import, and needed by this alone

    for path in write_pages(arguments.out):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
