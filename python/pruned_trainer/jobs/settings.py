"""What a pruning run is told: every option with its default, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.gates import DEFAULT_PARTS, PARTS, PENALTIES, check_parts
from pruned_trainer.pruning.importance import METHODS
from pruned_trainer.tasks.natural_questions.task import NULL_RATE, NaturalQuestionsTask
from pruned_trainer.tasks.squad.task import SquadTask
from pruned_trainer.tasks.task import TASKS, Task
from pruned_trainer.training.distillation import Distillation

# joint: gates and weights train together, a Lagrangian holds the target. paper: the weights are frozen, each
# part's gates train alone at a price for each open gate. The others train no gates.
RECIPES = ("joint", "paper", *METHODS)
PRECISIONS = ("fp32", "bf16", "fp16")
# In which phases the teacher teaches.
DISTIL_IN = ("gates", "retrain", "both", "none")


@dataclass(frozen=True)
class PruneSettings:
    """Everything a run is told. Times in minutes, lengths in tokens; None where a default is worked out.

    train_file, validation_file, eval_file: a file, a folder, or a hub name. batch_size: of all processes
    together. target: None only where the paper's recipe lets its prices decide. save_steps: from one
    checkpoint to the next. gate_fraction: the share of the training windows that gates are trained on.
    null_rate, num_proc, skip_bad: of Natural Questions, see `NaturalQuestionsTask`.
    """

    model: str
    train_file: Path
    out: Path
    target: Target | None
    validation_file: Path | None = None
    eval_file: Path | None = None
    task: str = "squad"
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    teacher: str | None = None
    recipe: str = "joint"
    parts: tuple[str, ...] = DEFAULT_PARTS
    penalty: str = "open"
    lambda_attention: float = 1.0
    lambda_ffn: float = 1.0
    lambda_hidden: float = 1.0
    latency_table: Path | None = None
    max_minutes: float | None = None
    gate_epochs: float | None = None
    retrain_epochs: float | None = None
    gate_fraction: float = 1.0
    gate_steps: int | None = None
    retrain_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 1e-4
    gate_learning_rate: float = 0.1
    retrain_learning_rate: float = 2e-4
    distillation: Distillation = field(default_factory=Distillation)
    distil_in: str | None = None
    cache_teacher: Path | None = None
    dropout: float = 0.0
    train_embeddings: bool = False
    precision: str = "fp32"
    compile: bool = False
    align: int | None = None
    max_length: int = 384
    stride: int = 128
    seed: int = 0
    save_steps: int = 200
    tensorboard: bool = False
    overwrite: bool = False
    resume: bool = False
    command: str | None = None  # for the report: the command line that said all this

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_steps()
        if self.eval_file and self.validation_file and same_file(self.eval_file, self.validation_file):
            raise ValueError("the evaluation file is never for choices: it cannot be the validation file too")

    def _check_choices(self) -> None:
        for name, known in (
            ("task", TASKS), ("recipe", RECIPES), ("penalty", tuple(PENALTIES)), ("precision", PRECISIONS),
            ("distil_in", (*DISTIL_IN, None)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; one of {known} is needed")
        check_parts(self.parts)
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts are {', '.join(self.parts)}: each is said once")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("precision fp16 needs a GPU; bf16 and fp32 run anywhere")
        if self.target is None and self.recipe != "paper":
            raise ValueError("a target is needed: how fast, or how small (only the paper's recipe has none)")
        if self.target is not None and self.target.is_time and "hidden" in self.parts:
            raise ValueError(
                "hidden dimensions go with a target in params or macs: latency is measured at one hidden size"
            )
        if self.latency_table is not None and not (self.target is not None and self.target.is_time):
            raise ValueError("a latency table is for the targets speedup and latency_ms")
        self._check_unused()
        if self.cache_teacher is not None and (self.distillation.hidden > 0 or not self.distillation.logits):
            raise ValueError(
                "cache_teacher keeps the teacher's logits only, and its hidden states are asked for too: "
                "set --distil-hidden 0 (and a --distil-logits above 0)"
            )

    def _check_unused(self) -> None:
        """What the other settings leave without effect is refused."""
        lambdas = (self.lambda_attention, self.lambda_ffn, self.lambda_hidden)
        if self.recipe != "paper" and set(lambdas) != {1.0}:
            raise ValueError("the lambda multiples are prices of the paper's recipe: --recipe paper")
        if self.recipe in METHODS and self.penalty != "open":
            raise ValueError(f"recipe {self.recipe} trains no gates: penalty has no meaning there")
        self.make_task()
        weights = self.distillation
        if not weights.hidden and (weights.projection or weights.layers):
            raise ValueError("a projection and a layer map are for hidden states, whose weight is 0")

    def _check_numbers(self) -> None:
        for name in ("batch_size", "align", "max_length", "save_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name in ("learning_rate", "gate_learning_rate", "retrain_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("lambda_attention", "lambda_ffn", "lambda_hidden"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 0 < self.gate_fraction <= 1:
            raise ValueError(f"gate_fraction is {self.gate_fraction}: it must lie in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must lie in [0, 1)")

    def _check_steps(self) -> None:
        for name in ("max_minutes", "gate_steps", "gate_epochs"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("retrain_steps", "retrain_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        for phase in ("gate", "retrain"):
            if getattr(self, f"{phase}_epochs") is not None and (
                getattr(self, f"{phase}_steps") is not None or self.max_minutes
            ):
                raise ValueError(f"{phase}_epochs, and {phase}_steps or max_minutes: say one of them")
        if self.max_minutes and self.gate_steps is not None and self.retrain_steps is not None:
            raise ValueError(
                "max_minutes has nothing to decide where both gate_steps and retrain_steps are given"
            )

    def make_task(self) -> Task:
        """The task, with what these settings say of it."""
        own = (self.null_rate, self.num_proc, self.skip_bad)
        return make_task(self.task, self.max_length, self.stride, self.seed, *own)

    @property
    def inputs(self) -> tuple[Path | str | None, ...]:
        """What the output must not replace."""
        files = (self.train_file, self.validation_file, self.eval_file, self.latency_table)
        return (self.model, self.teacher, self.cache_teacher, *files)

    @property
    def train_batch(self) -> int:
        """Examples a step: 16, and the paper's 24 in its recipe."""
        return self.batch_size or (24 if self.recipe == "paper" else 16)

    @property
    def width_align(self) -> int | None:
        """What FFN widths and the hidden size are rounded up to; None where a latency table says it."""
        timed = self.target is not None and self.target.is_time
        return self.align or (None if timed else 8)

    @property
    def multiples(self) -> dict[str, float]:
        """Of the paper's lambda, for each part."""
        return dict(zip(PARTS, (self.lambda_attention, self.lambda_ffn, self.lambda_hidden), strict=True))

    def distillation_in(self, phase: str) -> Distillation:
        """The losses of a phase, "gates" or "retrain"."""
        where = self.distil_in or ("retrain" if self.recipe == "paper" else "both")
        return self.distillation if where in ("both", phase) else Distillation.none()

    def to_json(self) -> dict[str, Any]:
        """What decides the result, for comparing a resumed run with the one it resumes."""
        ignored = {"command", "overwrite", "resume", "save_steps", "tensorboard"}
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in ignored}

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Names of the settings that are not as recorded by `to_json`."""
        mine = self.to_json()
        return sorted(name for name in {*mine, *recorded} if mine.get(name) != recorded.get(name))


def _plain(value: Any) -> Any:
    if isinstance(value, (Target, Distillation)):
        return _plain(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def make_task(
    name: str,
    max_length: int,
    stride: int,
    seed: int = 0,
    null_rate: float = NULL_RATE,
    num_proc: int = 1,
    skip_bad: bool = False,
) -> Task:
    """The task of this name; ValueError for options that it does not have, or out of range."""
    if name == "squad":
        if (null_rate, num_proc, skip_bad) != (NULL_RATE, 1, False):
            raise ValueError("null_rate, num_proc and skip_bad are for --task natural_questions")
        return SquadTask(max_length, stride, seed)
    if not 0 <= null_rate <= 1 or num_proc < 1:
        raise ValueError(f"null_rate ({null_rate}) must lie in [0, 1], num_proc ({num_proc}) be at least 1")
    return NaturalQuestionsTask(max_length, stride, seed, null_rate, num_proc, skip_bad)


def same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
