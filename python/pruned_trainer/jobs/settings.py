"""The settings of a pruning run: every option with its default, checked before anything is loaded.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.shape import checked_int
from pruned_trainer.jobs import settings_checks
from pruned_trainer.pruning.options import (
    BY_LABELS,
    COMPENSATIONS,
    DEFAULT_PARTS,
    PARTS,
    PENALTIES,
    UNTRAINED,
    Target,
    check_parts,
    compensation_of,
)
from pruned_trainer.tasks.options import NULL_RATE, PAIRED, STRIDE, TEXT_COLUMNS, TaskOptions
from pruned_trainer.training.distillation import Distillation

if TYPE_CHECKING:
    from pruned_trainer.tasks.task import Task

# joint: gates and weights train together, and a Lagrangian holds the target. paper: the weights are frozen,
# and each part's gates train alone, at a price for each open gate or, with a target, held to the share that
# it allows. The others train no gates; fast trains nothing at all, and compensates instead.
RECIPES = ("joint", "paper", *UNTRAINED)
# The name of the task of a call from Python.
OWN_TASK = "own"
# What the linears of the model that is served run in.
DTYPES = ("fp32", "bfloat16", "int8")
# Examples in a training step, and the paper's own number in its recipe.
BATCH_SIZE, PAPER_BATCH_SIZE = 16, 24
# FFN widths and the hidden size are rounded up to a multiple of this, where no latency table says another.
WIDTH_ALIGN = 8
# Shares of windows that are made for the retraining, and that only the teacher judges.
UNLABELLED = ("cross_pairs", "masked_texts", "shuffled_texts")
# The phases in which the teacher teaches.
DISTIL_IN = ("gates", "retrain", "both", "none")


@dataclass(frozen=True)
class PruneSettings:
    """Everything that decides what a pruning run does. Times are in minutes, lengths in tokens; None stands
    where a default is worked out.

    train_file, validation_file, eval_file: a file, a folder, or a hub name. texts: takes the place of
    train_file, and has no labels. task and the fields of `TaskOptions`: see there. targets: none (only where
    the paper's recipe lets its prices decide), one for `prune`, one or more for `sweep`; all in one unit, and
    kept in the order in which the gate phase meets them, the largest model first. decision: a file that says
    what stays, in the place of targets. batch_size: counts the examples of all processes together.
    save_steps: the steps from one checkpoint to the next. gate_fraction: the share of the training windows
    that gates are trained on. average_steps: the share of the retraining's steps, the last ones, whose mean
    weights are tried. cross_pairs, masked_texts, shuffled_texts: unlabelled windows for each training one,
    in the retraining. gradual: whether each target of a sweep begins with the model of the one before.
    precision: "auto" for bf16 where it is measured to be faster. dtype, threads: what the pruned model will
    be served in, and on how many threads (None: torch's own): the latency table, the decision, the timings
    and the pruned model's scores are of that.
    command: the command line that gave all this, for the report.
    """

    model: str
    train_file: Path | None
    out: Path
    targets: tuple[Target, ...] = ()
    validation_file: Path | None = None
    eval_file: Path | None = None
    task: str = "squad"
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    texts: Path | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    scores: str | None = None
    corpus: Path | None = None
    queries: Path | None = None
    teacher: str | None = None
    recipe: str = "joint"
    parts: tuple[str, ...] = DEFAULT_PARTS
    penalty: str = "one"
    lambda_attention: float = 1.0
    lambda_ffn: float = 1.0
    lambda_hidden: float = 1.0
    decision: Path | None = None
    latency_table: Path | None = None
    dtype: str = "fp32"
    threads: int | None = None
    max_minutes: float | None = None
    gate_epochs: float | None = None
    retrain_epochs: float | None = None
    gate_fraction: float = 1.0
    gate_steps: int | None = None
    retrain_steps: int | None = None
    average_steps: float = 0.0
    cross_pairs: float = 0.0
    masked_texts: float = 0.0
    shuffled_texts: float = 0.0
    batch_size: int | None = None
    learning_rate: float = 1e-4
    gate_learning_rate: float = 0.1
    retrain_learning_rate: float = 2e-4
    distillation: Distillation = field(default_factory=Distillation)
    distil_in: str | None = None
    cache_teacher: Path | None = None
    dropout: float = 0.0
    train_embeddings: bool = False
    gradual: bool = False
    precision: str = "auto"
    compile: bool = False
    align: int | None = None
    compensate: str | None = None
    max_length: int = 384
    stride: int = STRIDE
    seed: int = 0
    save_steps: int = 200
    tensorboard: bool = False
    overwrite: bool = False
    resume: bool = False
    resumable: bool = True
    command: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _in_order(self.targets))
        settings_checks.check_finite(self)
        self.check_task()
        self._check_choices()
        self._check_targets()
        self._check_numbers()
        self._check_effects()
        self._check_steps()

    def check_task(self) -> None:
        """ValueError for options that the task does not have, and for data that does not go together."""
        TaskOptions.of(self)  # which checks them
        if (self.train_file is None) == (self.texts is None):
            raise ValueError(
                "a train_file with labels, or texts without, is what is trained on: name one of them"
            )
        if not self.has_labels:
            self._check_without_labels()
        settings_checks.check_apart(self.eval_file, self.validation_file)
        source = "texts" if self.train_file is None else "train_file"
        for name in ("eval_file", "validation_file"):
            if settings_checks.are_the_same(self.task, getattr(self, source), getattr(self, name)):
                raise ValueError(
                    f"the {name} is the {source}, and models know what they were trained on: name another, "
                    f"or leave it out, so that a part of the {source} is held out"
                )

    def _check_without_labels(self) -> None:
        """Refuse what needs labels, where only the teacher teaches."""
        why = "texts have no labels" if self.texts is not None else "an embedder has no labels to train on"
        if self.distil_in not in (None, "both") or not self.distillation.needs_teacher:
            raise ValueError(f"{why}, so that the teacher teaches in both phases, with a weight above 0")
        if self.recipe in BY_LABELS:
            raise ValueError(
                f"{why}, and recipe {self.recipe} scores by the loss on them: fast and joint need none"
            )
        if self.task == "embedding" and "hidden" in self.parts:
            raise ValueError("an embedding is as wide as the hidden size: parts hidden cannot be pruned")

    def _check_choices(self) -> None:
        for name, known in (
            ("recipe", RECIPES), ("penalty", PENALTIES),
            ("distil_in", (*DISTIL_IN, None)), ("compensate", (*COMPENSATIONS, None)), ("dtype", DTYPES),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; one of {known} is needed")
        check_parts(self.parts)
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts are {', '.join(self.parts)}: each is said once")
        settings_checks.check_precision(self.precision)

    def _check_targets(self) -> None:
        if self.decision is None and not self.targets and self.recipe != "paper":
            raise ValueError("a target is needed: how fast, or how small (only the paper's recipe has none)")
        if self.is_timed and "hidden" in self.parts:
            raise ValueError(
                "hidden dimensions go with a target in params or macs: latency is measured at one hidden size"
            )
        if self.latency_table is not None and not self.is_timed:
            raise ValueError("a latency table is for the targets speedup and latency_ms")

    def _check_effects(self) -> None:
        """Refuse settings that the other settings leave without effect: what is asked for is obeyed, or said
        to be impossible."""
        if self.decision is not None:
            self._check_decided()
        self._check_recipe()
        self._check_teaching()
        self._check_phases()

    def _check_decided(self) -> None:
        """Refuse what a decision that is made already has no use for."""
        if self.targets:
            raise ValueError("a decision has met its target: give one of the two")
        if self.recipe != "joint" or self.gate_steps is not None or self.gate_epochs is not None:
            raise ValueError("a decision is made already: no recipe and no steps of gates go with it")
        if tuple(self.parts) != DEFAULT_PARTS or self.align is not None or self.penalty != "one":
            raise ValueError("a decision is made already: no parts, no align and no penalty go with it")

    def _check_recipe(self) -> None:
        """Refuse what the recipe has no use for."""
        lambdas = (self.lambda_attention, self.lambda_ffn, self.lambda_hidden)
        if self.recipe != "paper" and set(lambdas) != {1.0}:
            raise ValueError("the lambda multiples are prices of the paper's recipe: --recipe paper")
        if self.targets and set(lambdas) != {1.0}:
            raise ValueError("a target holds the gates to a share: the lambda multiples are for runs without")
        if self.recipe in UNTRAINED and self.penalty != "one":
            raise ValueError(f"recipe {self.recipe} trains no gates: penalty has no meaning there")
        if self.gradual and (self.recipe not in ("joint", "fast") or "hidden" in self.parts):
            raise ValueError("gradual chooses heads and ffn anew for each target: --recipe joint or fast")
        if self.gradual and len(self.targets) < 2:
            raise ValueError("gradual goes from each target to the next: name two or more")
        if self.recipe == "fast" and "hidden" in self.parts:
            raise ValueError("recipe fast scores heads and FFN units: leave hidden out of the parts")

    def _check_teaching(self) -> None:
        """Refuse what the task, or the weights of the losses, have no use for."""
        weights = self.distillation
        if self.cache_teacher is not None and self.task in TEXT_COLUMNS:
            raise ValueError(f"cache_teacher keeps start and end logits, which {self.task} has none of")
        for name in UNLABELLED:
            if getattr(self, name) and not self.distillation_in("retrain").needs_teacher:
                raise ValueError(f"{name} have no labels, and no teacher teaches in the retrain phase")
        if self.cross_pairs and self.task not in PAIRED:
            raise ValueError(f"cross_pairs are of a question and a text: for {', '.join(PAIRED)}")
        if not weights.hidden and (weights.projection or weights.layers):
            raise ValueError("a projection and a layer map are for hidden states, whose weight is 0")
        if self.cache_teacher is not None and (weights.hidden > 0 or not weights.logits):
            raise ValueError(
                "cache_teacher keeps the teacher's logits only, and its hidden states are asked for too: "
                "set --distil-hidden 0 (and a --distil-logits above 0)"
            )

    def _check_phases(self) -> None:
        """Refuse what is for a training that this run does not have."""
        idle = [name for name in ("average_steps", *UNLABELLED, "compile") if getattr(self, name)]
        if idle and not self.retrains:
            raise ValueError(
                f"{', '.join(idle)}: for the narrow model's training, which has no steps here: give "
                "retrain_steps or retrain_epochs"
            )
        settings_checks.check_have_a_training(self)
        phases = (("gates", self.trains_gates), ("retrain", self.retrains))
        losses = [self.distillation_in(phase) for phase, trains in phases if trains]
        taught = any(loss.needs_teacher for loss in losses)
        plain = Distillation(pooling=self.distillation.pooling)  # which judges models, too
        without_effect = {
            "teacher": self.teacher is not None and settings_checks.judges_by_labels(self) and not taught,
            "cache_teacher": self.cache_teacher is not None and not taught,
            "distillation": self.distillation not in (plain, *losses),
        }
        for name in [name for name, is_so in without_effect.items() if is_so]:
            raise ValueError(
                f"{name} is given, and no teacher teaches in any phase that this run trains in: leave it "
                "out, or see distil_in, retrain_steps and retrain_epochs"
            )

    def _check_numbers(self) -> None:
        whole = ("batch_size", "align", "max_length", "save_steps", "threads", "gate_steps", "retrain_steps")
        for name in whole:
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name), 0 if name == "retrain_steps" else 1)
        for name in ("learning_rate", "gate_learning_rate", "retrain_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("lambda_attention", "lambda_ffn", "lambda_hidden", *UNLABELLED):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 0 < self.gate_fraction <= 1:
            raise ValueError(f"gate_fraction is {self.gate_fraction}: it must lie in (0, 1]")
        if not 0 <= self.average_steps <= 1:
            raise ValueError(f"average_steps is {self.average_steps}: it must lie in [0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must lie in [0, 1)")

    def _check_steps(self) -> None:
        for name in ("max_minutes", "gate_epochs"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.retrain_epochs is not None and self.retrain_epochs < 0:
            raise ValueError(f"retrain_epochs is {self.retrain_epochs}: it must not be negative")
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
        """The task, with the options that these settings have for it."""
        return make_task(TaskOptions.of(self))

    @property
    def inputs(self) -> tuple[Path | str | None, ...]:
        """The files and folders that the output must not replace."""
        files = (self.train_file, self.texts, self.validation_file, self.eval_file, self.corpus, self.queries)
        others = (self.model, self.teacher, self.cache_teacher, self.latency_table, self.decision)
        return (*others, *settings_checks.places_of(*files))

    @property
    def has_labels(self) -> bool:
        """Whether the training has a loss of its own, beside what the teacher says."""
        return self.texts is None and self.task != "embedding"

    @property
    def trains_gates(self) -> bool:
        """Whether a phase of gates comes before the retraining."""
        return self.decision is None and self.recipe not in UNTRAINED

    @property
    def trains_weights_with_gates(self) -> bool:
        """Whether the weights train in the gates' phase, too."""
        return self.trains_gates and self.recipe == "joint"

    @property
    def retrains(self) -> bool:
        """Whether the narrow model is trained on."""
        if self.retrain_steps is not None:
            return self.retrain_steps > 0
        epochs = self.default_retrain_epochs if self.retrain_epochs is None else self.retrain_epochs
        return self.max_minutes is not None or epochs > 0

    @property
    def served_dtype(self) -> str | None:
        """The dtype as `pruned_ops.optimize` takes it: None for fp32."""
        return None if self.dtype == "fp32" else self.dtype

    @property
    def is_timed(self) -> bool:
        """Whether the targets are met by measured time."""
        return any(target.is_time for target in self.targets)

    @property
    def train_batch(self) -> int:
        """Examples in a training step, over all processes."""
        return self.batch_size or (PAPER_BATCH_SIZE if self.recipe == "paper" else BATCH_SIZE)

    @property
    def width_align(self) -> int | None:
        """What FFN widths and the hidden size are multiples of; None where the latency table has it."""
        return self.align or (None if self.is_timed else WIDTH_ALIGN)

    @property
    def compensation(self) -> str:
        """See `compensation_of`."""
        return compensation_of(self.recipe, self.compensate)

    @property
    def default_retrain_epochs(self) -> float:
        """Epochs of retraining where nothing else is asked for."""
        return 0.0 if self.recipe == "fast" else 1.0

    @property
    def multiples(self) -> dict[str, float]:
        """The multiple of the paper's lambda for each part."""
        return dict(zip(PARTS, (self.lambda_attention, self.lambda_ffn, self.lambda_hidden), strict=True))

    def distillation_in(self, phase: str) -> Distillation:
        """The losses of a phase, "gates" or "retrain". At the paper's prices there is no teacher by default,
        as in the paper."""
        priced = "retrain" if self.targets else "none"
        taught = self.distil_in or (priced if self.recipe == "paper" and self.has_labels else "both")
        return self.distillation if taught in ("both", phase) else Distillation.none()

    def to_json(self) -> dict[str, Any]:
        """The settings that decide the result, for comparing a resumed run with the one that it resumes."""
        ignored = {"command", "overwrite", "resume", "resumable", "save_steps", "tensorboard"}
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in ignored}
        plain["compensate"] = self.compensation
        return {name: _place(name, value) for name, value in plain.items()}

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Names of the settings that differ from the ones that `to_json` recorded; two ways to write the path
        of one file do not differ, nor does what an earlier version did not record from its default."""
        current = self.to_json()
        known = {f.name: _plain(f.default) for f in fields(self) if f.default is not MISSING}
        known["distillation"] = _plain(Distillation())
        places = {name: _place(name, value) for name, value in recorded.items()}
        for name in current.keys() & known.keys():
            if name not in places:
                places[name] = known[name]
            elif isinstance(known[name], dict) and isinstance(places[name], dict):
                places[name] = {**known[name], **places[name]}
        return sorted(name for name in {*current, *places} if current.get(name) != places.get(name))


def make_task(options: TaskOptions) -> Task:
    """The task of these options."""
    if options.task == "squad":
        from pruned_trainer.tasks.squad.task import (
            SquadTask,  # imports transformers: see the module's docstring
        )

        return SquadTask(options.max_length, options.stride, options.seed, options.skip_bad)
    if options.task == "natural_questions":
        from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask

        return NaturalQuestionsTask(
            options.max_length, options.stride, options.seed, options.null_rate, options.num_proc,
            options.skip_bad,
        )  # fmt: skip
    from pruned_trainer.tasks.texts.tasks import text_task

    return text_task(options)


def _in_order(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets with the largest model first; ValueError unless they are distinct and all in one unit."""
    if len({target.unit for target in targets}) > 1:
        raise ValueError("the targets of a sweep are all in one unit")
    falls = bool(targets) and targets[0].unit != "speedup"
    ordered = sorted(targets, key=lambda target: target.value, reverse=falls)
    names = [target.name for target in ordered]
    if len(set(names)) != len(names):
        raise ValueError(f"a target is asked for twice: {', '.join(names)}")
    return tuple(ordered)


def _place(name: str, value: Any) -> Any:
    """A setting that names a file or folder as an absolute path; others, and hub names, as they are."""
    is_path = name in ("out", "latency_table", "cache_teacher", "corpus", "queries", "decision")
    may_be_of_the_hub = name in ("model", "teacher", "train_file", "validation_file", "eval_file", "texts")
    if isinstance(value, str) and (is_path or may_be_of_the_hub and Path(value).exists()):
        return str(Path(value).resolve())
    return value


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, (Target, Distillation)):
        return _plain(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
