"""The options of pruned-trainer's commands, each with the default that the settings have.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pruned_ops.command_line import add_dtype, model_place
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.jobs.settings import (
    BATCH_SIZE,
    DISTIL_IN,
    DTYPES,
    PAPER_BATCH_SIZE,
    RECIPES,
    WIDTH_ALIGN,
    PruneSettings,
)
from pruned_trainer.jobs.settings_checks import PRECISIONS
from pruned_trainer.pruning.options import (
    COMPENSATIONS,
    DEFAULT_PARTS,
    MAX_PACE,
    PARTS,
    PENALTIES,
    SCORE_WINDOWS,
)
from pruned_trainer.tasks.options import TASKS
from pruned_trainer.training.distillation import Distillation

# The names that stand for values of these types on a help page.
METAVARS: dict[Any, str] = {int: "N", float: "N", Path: "FILE", model_place: "MODEL"}
# The title of the options that come first on a help page.
COMMON = "what most runs need"
# The size of the demo's model, where no other target is given.
DEMO_MACS = 0.45


class Options:
    """A titled group of a command's options, each of which has the default that the settings have."""

    def __init__(
        self,
        group: argparse._ArgumentGroup | argparse._MutuallyExclusiveGroup,
        settings: type,
        prefix: str = "",
    ) -> None:
        """prefix: what the options' names begin with, before the settings' own names."""
        self.group, self.settings, self.prefix = group, settings, prefix

    @classmethod
    def titled(
        cls, parser: argparse.ArgumentParser, title: str, settings: type, text: str | None = None
    ) -> Options:
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
            is_model = name in ("model", "teacher")
            kind = model_place if is_model else str if default is None or "nargs" in more else type(default)
            more.setdefault("type", kind)
            if "choices" not in more:
                more.setdefault("metavar", METAVARS.get(more["type"]))
        option = f"--{self.prefix}{name}".replace("_", "-")
        self.group.add_argument(option, default=default, help=text, **more)


def add_prune(parser: argparse.ArgumentParser, several: bool = False) -> None:
    options = Options.titled(parser, COMMON, PruneSettings)
    options.add("model", "fine-tuned encoder to prune: a folder or a hub name", required=True)
    _add_train_file(options, required=False, default=" (default: --texts takes its place)")
    _add_validation(options)
    _add_task(options)
    _add_recipe(options)
    _add_out(options)
    text = "TARGET is one of these"
    text += ", each with one number or more" if several else "; --recipe paper and --decision need none"
    _add_target(Options.titled(parser, "target", PruneSettings, text), several)
    _add_serving(parser)
    options = Options.titled(parser, "data", PruneSettings)
    options.add(
        "texts",
        "instead of a training file: texts without labels, one a line, or rows with columns of texts; the "
        "teacher's outputs are then all that is learned (default: the training file, with labels)",
        type=Path,
    )
    _add_columns(options)
    _add_windows(options)
    _add_natural_questions(options)
    _add_length(parser)
    options = _add_choice(parser)
    if not several:
        options.add(
            "decision",
            "decision.json of an earlier run on this model: what it says stays, and is trained on, without a "
            "target and without gates (default: this run decides)",
            type=Path,
        )
    else:
        options.add(
            "gradual",
            "each target begins with the trained model of the one before it, whose heads and FFN units are "
            "chosen between anew (default: one training of the gates, or one scoring, is for them all)",
        )
    _add_weights(parser)
    _add_distillation(parser)
    _add_running(Options.titled(parser, "running", PruneSettings))
    parser.usage = "%(prog)s --model MODEL (--train-file FILE | --texts FILE) --out DIR TARGET [options]"


def add_demo(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, COMMON, PruneSettings)
    options.add("model", "encoder to fine-tune and prune (default: all-MiniLM-L6-v2, from its pip package)")
    _add_train_file(options, required=False, default=" (default: generated questions)")
    _add_validation(options)
    _add_recipe(options)
    _add_out(options, default="build/demo")
    _add_target(Options.titled(parser, "target", PruneSettings), several=False, default_macs=DEMO_MACS)
    _add_serving(parser)
    _add_windows(Options.titled(parser, "data", PruneSettings))
    _add_length(parser)
    _add_choice(parser)
    _add_weights(parser)
    _add_distillation(parser)
    _add_running(Options.titled(parser, "running", PruneSettings), resumable=False)
    parser.usage = "%(prog)s [options]"
    parser.set_defaults(model="", train_file=Path(), out=Path("build/demo"))


def _add_train_file(options: Options, required: bool = True, default: str = "") -> None:
    text = (
        "SQuAD JSON, another local dataset in SQuAD's columns, or a hub name (owner/name:split); for Natural "
        "Questions JSONL, gzip or not, or a folder of such files; for the other tasks JSONL, CSV, Parquet or "
        "Arrow with a row for each example"
    )
    options.add("train_file", text + default, type=Path, required=required)


def _add_validation(options: Options) -> None:
    options.add(
        "validation_file",
        "examples for every choice (default: 5%% of the training articles, documents or rows)",
        type=Path,
    )
    options.add("eval_file", "examples for the results only (default: those of the validation)", type=Path)


def _add_task(options: Options) -> None:
    options.add("task", "the data's format, and the metrics that go with it", choices=TASKS)


def _add_recipe(options: Options) -> None:
    options.add(
        "recipe",
        "joint trains gates and weights together, held to the target; fast trains nothing and takes minutes, "
        "by what would be missed once the rest stands in for it; paper trains each part's gates alone, on "
        "frozen weights, at a price or held to a target; the others train no gates, and score what stays",
        choices=RECIPES,
    )
    options.add("max_minutes", "fit the training into this time (default: it takes its epochs)", type=float)


def _add_out(options: Options, default: str | None = None) -> None:
    """default: the folder's name where there need be no other."""
    text = "folder that is made" + ("" if default is None else f" (default: {default})")
    options.add("out", text, type=Path, metavar="DIR", required=default is None)


def _add_columns(options: Options) -> None:
    options.add(
        "text_columns",
        "tasks on rows of texts: their columns (default: text; text_a text_b; tokens; query passage)",
        nargs="+",
        metavar="COLUMN",
    )
    options.add("label_column", "the column of the labels (default: label; tags; relevant)", metavar="COLUMN")
    options.add(
        "scores",
        "the column of numbers that a model of one output is for (default: there are labels; for embedding, "
        "score)",
        metavar="COLUMN",
    )
    options.add("corpus", "embedding: documents (id, title, text) to be found (default: pairs)", type=Path)
    options.add(
        "queries",
        "embedding: queries (id, text), where the other files hold query-id, corpus-id and score alone "
        "(default: those files hold the texts)",
        type=Path,
    )
    options.add("skip_bad", "leave out what cannot be read, asked or labelled, and count it")


def _add_windows(options: Options) -> None:
    options.add("max_length", "tokens of a window, at most")
    options.add("stride", "squad, natural_questions, token-classification: tokens that two windows share")


def _add_natural_questions(options: Options) -> None:
    options.add("null_rate", "natural_questions: share of the windows without an answer to train on")
    options.add("num_proc", "natural_questions: processes that read and tokenise")


def _add_target(options: Options, several: bool, default_macs: float | None = None) -> None:
    texts = {
        "speedup": "times as fast as the dense model, measured",
        "latency_ms": "milliseconds for a batch of the workload, measured",
        "macs": "fraction of the encoder's multiply-accumulates to keep",
        "params": "fraction of the encoder's parameters to keep",
    }
    if default_macs is not None:
        texts["macs"] += f" (default: {default_macs}, unless there is another target)"
    one_of = options.group.add_mutually_exclusive_group(required=several)
    for name, text in texts.items():
        option = f"--{name.replace('_', '-')}"
        one_of.add_argument(option, type=float, metavar="N", help=text, nargs="+" if several else None)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, "how the pruned model will be served", PruneSettings)
    options.add(
        "dtype",
        "dtype of its linear layers: the latency table, the decision, the timings and its scores are of "
        "that; it trains in --precision",
        choices=DTYPES,
    )
    options.add("threads", "threads that it will be served on (default: torch's own)", type=int)
    options.add(
        "latency_table",
        "file of pruned-ops latency-table, whose workload a target in time is then for (default: one is "
        "measured, at batch 8 and the validation file's lengths)",
        type=Path,
    )


def _add_length(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, "how long it trains", PruneSettings)
    options.add("gate_epochs", "epochs of the gates' training (default: 1)", type=float)
    scored = {recipe: windows for recipe, windows in SCORE_WINDOWS.items() if windows}
    scores = ", ".join(f"{recipe}: {windows} windows" for recipe, windows in scored.items())
    options.add(
        "gate_steps",
        f"steps of the gates' training, or minibatches scored (default: its epochs; {scores})",
        type=int,
    )
    options.add("retrain_epochs", "epochs of the narrow model's training (default: 1; fast: 0)", type=float)
    options.add("retrain_steps", "steps of the narrow model's training (default: its epochs)", type=int)
    sizes = f"{BATCH_SIZE}; paper: {PAPER_BATCH_SIZE}"
    options.add("batch_size", f"examples in a step, over all processes (default: {sizes})", type=int)


def _add_choice(parser: argparse.ArgumentParser) -> Options:
    options = Options.titled(parser, "how parts are chosen and cut out", PruneSettings)
    options.add("parts", f"what is pruned (default: {' '.join(DEFAULT_PARTS)})", nargs="+", choices=PARTS)
    options.add(
        "compensate",
        "how compaction makes up for what it removes: by the output biases, by least squares on the output "
        "matrices, by whichever is best on validation windows, or not at all (default: none; fast: auto)",
        choices=COMPENSATIONS,
    )
    options.add(
        "align",
        f"round FFN widths and the hidden size up to a multiple of this (default: {WIDTH_ALIGN}, or the "
        "latency table's)",
        type=int,
    )
    options.add("gate_fraction", "share of the training windows that gates are trained on")
    options.add(
        "gate_learning_rate", f"highest rate of the gates; up to {MAX_PACE:g} times that in short runs"
    )
    options.add("penalty", "a gate counts by P(gate = 1), or by P(gate > 0)", choices=PENALTIES)
    for part, name in zip(PARTS, ("attention", "ffn", "hidden"), strict=True):
        options.add(
            f"lambda_{name}",
            f"recipe paper without a target: price of a gate on {part}, in multiples of the paper's",
        )
    return options


def _add_weights(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, "how the weights are trained", PruneSettings)
    options.add("learning_rate", "highest rate of the weights, while gates train")
    options.add("retrain_learning_rate", "highest rate of the narrow model's weights")
    options.add("dropout", "dropout of both trainings")
    options.add("train_embeddings", "train the word embeddings too")
    options.add(
        "average_steps",
        "share of the narrow model's last steps whose mean weights are tried beside the last weights, on "
        "validation examples; the better ones stay",
    )
    options.add(
        "cross_pairs",
        "train the narrow model also on questions with the text of another window, which only the teacher "
        "judges: so many for each training window",
    )
    for name, change in (
        ("masked_texts", "15%% of the tokens masked"),
        ("shuffled_texts", "the tokens of each text shuffled"),
    ):
        options.add(
            name,
            f"train the narrow model also on copies of the training windows with {change}, which only the "
            "teacher judges: so many for each",
        )


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, "distillation", PruneSettings)
    options.add("teacher", "checkpoint that teaches (default: the model itself, before pruning)")
    options.add(
        "distil_in",
        "phases with a teacher (default: both; with --recipe paper: retrain, or none without a target)",
        choices=DISTIL_IN,
    )
    weights = Options(options.group, Distillation, prefix="distil_")
    weights.add("task", "weight of the loss on the gold answers or labels")
    weights.add("logits", "weight of the loss towards the teacher's outputs")
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
        "cache_teacher",
        "folder that keeps the teacher's logits, so that it runs once only; needs --distil-hidden 0 "
        "(default: they are not kept)",
        type=Path,
        metavar="DIR",
    )


def _layer_pair(text: str) -> tuple[int, int]:
    student, _, teacher = text.partition(":")
    return int(student), int(teacher or student)


def _add_running(options: Options, resumable: bool = True) -> None:
    """resumable: False for the demo, which runs in one go."""
    if resumable:
        options.add("resume", "go on with the run that was interrupted, in --out.partial")
    _add_run(options)
    options.add("save_steps", "steps from one checkpoint to the next")
    options.add("tensorboard", "write loss parts, budget and open gates to --out/tensorboard")
    options.add("compile", "torch.compile the narrow model while it trains")


def _add_run(options: Options) -> None:
    options.add("overwrite", "replace what is in --out")
    options.add("seed", "seed of everything that is drawn")
    text = (
        "autocast while training; auto takes bf16 where the processor has instructions for it and a step "
        "is measured to be faster, else fp32"
    )
    options.add("precision", text, choices=PRECISIONS)


def add_finetune(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, COMMON, FineTuneSettings)
    options.add("model", "encoder or checkpoint to train: a folder or a hub name", required=True)
    _add_train_file(options)
    _add_task(options)
    options.add("epochs", "how often the training file is seen")
    _add_out(options)
    options = Options.titled(parser, "data", FineTuneSettings)
    _add_columns(options)
    _add_windows(options)
    _add_natural_questions(options)
    options = Options.titled(parser, "running", FineTuneSettings)
    options.add("batch_size", "examples in a step, over all processes")
    options.add("learning_rate", "highest rate of all weights")
    _add_run(options)
    parser.usage = "%(prog)s --model MODEL --train-file FILE --out DIR [options]"


def add_compact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=model_place,
        metavar="MODEL",
        required=True,
        help="checkpoint that the decision was made for",
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


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    options = Options.titled(parser, COMMON, PruneSettings)
    options.add("model", "checkpoint to score: a folder or a hub name", required=True)
    one_of = Options(options.group.add_mutually_exclusive_group(required=True), PruneSettings)
    one_of.add("eval_file", "examples to score it on (default: --texts takes its place)", type=Path)
    one_of.add(
        "texts",
        "texts without labels, one a line, or rows with columns of texts; the score is how far the model "
        "agrees with the --teacher (default: the evaluation file, with labels)",
        type=Path,
    )
    _add_task(options)
    add_dtype(options.group, "dtype of the linear layers while the model is scored; on a CPU")
    options.add("predictions", "file for the predictions (default: they are not written)", type=Path)
    options.add(
        "teacher",
        "checkpoint that it is compared with, such as its dense model (default: none; --texts needs one)",
    )
    options = Options.titled(parser, "data", PruneSettings)
    options.add(
        "validation_file",
        "examples on which the score thresholds are chosen, where the task has some (default: the config's)",
        type=Path,
    )
    _add_columns(options)
    _add_windows(options)
    parser.usage = "%(prog)s --model MODEL (--eval-file FILE | --texts FILE --teacher MODEL) [options]"


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that prune, sweep or demo wrote")
