"""What a pruning run is told, and what it loads and checks before any time is spent on training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.packed_encoder import model_shape
from pruned_trainer.attach import find_encoder
from pruned_trainer.budget import Budget, Target
from pruned_trainer.distillation import Distillation
from pruned_trainer.loading import OutputFolder, load_model, load_tokenizer
from pruned_trainer.report import Prepared
from pruned_trainer.tasks.extractive import training_features
from pruned_trainer.tasks.squad import Example, load_squad, split_articles


@dataclass(frozen=True)
class PruneSettings:
    """Everything a run is told. Times in minutes, lengths in tokens; None where a default is worked out."""

    model: str
    train_file: Path
    out: Path
    target: Target
    validation_file: Path | None = None
    eval_file: Path | None = None
    max_minutes: float | None = None
    gate_epochs: float | None = None
    retrain_epochs: float | None = None
    gate_steps: int | None = None
    retrain_steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-4
    gate_learning_rate: float = 0.1
    retrain_learning_rate: float = 2e-4
    distillation: Distillation = field(default_factory=Distillation)
    dropout: float = 0.0
    train_embeddings: bool = False
    align: int = 8
    max_length: int = 384
    stride: int = 128
    seed: int = 0
    overwrite: bool = False
    command: str | None = None  # for the report: the command line that said all this

    def __post_init__(self) -> None:
        for name in ("batch_size", "align", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in (
            "learning_rate",
            "gate_learning_rate",
            "retrain_learning_rate",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("max_minutes", "gate_steps", "retrain_steps", "gate_epochs", "retrain_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive")
        for phase in ("gate", "retrain"):
            if getattr(self, f"{phase}_epochs") and (getattr(self, f"{phase}_steps") or self.max_minutes):
                raise ValueError(f"{phase}_epochs, and {phase}_steps or max_minutes: say one of them")
        if self.max_minutes and self.gate_steps and self.retrain_steps:
            raise ValueError(
                "max_minutes has nothing to decide where both gate_steps and retrain_steps are given"
            )
        if self.eval_file and self.validation_file and same_file(self.eval_file, self.validation_file):
            raise ValueError("the evaluation file is never for choices: it cannot be the validation file too")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must lie in [0, 1)")

    @property
    def inputs(self) -> tuple[Path | str | None, ...]:
        """What the output must not replace."""
        return self.model, self.train_file, self.validation_file, self.eval_file


def same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


@dataclass
class Job:
    """What a run holds from its first phase to its last. The teacher is the model as it came, frozen."""

    settings: PruneSettings
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train: list[dict[str, Any]]
    validation: Prepared
    evaluation: Prepared
    budget: Budget
    started: float


def say(text: str) -> None:
    """A line on what begins now."""
    print(f"-- {text}", flush=True)


def start(settings: PruneSettings) -> Job:
    """Load and check everything. Nothing is written yet."""
    started = time.perf_counter()
    train, validation, evaluation = _read_data(settings)
    teacher, tokenizer = load_model(settings.model), load_tokenizer(settings.model)
    longest = length_limit(teacher)
    if settings.max_length > longest:
        raise ValueError(
            f"max_length is {settings.max_length}; the model's position table allows {longest} tokens"
        )
    say(
        f"tokenising {len(train)} training, {len(validation)} validation, {len(evaluation)} "
        f"evaluation questions"
    )
    cut = partial(Prepared.cut, tokenizer=tokenizer, max_length=settings.max_length, stride=settings.stride)
    held, judged = cut(validation), cut(evaluation)
    budget = Budget(model_shape(find_encoder(teacher)), settings.target.unit, [len(w) for w in held.windows])
    budget.check_reachable(settings.target)
    features = training_features(train, tokenizer, settings.max_length, settings.stride, progress=True)
    return Job(settings, teacher, tokenizer, features, held, judged, budget, started)


def _read_data(settings: PruneSettings) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Training, validation and evaluation examples. Without a validation file 5% of the training articles
    serve."""
    OutputFolder.check(settings.out, settings.overwrite, settings.inputs)
    train: Sequence[Example] = load_squad(settings.train_file).examples
    if settings.validation_file is not None:
        validation: Sequence[Example] = load_squad(settings.validation_file).examples
    else:
        train, validation = split_articles(train, seed=settings.seed)
        say(
            f"no validation file: {len(validation)} questions of the training file's articles are "
            f"held out for it"
        )
    evaluation = load_squad(settings.eval_file).examples if settings.eval_file is not None else validation
    return train, validation, evaluation


def length_limit(model: PreTrainedModel) -> int:
    """Longest sequence the position table allows, in tokens."""
    config = model.config
    offset = config.pad_token_id + 1 if config.model_type.endswith("roberta") else 0
    return config.max_position_embeddings - offset
