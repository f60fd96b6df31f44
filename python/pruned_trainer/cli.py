"""pruned-trainer: prune question-answering BERT and RoBERTa models, and train what is left."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pruned_ops.command_line import CommandParser
from pruned_ops.files import check_writable, write_json
from pruned_trainer.jobs.settings import (
    BATCH_SIZE,
    DISTIL_IN,
    PAPER_BATCH_SIZE,
    PRECISIONS,
    RECIPES,
    SCORE_STEPS,
    WIDTH_ALIGN,
    FineTuneSettings,
    PruneSettings,
    make_task,
)
from pruned_trainer.pruning.options import (
    COMPENSATIONS,
    DEFAULT_PARTS,
    MAX_PACE,
    PARTS,
    PENALTIES,
    UNITS,
    Target,
)
from pruned_trainer.tasks.options import TASKS
from pruned_trainer.training.distillation import Distillation

# The names that stand for values of these types on a help page.
METAVARS: dict[type, str] = {int: "N", float: "N", Path: "FILE", str: "MODEL"}
# The size of the demo's model, where no other target is given.
DEMO_MACS = 0.45


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command. No torch is needed here: `pruned_cli` parses before it imports torch."""
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["pruned-trainer", *argv])
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit status. What the user can mend is one line on stderr,
    not a traceback."""
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from pruned_trainer.distributed import leave
    from pruned_trainer.training.phase import InterruptedTraining

    for library in (logging, hub_logging):
        library.set_verbosity_error()
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


def build_parser() -> CommandParser:
    """The parser, with every command's options."""
    parser = CommandParser.of_program("pruned-trainer", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, work: Callable[[argparse.Namespace], None], text: str) -> CommandParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=work)
        return added

    _add_prune(command("prune", _prune, "prune a question-answering model, and train what is left"))
    _add_prune(
        command("sweep", _sweep, "make a family of pruned models from one training of the gates"),
        several=True,
    )
    _add_demo(command("demo", _demo, "fine-tune, prune and measure a small model, offline, in minutes"))
    _add_finetune(command("finetune", _finetune, "make a dense model for a task, to be pruned"))
    _add_compact(command("compact", _compact, "make the narrow model of a decision, without training"))
    _add_evaluate(command("evaluate", _evaluate, "score a checkpoint by the task's official metric"))
    _add_report(command("report", _report, "write the page of a finished run, and its figures as PNG"))
    return parser


class _Options:
    """A titled group of a command's options, each of which has the default that the settings have."""

    def __init__(self, group: argparse._ArgumentGroup, settings: type, prefix: str = "") -> None:
        """prefix: what the options' names begin with, before the settings' own names."""
        self.group, self.settings, self.prefix = group, settings, prefix

    @classmethod
    def titled(
        cls, parser: argparse.ArgumentParser, title: str, settings: type, text: str | None = None
    ) -> _Options:
        """A new group of the parser, under this title."""
        return cls(parser.add_argument_group(title, text), settings)

    def add(self, name: str, text: str, **more: Any) -> None:
        """Add the option of this setting. more: as for add_argument.

        The help page adds a plain default to the text, which itself names one that is worked out.
        """
        default = getattr(self.settings, name, None)
        if isinstance(default, bool):
            more["action"] = "store_true"
        else:
            more.setdefault("type", str if default is None or "nargs" in more else type(default))
            if "choices" not in more:
                more.setdefault("metavar", METAVARS.get(more["type"]))
        option = f"--{self.prefix}{name}".replace("_", "-")
        self.group.add_argument(option, default=default, help=text, **more)


def _add_prune(parser: argparse.ArgumentParser, several: bool = False) -> None:
    options = _Options.titled(parser, "model and data", PruneSettings)
    options.add("model", "fine-tuned BERT or RoBERTa to prune: a folder or a hub name", required=True)
    _add_train_file(options, required=True)
    _add_data(options)
    text = "TARGET is one of the first four options"
    text += ", each with one number or more" if several else "; --recipe paper needs none"
    _add_target(_Options.titled(parser, "target", PruneSettings, text), several)
    _add_recipe(_Options.titled(parser, "recipe", PruneSettings))
    _add_distillation(parser)
    _add_running(_Options.titled(parser, "running", PruneSettings))
    parser.usage = "%(prog)s --model MODEL --train-file FILE --out DIR TARGET [options]"


def _add_demo(parser: argparse.ArgumentParser) -> None:
    options = _Options.titled(parser, "model and data", PruneSettings)
    options.add("model", "encoder to fine-tune and prune (default: all-MiniLM-L6-v2, from its pip package)")
    _add_train_file(options, required=False)
    _add_validation(options)
    _add_windows(options)
    _add_target(_Options.titled(parser, "target", PruneSettings), several=False, default_macs=DEMO_MACS)
    _add_recipe(_Options.titled(parser, "recipe", PruneSettings))
    _add_distillation(parser)
    _add_running(_Options.titled(parser, "running", PruneSettings), resumable=False)
    parser.usage = "%(prog)s [options]"
    parser.set_defaults(model="", train_file=Path(), out=Path("build/demo"))


def _add_train_file(options: _Options, required: bool) -> None:
    text = (
        "SQuAD JSON, another local dataset in SQuAD's columns, or a hub name (owner/name:split); for Natural "
        "Questions JSONL, gzip or not, or a folder of such files"
    )
    if not required:
        text += " (default: generated questions)"
    options.add("train_file", text, type=Path, required=required)


def _add_data(options: _Options) -> None:
    _add_validation(options)
    _add_task(options)
    _add_windows(options)


def _add_validation(options: _Options) -> None:
    options.add(
        "validation_file",
        "questions on which thresholds are chosen (default: 5%% of the training articles or documents)",
        type=Path,
    )
    options.add("eval_file", "questions for the results only (default: the validation questions)", type=Path)


def _add_task(options: _Options, training: bool = True) -> None:
    options.add("task", "the data's format, and the metric that goes with it", choices=TASKS)
    options.add("skip_bad", "leave out questions that cannot be read or asked, and count them")
    if training:
        options.add("null_rate", "natural_questions: share of the windows without an answer to train on")
        options.add("num_proc", "natural_questions: processes that read and tokenise")


def _add_windows(options: _Options) -> None:
    options.add("max_length", "tokens of a window, at most")
    options.add("stride", "tokens that two neighbouring windows share")


def _add_target(options: _Options, several: bool, default_macs: float | None = None) -> None:
    texts = {
        "speedup": "times as fast as the dense model, measured",
        "latency_ms": "milliseconds for a batch of the workload, measured",
        "params": "fraction of the encoder's parameters to keep",
        "macs": "fraction of the encoder's multiply-accumulates to keep",
    }
    if default_macs is not None:
        texts["macs"] += f" (default: {default_macs}, unless there is another target)"
    one_of = options.group.add_mutually_exclusive_group(required=several)
    for name in ("speedup", "latency_ms", "params", "macs"):
        option = f"--{name.replace('_', '-')}"
        one_of.add_argument(option, type=float, metavar="N", help=texts[name], nargs="+" if several else None)
    options.add(
        "latency_table",
        "file of pruned-ops latency-table, whose workload a target in time is then for (default: one is "
        "measured, at batch 8 and the validation file's lengths)",
        type=Path,
    )


def _add_recipe(options: _Options) -> None:
    options.add(
        "recipe",
        "joint trains gates and weights together, held to the target; paper trains each part's gates alone, "
        "on frozen weights, at a price or held to a target; the others train no gates, and score what stays",
        choices=RECIPES,
    )
    options.add("parts", f"what is pruned (default: {' '.join(DEFAULT_PARTS)})", nargs="+", choices=PARTS)
    options.add("penalty", "a gate counts by P(gate = 1), or by P(gate > 0)", choices=PENALTIES)
    for part, name in zip(PARTS, ("attention", "ffn", "hidden"), strict=True):
        options.add(
            f"lambda_{name}", f"paper, no target: price of a gate on {part}, in multiples of the paper's"
        )
    options.add("max_minutes", "fit the training into this time (default: it takes its epochs)", type=float)
    options.add("gate_epochs", "epochs of the gates' training (default: 1)", type=float)
    scores = ", ".join(f"{recipe}: {steps}" for recipe, steps in SCORE_STEPS.items())
    options.add("gate_steps", f"steps of it, or minibatches scored (default: its epochs; {scores})", type=int)
    options.add("gate_fraction", "share of the training windows that gates are trained on")
    options.add("retrain_epochs", "epochs of the narrow model's training (default: 1)", type=float)
    options.add("retrain_steps", "steps of its training (default: those of its epochs)", type=int)
    sizes = f"{BATCH_SIZE}; paper: {PAPER_BATCH_SIZE}"
    options.add("batch_size", f"examples in a step, over all processes (default: {sizes})", type=int)
    options.add("learning_rate", "highest rate of the weights, while gates train")
    options.add(
        "gate_learning_rate", f"highest rate of the gates; up to {MAX_PACE:g} times that in short runs"
    )
    options.add("retrain_learning_rate", "highest rate of the narrow model's weights")
    options.add("dropout", "dropout of both trainings")
    options.add("train_embeddings", "train the word embeddings too")
    options.add(
        "align",
        f"round FFN widths and the hidden size up to a multiple of this (default: {WIDTH_ALIGN}, or the "
        "latency table's)",
        type=int,
    )

    options.add(
        "compensate",
        "how compaction makes up for what it removes: by the output biases, by least squares on the output "
        "matrices, by whichever is best on validation windows, or not at all",
        choices=COMPENSATIONS,
    )


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    options = _Options.titled(parser, "distillation", PruneSettings)
    options.add("teacher", "checkpoint that teaches (default: the model itself, before pruning)")
    weights = _Options(options.group, Distillation, prefix="distil_")
    weights.add("task", "weight of the loss on the gold answers")
    weights.add("logits", "weight of the loss towards the teacher's answer distributions")
    weights.add("hidden", "weight of the loss towards the teacher's hidden states")
    weights.add("temperature", "softens the answer distributions that are compared")
    weights.add("projection", "pass the student's hidden states through a learned matrix first")
    weights.add(
        "layers",
        "layers whose hidden states are compared, from 1 (default: each with the teacher's of its number)",
        nargs="+",
        metavar="STUDENT:TEACHER",
        type=_layer_pair,
    )
    options.add(
        "distil_in",
        "phases with a teacher (default: both; with --recipe paper: retrain, or none without a target)",
        choices=DISTIL_IN,
    )
    options.add(
        "cache_teacher",
        "folder that keeps the teacher's logits, so that it runs once only; needs --distil-hidden 0 "
        "(default: they are not kept)",
        type=Path,
        metavar="DIR",
    )


def _layer_pair(text: str) -> tuple[int, int]:
    student, _, teacher = text.partition(":")
    return int(student), int(teacher or student)


def _add_running(options: _Options, resumable: bool = True) -> None:
    """resumable: False for the demo, which runs in one go, into a folder that it has a name for."""
    _add_output(options, required=resumable)
    if resumable:
        options.add("resume", "go on with the run that was interrupted, in --out.partial")
    options.add("save_steps", "steps from one checkpoint to the next")
    options.add("compile", "torch.compile the narrow model while it trains")
    options.add("tensorboard", "write loss parts, budget and open gates to --out/tensorboard")


def _add_output(options: _Options, required: bool) -> None:
    text = "folder that is made" if required else "folder that is made (default: build/demo)"
    options.add("out", text, type=Path, metavar="DIR", required=required)
    options.add("overwrite", "replace what is in --out")
    options.add("seed", "seed of everything that is drawn")
    options.add("precision", "autocast while training", choices=PRECISIONS)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    options = _Options.titled(parser, "model and data", FineTuneSettings)
    options.add("model", "encoder or checkpoint to train: a folder or a hub name", required=True)
    _add_train_file(options, required=True)
    _add_task(options)
    _add_windows(options)
    options = _Options.titled(parser, "training", FineTuneSettings)
    options.add("epochs", "how often the training file is seen")
    options.add("batch_size", "examples in a step, over all processes")
    options.add("learning_rate", "highest rate of all weights")
    _add_output(_Options.titled(parser, "running", FineTuneSettings), required=True)
    parser.usage = "%(prog)s --model MODEL --train-file FILE --out DIR [options]"


def _add_compact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", required=True, help="checkpoint that the decision was made for"
    )
    parser.add_argument(
        "--decision", type=Path, metavar="FILE", required=True, help="decision.json of a pruning run"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder that is made")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="some hundred texts, one a line, to compensate the model on (default: it is not compensated)",
    )
    parser.add_argument(
        "--compensate", choices=COMPENSATIONS, default="auto", help="how, with --calibration (default: auto)"
    )
    parser.add_argument(
        "--layer-by-layer", action="store_true", help="compensate each layer after the ones before it; slower"
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    options = _Options.titled(parser, "model and data", PruneSettings)
    options.add("model", "checkpoint to score: a folder or a hub name", required=True)
    options.add("eval_file", "questions to score it on", type=Path, required=True)
    options.add(
        "validation_file",
        "questions on which the score thresholds are chosen (default: the config's thresholds)",
        type=Path,
    )
    _add_task(options, training=False)
    _add_windows(options)
    options.add("predictions", "file for the official predictions (default: they are not written)", type=Path)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that prune, sweep or demo wrote")


def _prune(arguments: argparse.Namespace) -> None:
    from pruned_trainer.distributed import is_main
    from pruned_trainer.jobs.prune import prune
    from pruned_trainer.report import terminal

    report = prune(settings_of(arguments))
    if is_main():
        terminal.print_report(report)
        print(f"written to {arguments.out}")


def _sweep(arguments: argparse.Namespace) -> None:
    from pruned_trainer.distributed import is_main
    from pruned_trainer.jobs.prune import sweep
    from pruned_trainer.report import terminal

    summary = sweep(settings_of(arguments))
    if is_main():
        terminal.print_sweep(summary)
        print(f"written to {arguments.out}: a folder for each model, sweep.json, sweep.png, report.html")


def _demo(arguments: argparse.Namespace) -> None:
    from pruned_trainer.demo.run import demo
    from pruned_trainer.distributed import is_main
    from pruned_trainer.report import terminal

    report = demo(settings_of(arguments, default=Target(macs=DEMO_MACS)))
    if is_main():
        terminal.print_report(report)
        print(f"written to {arguments.out}; its teacher and data lie beside it")


def settings_of(arguments: argparse.Namespace, default: Target | None = None) -> PruneSettings:
    """The settings of prune, sweep and demo. default: the target where no other is given."""
    values = vars(arguments)
    plain = {name: values[name] for name in PruneSettings.__dataclass_fields__ if name in values}
    weights = {name: values[f"distil_{name}"] for name in Distillation.__dataclass_fields__}
    if weights["layers"] is not None:
        weights["layers"] = tuple(weights["layers"])
    targets = _targets_of(arguments)
    if not targets and default is not None:
        targets = (default,)
    plain.update(command=arguments.command_line, parts=tuple(arguments.parts), targets=targets)
    return PruneSettings(**plain, distillation=Distillation(**weights))


def _targets_of(arguments: argparse.Namespace) -> tuple[Target, ...]:
    """The targets that were given, all in one unit."""
    for unit in UNITS:
        values = getattr(arguments, unit)
        if values is not None:
            values = values if isinstance(values, list) else [values]
            return tuple(Target(**{unit: value}) for value in values)
    return ()


def _finetune(arguments: argparse.Namespace) -> None:
    from pruned_trainer.distributed import is_main
    from pruned_trainer.jobs.finetune import fine_tune

    values = vars(arguments)
    fine_tune(FineTuneSettings(**{name: values[name] for name in FineTuneSettings.__dataclass_fields__}))
    if is_main():
        print(f"written to {arguments.out}")


def _compact(arguments: argparse.Namespace) -> None:
    from pruned_trainer.jobs.output import (
        OutputFolder,
        explained_when_full,
        load_model,
        load_tokenizer,
        save_checkpoint,
    )
    from pruned_trainer.pruning.compact import compact
    from pruned_trainer.pruning.decision import Decision

    inputs = (arguments.model, arguments.decision)
    OutputFolder.check(arguments.out, arguments.overwrite, inputs)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    texts = None
    if arguments.calibration is not None:
        lines = arguments.calibration.read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line.strip()]
    decision = Decision.load(arguments.decision)
    narrow = compact(model, decision, texts, arguments.compensate, arguments.layer_by_layer)
    with (
        explained_when_full(arguments.out),
        OutputFolder(arguments.out, arguments.overwrite, inputs) as folder,
    ):
        save_checkpoint(narrow, folder.partial, arguments.model, tokenizer)
        folder.publish()
    print(f"written to {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from pruned_trainer.jobs.output import load_model, load_tokenizer
    from pruned_trainer.report import terminal
    from pruned_trainer.tasks.task import own_thresholds

    if arguments.predictions is not None:
        check_writable(arguments.predictions, "--predictions", overwrite=True)
    task = make_task(arguments.task, arguments.max_length, arguments.stride, skip_bad=arguments.skip_bad)
    files = [file for file in (arguments.eval_file, arguments.validation_file) if file is not None]
    examples = [task.read(file, "validation") for file in files]
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    task.check_model(model)
    prepared = [task.prepare(questions, tokenizer) for questions in examples]
    thresholds = prepared[1].best_thresholds(model) if len(prepared) == 2 else own_thresholds(model, task)
    result = prepared[0].evaluate(model, thresholds)
    terminal.print_scores(result.scores(), thresholds, arguments.task)
    if arguments.predictions is not None:
        write_json(arguments.predictions, result.predictions)


def _report(arguments: argparse.Namespace) -> None:
    from pruned_trainer.report.page import write_pages

    for path in write_pages(arguments.out):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
