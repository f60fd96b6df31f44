"""pruned-trainer: prune encoders for a task, and train what is left."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from pruned_ops.command_line import CommandParser, dtype_of, status_of_a_broken_pipe
from pruned_ops.files import TextFile, check_writable, write_json
from pruned_trainer.command_options import (
    DEMO_MACS,
    add_compact,
    add_demo,
    add_evaluate,
    add_finetune,
    add_prune,
    add_report,
)
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.jobs.settings import PruneSettings, make_task
from pruned_trainer.jobs.settings_checks import check_apart
from pruned_trainer.pruning.options import UNITS, Target
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.training.distillation import Distillation


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
        sys.stdout.flush()
        leave()
    except BrokenPipeError:
        return status_of_a_broken_pipe()
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

    add_prune(command("prune", _prune, "prune a model for its task, and train what is left"))
    add_evaluate(command("evaluate", _evaluate, "score a checkpoint by the task's official metric"))
    add_report(command("report", _report, "write the page of a finished run, and its figures as PNG"))
    add_demo(command("demo", _demo, "fine-tune, prune and measure a small model, offline, in minutes"))
    add_finetune(command("finetune", _finetune, "make a dense model for a task, to be pruned"))
    add_prune(
        command("sweep", _sweep, "make a family of pruned models, one for each target"),
        several=True,
    )
    add_compact(command("compact", _compact, "make the narrow model of a decision, without training"))
    return parser


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
    names = [name for name in Distillation.__dataclass_fields__ if f"distil_{name}" in values]
    weights = {name: values[f"distil_{name}"] for name in names}
    if weights["layers"] is not None:
        weights["layers"] = tuple(weights["layers"])
    targets = _targets_of(arguments)
    if not targets and default is not None:
        targets = (default,)
    plain["text_columns"] = columns_of(arguments)
    plain.update(command=arguments.command_line, parts=tuple(arguments.parts), targets=targets)
    return PruneSettings(**plain, distillation=Distillation(**weights))


def columns_of(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The columns of texts that were named; None where the task's own are meant."""
    columns = getattr(arguments, "text_columns", None)
    return None if columns is None else tuple(columns)


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

    values = {**vars(arguments), "text_columns": columns_of(arguments)}
    fine_tune(FineTuneSettings(**{name: values[name] for name in FineTuneSettings.__dataclass_fields__}))
    if is_main():
        print(f"written to {arguments.out}")


def _compact(arguments: argparse.Namespace) -> None:
    from pruned_ops.checkpoints.loading import check_source, head_of, load_any_head, load_tokenizer
    from pruned_trainer.jobs.output import OutputFolder, explained_when_full, save_checkpoint
    from pruned_trainer.pruning.compact import compact
    from pruned_trainer.pruning.decision import Decision
    from pruned_trainer.tasks.texts.embedding import HEAD as EMBEDDER
    from pruned_trainer.tasks.texts.embedding import pooling_of

    inputs = (arguments.model, arguments.decision, arguments.calibration)
    OutputFolder.check(arguments.out, arguments.overwrite, inputs)
    check_source(arguments.model)
    decision, texts = Decision.load(arguments.decision), None
    if arguments.calibration is not None:
        texts = list(TextFile(arguments.calibration))
        if not texts:
            raise ValueError(f"{arguments.calibration} holds no text")
    model, tokenizer = load_any_head(arguments.model), load_tokenizer(arguments.model)
    if texts and arguments.compensate == "auto" and head_of(model.config) == EMBEDDER:
        model.config.pooling = pooling_of(arguments.model, model.config)  # embeddings are compared
    narrow = compact(model, decision, texts, arguments.compensate, arguments.layer_by_layer)
    with (
        explained_when_full(arguments.out),
        OutputFolder(arguments.out, arguments.overwrite, inputs) as folder,
    ):
        save_checkpoint(narrow, folder.partial, arguments.model, tokenizer)
        folder.publish()
    print(f"written to {arguments.out}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from pruned_ops import optimize
    from pruned_ops.checkpoints.loading import load_tokenizer
    from pruned_trainer.jobs.job import check_length, load_teacher
    from pruned_trainer.report import terminal
    from pruned_trainer.tasks.task import own_thresholds

    if arguments.predictions is not None:
        read = (arguments.eval_file, arguments.validation_file, arguments.texts, arguments.corpus)
        for file in (*read, arguments.queries):
            if file is not None and arguments.predictions.resolve() == file.resolve():
                raise FileExistsError(f"{arguments.predictions} is what is read; give another --predictions")
        check_writable(arguments.predictions, "--predictions", overwrite=True)
    task = make_task(TaskOptions.of(arguments))
    if arguments.texts is not None:
        _check_without_labels(arguments)
        examples = [task.read_texts(arguments.texts, True)[0]]
    else:
        if arguments.teacher is not None:
            raise ValueError("--teacher is for --texts: labels are what models are scored by")
        files = [file for file in (arguments.eval_file, arguments.validation_file) if file is not None]
        check_apart(*files)
        examples = [task.read(file, "validation") for file in files]
    model, tokenizer = task.load_model(arguments.model, takes_int8=True), load_tokenizer(arguments.model)
    dtype, teacher = dtype_of(arguments), None
    if arguments.teacher is not None:
        teacher = load_teacher(arguments.teacher, arguments.model, model, tokenizer, task)
    stored_int8 = getattr(model, "is_quantized", False)  # scored as it is served, or not at all
    if dtype is not None or stored_int8:
        optimize(model, dtype=dtype)
    check_length(arguments.max_length, model.config)
    prepared = [task.prepare(file_examples, tokenizer, model, teacher) for file_examples in examples]
    thresholds = prepared[1].best_thresholds(model) if len(prepared) == 2 else own_thresholds(model, task)
    result = prepared[0].evaluate(model, thresholds)
    terminal.print_scores(result.scores(), thresholds, prepared[0].metric_digits)
    if arguments.predictions is not None:
        write_json(arguments.predictions, result.predictions)


def _check_without_labels(arguments: argparse.Namespace) -> None:
    """ValueError for what texts without labels lack, or have no use for."""
    if arguments.teacher is None:
        raise ValueError("texts without labels are judged beside a teacher: name it with --teacher")
    if arguments.validation_file is not None:
        raise ValueError("thresholds are chosen on labels: --validation-file does not go with --texts")
    for name in ("corpus", "queries", "label_column"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for examples with labels, and --texts has none")


def _report(arguments: argparse.Namespace) -> None:
    from pruned_trainer.report.page import write_pages

    for path in write_pages(arguments.out):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
