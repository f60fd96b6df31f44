"""pruned-trainer: prune | demo | compact | evaluate."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from transformers.utils import logging

from pruned_trainer import report as reporting
from pruned_trainer.budget import Target
from pruned_trainer.compact import compact
from pruned_trainer.decision import Decision
from pruned_trainer.demo import demo
from pruned_trainer.distillation import Distillation
from pruned_trainer.job import PruneSettings
from pruned_trainer.loading import OutputFolder, load_model, load_tokenizer, save_checkpoint
from pruned_trainer.prune import prune
from pruned_trainer.tasks.squad import load_squad
from pruned_trainer.trainer import InterruptedTraining


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can mend is one line on stderr, not a
    traceback."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["pruned-trainer", *argv])
    logging.set_verbosity_error()
    try:
        arguments.run(arguments)
    except InterruptedTraining as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"pruned-trainer {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line, with every default shown."""
    parser = argparse.ArgumentParser(prog="pruned-trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    one = commands.add_parser(
        "prune", help="prune a question-answering model on SQuAD-format data", formatter_class=shown
    )
    one.set_defaults(run=_prune)
    one.add_argument(
        "--model", required=True, help="fine-tuned BERT or RoBERTa question-answering checkpoint"
    )
    one.add_argument("--train-file", type=Path, required=True, help="SQuAD 1.1 or 2.0 JSON")
    _add_training_options(one, required=True)
    one = commands.add_parser(
        "demo", help="fine-tune, prune and measure a small model, offline", formatter_class=shown
    )
    one.set_defaults(run=_demo)
    one.add_argument(
        "--model", default="", help="encoder to fine-tune (default: the all-MiniLM-L6-v2 package)"
    )
    one.add_argument(
        "--train-file", type=Path, default=Path(), help="SQuAD JSON (default: generated questions)"
    )
    _add_training_options(one, required=False)
    one.set_defaults(out=Path("build/demo"))
    one = commands.add_parser(
        "compact", help="make the narrow model of a recorded decision", formatter_class=shown
    )
    one.set_defaults(run=_compact)
    one.add_argument("--model", required=True, help="the checkpoint that the decision was made for")
    one.add_argument("--decision", type=Path, required=True, help="decision.json")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--overwrite", action="store_true")
    one = commands.add_parser("evaluate", help="exact, F1 and span F1 of a checkpoint", formatter_class=shown)
    one.set_defaults(run=_evaluate)
    one.add_argument("--model", required=True)
    one.add_argument("--eval-file", type=Path, required=True)
    one.add_argument(
        "--validation-file", type=Path, help="choose the null score threshold here (default: the config's)"
    )
    one.add_argument("--max-length", type=int, default=384)
    one.add_argument("--stride", type=int, default=128)
    one.add_argument("--predictions", type=Path, help="write id -> answer here")
    return parser


def _add_training_options(parser: argparse.ArgumentParser, required: bool) -> None:
    defaults = PruneSettings("", Path(), Path(), Target(macs=0.5))
    parser.add_argument(
        "--validation-file", type=Path, help="for thresholds and choices (default: 5%% of the articles)"
    )
    parser.add_argument("--eval-file", type=Path, help="for results only (default: the validation questions)")
    parser.add_argument("--out", type=Path, required=required)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    target = parser.add_mutually_exclusive_group(required=required)
    target.add_argument("--params", type=float, help="fraction of the encoder's parameters to keep")
    target.add_argument("--macs", type=float, help="fraction of the encoder's multiply-accumulates to keep")
    parser.add_argument("--max-minutes", type=float, help="fit the training into this time (default: epochs)")
    for name in (
        "gate_epochs",
        "retrain_epochs",
        "learning_rate",
        "gate_learning_rate",
        "retrain_learning_rate",
        "dropout",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    for name in ("gate_steps", "retrain_steps", "batch_size", "align", "max_length", "stride", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--train-embeddings", action="store_true", help="train the word embeddings too")
    for name in ("task", "logits", "hidden", "temperature"):
        parser.add_argument(
            f"--distil-{name}",
            type=float,
            default=getattr(defaults.distillation, name),
            help="see Distillation",
        )


def _settings(arguments: argparse.Namespace) -> PruneSettings:
    given = vars(arguments)
    plain = {name: given[name] for name in PruneSettings.__dataclass_fields__ if name in given}
    weights = {name: given[f"distil_{name}"] for name in Distillation.__dataclass_fields__}
    target = Target(params=arguments.params, macs=arguments.macs)
    plain["command"] = arguments.command_line
    return PruneSettings(**plain, target=target, distillation=Distillation(**weights))


def _prune(arguments: argparse.Namespace) -> None:
    report = prune(_settings(arguments))
    reporting.print_report(report)
    print(f"written to {arguments.out}")


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.params is None and arguments.macs is None:
        arguments.macs = 0.45
    reporting.print_report(demo(_settings(arguments)))
    print(f"written to {arguments.out}; its teacher and data lie beside it")


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
    files = [load_squad(f) for f in (arguments.eval_file, arguments.validation_file) if f is not None]
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    prepared = [
        reporting.Prepared.cut(f.examples, tokenizer, arguments.max_length, arguments.stride) for f in files
    ]
    if len(prepared) == 2:
        threshold = reporting.choose_threshold(model, prepared[1])
    else:
        threshold = getattr(model.config, "null_score_threshold", 0.0)
    result = reporting.evaluate_on(model, prepared[0], threshold)
    for name, value in result.metrics.items():
        print(f"{name:>14}  {value:.2f}" if isinstance(value, float) else f"{name:>14}  {value}")
    if result.f1_span is not None:
        print(f"{'f1_span':>14}  {result.f1_span:.2f}")
    print(f"{'threshold':>14}  {threshold:.4f}")
    if arguments.predictions is not None:
        reporting.write_json(arguments.predictions, result.predictions)


if __name__ == "__main__":
    sys.exit(main())
