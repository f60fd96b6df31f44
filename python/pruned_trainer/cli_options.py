"""The options of the commands that train: how they are said, and the settings that they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruned_trainer.jobs.settings import DISTIL_IN, PRECISIONS, RECIPES, PruneSettings
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.gates import PARTS, PENALTIES
from pruned_trainer.tasks.natural_questions.task import NULL_RATE
from pruned_trainer.tasks.task import TASKS
from pruned_trainer.training.distillation import Distillation


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
