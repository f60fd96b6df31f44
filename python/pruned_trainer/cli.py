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
from pruned_trainer.demo.run import demo
from pruned_trainer.distributed import is_main, leave
from pruned_trainer.jobs.finetune import FineTuneSettings, fine_tune
from pruned_trainer.jobs.output import OutputFolder, load_model, load_tokenizer, save_checkpoint
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import DISTIL_IN, PRECISIONS, RECIPES, PruneSettings, make_task
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.gates import PARTS, PENALTIES
from pruned_trainer.report import terminal
from pruned_trainer.tasks.natural_questions.task import NULL_RATE
from pruned_trainer.tasks.task import TASKS, own_thresholds
from pruned_trainer.training.distillation import Distillation
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
        terminal.print_report(report)
        print(f"written to {arguments.out}")


def _sweep(arguments: argparse.Namespace) -> None:
    (unit,) = (name for name in TARGETS if getattr(arguments, name) is not None)
    targets = [Target(**{unit: value}) for value in getattr(arguments, unit)]
    found = sweep(settings_of(arguments, targets[0]), targets)
    if is_main():
        terminal.print_sweep(found)
        print(f"written to {arguments.out}: a folder for each model, sweep.json, sweep.png, report.html")


def _demo(arguments: argparse.Namespace) -> None:
    report = demo(settings_of(arguments, target_of(arguments) or Target(macs=0.45)))
    if is_main():
        terminal.print_report(report)
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
    prepared = [task.prepare(examples, tokenizer) for examples in files]
    thresholds = prepared[1].best_thresholds(model) if len(prepared) == 2 else own_thresholds(model, task)
    result = prepared[0].evaluate(model, thresholds)
    terminal.print_scores(result.scores(), thresholds, arguments.task)
    if arguments.predictions is not None:
        write_json(arguments.predictions, result.predictions)


def _report(arguments: argparse.Namespace) -> None:
    from pruned_trainer.report.page import write_pages  # draws: slow to import, and needed by this alone

    for path in write_pages(arguments.out):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="fine-tuned BERT or RoBERTa question-answering checkpoint"
    )
    parser.add_argument(
        "--train-file", type=Path, required=True,
        help="SQuAD JSON, another local dataset in SQuAD's columns, or a hub name (owner/name:split); "
        "Natural Questions JSONL, gzip or not, or a folder of such",
    )  # fmt: skip
    add_task(parser)


def add_task(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Which task it is, and what Natural Questions alone is told."""
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument(
        "--skip-bad", action="store_true", help="natural_questions: leave out bad lines, and count them"
    )
    if training:
        parser.add_argument(
            "--null-rate", type=float, default=NULL_RATE,
            help="natural_questions: share of the windows without an answer that is trained on",
        )  # fmt: skip
        parser.add_argument(
            "--num-proc", type=int, default=1, help="natural_questions: processes that read and tokenise"
        )


TARGETS = {
    "speedup": "times as fast as the dense model, measured",
    "latency_ms": "milliseconds a batch of the workload, measured",
    "params": "fraction of the encoder's parameters to keep",
    "macs": "fraction of the encoder's multiply-accumulates to keep",
}


def add_target(parser: argparse.ArgumentParser, several: bool) -> None:
    group = parser.add_mutually_exclusive_group(required=several)
    for name, text in TARGETS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=float, help=text, nargs="+" if several else None
        )
    parser.add_argument(
        "--latency-table", type=Path,
        help="made by pruned-ops latency-table; its workload is the target's (default: one is measured, at "
        "batch 8 and the validation file's lengths)",
    )  # fmt: skip


def add_training_options(parser: argparse.ArgumentParser, required: bool) -> None:
    defaults = PruneSettings("", Path(), Path(), Target(macs=0.5))
    parser.add_argument(
        "--validation-file",
        type=Path,
        help="for thresholds and choices (default: 5%% of the training articles or documents)",
    )
    parser.add_argument("--eval-file", type=Path, help="for results only (default: the validation questions)")
    parser.add_argument("--out", type=Path, required=required)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out.partial holds")
    parser.add_argument("--teacher", help="who teaches (default: the model itself, before pruning)")
    parser.add_argument(
        "--recipe", choices=RECIPES, default=defaults.recipe,
        help="joint: gates and weights together, held to the target; paper: gates alone, each part apart, at "
        "a price; the others train no gates",
    )  # fmt: skip
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(defaults.parts), help="what is pruned"
    )
    parser.add_argument(
        "--penalty", choices=tuple(PENALTIES), default=defaults.penalty,
        help="a gate counts by P(gate > 0), or by P(gate = 1)",
    )  # fmt: skip
    parser.add_argument("--max-minutes", type=float, help="fit the training into this time (default: epochs)")
    for name in (  # the gates' rate grows in runs that are too short for it
        "lambda_attention", "lambda_ffn", "lambda_hidden", "gate_epochs", "gate_fraction", "retrain_epochs",
        "learning_rate", "gate_learning_rate", "retrain_learning_rate", "dropout",
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    for name in (
        "gate_steps", "retrain_steps", "batch_size", "align", "max_length", "stride", "seed", "save_steps",
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name, text in (
        ("train_embeddings", "train the word embeddings too"),
        ("compile", "torch.compile the narrow model while it trains"),
        ("tensorboard", "write loss parts, budget and open gates to --out/tensorboard"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument("--precision", choices=PRECISIONS, default=defaults.precision, help="autocast")
    _add_distillation(parser, defaults.distillation)


def _add_distillation(parser: argparse.ArgumentParser, defaults: Distillation) -> None:
    for name in ("task", "logits", "hidden", "temperature"):
        parser.add_argument(
            f"--distil-{name}", type=float, default=getattr(defaults, name), help="see Distillation"
        )
    parser.add_argument(
        "--distil-projection", action="store_true",
        help="a learned matrix between the student's hidden states and the teacher's",
    )  # fmt: skip
    parser.add_argument(
        "--distil-layers", nargs="+", metavar="STUDENT:TEACHER", type=_pair,
        help="layers whose outputs are compared, from 1 (default: each with its own)",
    )  # fmt: skip
    parser.add_argument(
        "--distil-in", choices=DISTIL_IN, help="phases with a teacher (default: the recipe's)"
    )
    parser.add_argument(
        "--cache-teacher", type=Path, metavar="FOLDER",
        help="keep the teacher's logits on disk, so that it runs once only (with --distil-hidden 0)",
    )  # fmt: skip


def _pair(text: str) -> tuple[int, int]:
    student, _, teacher = text.partition(":")
    return int(student), int(teacher or student)


def settings_of(arguments: argparse.Namespace, target: Target | None) -> PruneSettings:
    given = vars(arguments)
    plain = {name: given[name] for name in PruneSettings.__dataclass_fields__ if name in given}
    weights = {name: given[f"distil_{name}"] for name in Distillation.__dataclass_fields__}
    if weights["layers"] is not None:
        weights["layers"] = tuple(weights["layers"])
    plain.update(command=arguments.command_line, parts=tuple(arguments.parts), target=target)
    return PruneSettings(**plain, distillation=Distillation(**weights))


def target_of(arguments: argparse.Namespace) -> Target | None:
    given = {name: getattr(arguments, name) for name in TARGETS if getattr(arguments, name) is not None}
    return Target(**given) if given else None
