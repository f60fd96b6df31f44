"""Checks that more than one kind of settings, or more than one command, makes.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from pruned_trainer.pruning.options import BY_LABELS, PARTS
from pruned_trainer.training.distillation import Distillation

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check_apart(evaluation: Path | None, validation: Path | None = None) -> None:
    """ValueError where one file is for the results and for choices."""
    if evaluation is None or validation is None:
        return
    if _examples_of(evaluation, "validation") == _examples_of(validation, "validation"):
        raise ValueError("the evaluation file is never for choices: it cannot be the validation file too")


def check_finite(settings: Any) -> None:
    """ValueError for a field of these settings, a dataclass, that is no finite number."""
    for name in (known.name for known in fields(settings)):
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a finite number is needed")


def check_have_a_training(settings: Any) -> None:
    """ValueError for a setting of a training, or of another thing, that a run with these `PruneSettings` does
    not have."""
    gates, weights = settings.trains_gates, settings.trains_weights_with_gates
    retrains, scores = settings.retrains, _scores_windows(settings)
    labelled = judges_by_labels(settings)
    prices = zip(("lambda_attention", "lambda_ffn", "lambda_hidden"), PARTS, strict=True)
    for name, happens, training in (
        ("gate_learning_rate", gates, "the gates' training"),
        ("learning_rate", weights, "the training of weights beside gates"),
        ("retrain_learning_rate", retrains, "the narrow model's training"),
        ("dropout", gates or retrains, "a training"),
        ("train_embeddings", weights or retrains, "a training of weights"),
        ("tensorboard", gates or retrains, "a training"),
        ("save_steps", gates or retrains, "a training"),
        ("precision", gates or retrains or settings.precision == "fp32", "a training"),
        ("batch_size", has_batches(settings), "a training, a choice or a compensation by training windows"),
        ("gate_steps", gates or scores, "a choice by training windows"),
        ("gate_epochs", gates or scores, "a choice by training windows"),
        (
            "gate_fraction",
            gates or scores or settings.compensation != "none",
            "a choice or a compensation by training windows",
        ),
        ("corpus", labelled, "examples with labels"),
        ("queries", labelled, "examples with labels"),
        ("label_column", labelled, "examples with labels"),
        *((name, part in settings.parts, f"gates on {part}") for name, part in prices),
    ):
        if not happens and getattr(settings, name) != getattr(type(settings), name):
            raise ValueError(f"{name}: for {training}, which this run does not have")
    if not settings.has_labels and settings.distillation.task != type(settings.distillation).task:
        raise ValueError("distil_task weighs the loss on labels, and the training has none")
    numbers = settings.task in ("embedding", "reranking") or getattr(settings, "scores", None) is not None
    check_temperature(settings.distillation, "embeddings or scores" if numbers else None)


def check_temperature(distillation: Distillation, numbers: str | None) -> None:
    """ValueError for a temperature of no distributions. numbers: what a model gives in their place, in words;
    None for one that gives them."""
    if distillation.temperature == Distillation.temperature:
        return
    why = f"the model gives {numbers}" if numbers is not None else "the weight of the logits is 0"
    if numbers is not None or not distillation.logits:
        raise ValueError(f"a temperature softens distributions that are compared, and {why}: leave it out")


def has_batches(settings: Any) -> bool:
    """Whether a run with these `PruneSettings` has batches of training windows, and not a choice by chance,
    or one that is made already, alone."""
    trains = settings.trains_gates or settings.retrains
    return trains or _scores_windows(settings) or settings.compensation != "none"


def _scores_windows(settings: Any) -> bool:
    """Whether training windows are what parts are scored by."""
    return settings.recipe in ("fast", *BY_LABELS)


def judges_by_labels(settings: Any) -> bool:
    """Whether the models of a run with these `PruneSettings` are judged by labels, and not by a teacher."""
    return settings.texts is None or (settings.eval_file or settings.validation_file) is not None


def are_the_same(task: str, train: Path | None, other: Path | None) -> bool:
    """Whether both name the same examples. Of a folder or a hub name without a split, two splits are read,
    but for Natural Questions, which have none."""
    if train is None or other is None:
        return False
    if task == "natural_questions":
        return train.resolve() == other.resolve()
    return _examples_of(train, "train") == _examples_of(other, "validation")


def _examples_of(source: Path, default_split: str) -> tuple[Path, str | None]:
    """What is read of a source: its place, and the split of it, None where it has one set of rows alone."""
    from pruned_trainer.tasks.sources import find  # imports torch: see the module's docstring

    name, split = find(source)
    place = Path(name)
    is_one = place.is_file() or (place / "state.json").is_file()  # as `Dataset.save_to_disk` leaves it
    return place.resolve(), None if is_one else split or default_split


def places_of(*sources: Path | None) -> tuple[Path, ...]:
    """The files and folders of data, without the splits that are read of them."""
    from pruned_trainer.tasks.sources import find  # imports torch: see the module's docstring

    return tuple(Path(find(source)[0]) for source in sources if source is not None)


def check_precision(precision: str) -> None:
    """ValueError for a precision of the training that is unknown, or that nothing here can train in."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; one of {PRECISIONS} is needed")
    if precision == "fp16":
        import torch  # slow to import, and needed for this question alone

        if not torch.cuda.is_available():
            raise ValueError("precision fp16 needs a GPU; bf16 and fp32 run anywhere")
