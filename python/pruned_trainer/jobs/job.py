"""A job: everything that a pruning run loads and checks before it spends time on training, and the trainers
of its phases."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from pruned_ops.checkpoints.loading import check_source, load_tokenizer
from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload, threads
from pruned_ops.models.heads import AnswerType, PrunedBertForNaturalQuestions
from pruned_ops.models.inputs import longest_sequence, padding_id
from pruned_ops.models.stock import config_of, encoders_of, find_encoder, model_shape, running_encoder
from pruned_ops.qa.logits import evaluating
from pruned_ops.runtime.batch_runner import padded
from pruned_ops.runtime.optimize import optimize, restore, restored
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_ops.runtime.refusals import refuse_encoder
from pruned_trainer.distributed import once, per_process, say, state
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.jobs.settings_checks import has_batches
from pruned_trainer.pruning.budget import Budget, SizeBudget, make_budget
from pruned_trainer.pruning.compact import check_decision, check_prunable, unmade_hidden
from pruned_trainer.pruning.compensate import refuse_compensation
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.options import BY_LABELS
from pruned_trainer.tasks.task import Prepared, Task, is_labelled, without_labels
from pruned_trainer.tasks.windows import Features, lengths_of
from pruned_trainer.training.altered_windows import AlteredWindows
from pruned_trainer.training.batches import (
    GROUP,
    NUMBER,
    Both,
    Collate,
    Numbered,
    Share,
    pad_batch,
)
from pruned_trainer.training.cross_pairs import CrossPairs
from pruned_trainer.training.encoder_states import sizes_of
from pruned_trainer.training.teacher_cache import TeacherCache, fingerprint
from pruned_trainer.training.teaching import TaskLoss, other_meaning

# Batches per round and rounds of the timing: about a minute for a small encoder on two cores.
TIMED_BATCHES, TIMED_ROUNDS = 16, 7
BATCH_SIZE = 8


@dataclass(frozen=True)
class Clock:
    """The time that a run has taken, together with the interrupted runs that it goes on from.

    started: when this process began, by time.perf_counter. earlier: seconds that the interrupted runs took.
    """

    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0

    def seconds(self) -> float:
        """Seconds that the run has taken until now."""
        return self.earlier + time.perf_counter() - self.started


class Narrow(NamedTuple):
    """A narrow model, trained on, and the decision that made it."""

    model: PreTrainedModel
    decision: Decision


@dataclass(frozen=True)
class Job:
    """What a run holds from its first phase to its last.

    dense: the model as it came, frozen. teacher: the model that distils it; the same one, unless the settings
    name another. train, gate_train: the training windows, and the share of them that gates are trained on.
    lengths: those of the texts that MACs are counted for, in tokens. workload: the batches that are timed.
    table: how long each part of a layer takes, where a target is a time. collate: makes a padded batch of
    windows. arguments: the caller's own training arguments, whose steps, rates and folders the run sets.
    task_loss: as for `PruningTrainer`. has_own_loss: whether the model or `task_loss` makes a loss of the
    windows, whatever their labels are called. retrain_windows: what the narrow model is trained on, where it
    is more than `train`. earlier: the narrow model of a larger target, which the gates' training begins with.
    """

    settings: PruneSettings
    clock: Clock
    dense: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    task: Task
    train: Features
    gate_train: Features
    validation: Prepared
    evaluation: Prepared
    budget: Budget
    lengths: Sequence[int]
    workload: Workload
    table: LatencyTable | None
    collate: Collate
    cache: TeacherCache | None = None
    arguments: TrainingArguments | None = None
    task_loss: TaskLoss | None = None
    has_own_loss: bool = False
    retrain_windows: Features | None = None
    earlier: Narrow | None = None

    @property
    def retrain_data(self) -> Features:
        """What the narrow model is trained on: the training windows, and unlabelled ones where there are."""
        return self.train if self.retrain_windows is None else self.retrain_windows

    def batch(self, windows: Any) -> dict[str, Tensor]:
        """These windows as a padded batch for a model, on its device."""
        beside = (NUMBER, GROUP)
        return {k: v.to(self.device) for k, v in self.collate(windows).items() if k not in beside}

    def unlabelled_batch(self, windows: Sequence[Any]) -> dict[str, Tensor]:
        """Windows to judge models on as a padded batch, on the model's device."""
        if isinstance(windows[0], Mapping):
            return without_labels(self.batch(windows))
        batch = padded(windows, padding_id(config_of(self.dense)))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @property
    def teacher_dtype(self) -> str | None:
        """The dtype in which the teacher's encoder runs: bfloat16 where the student trains in that on a CPU
        and there are kernels for it; None for its own."""
        if self.settings.precision != "bf16" or self.device.type != "cpu":
            return None
        return None if refuse_encoder(running_encoder(self.teacher), bfloat16=True) else "bfloat16"

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return running_encoder(self.dense).device

    @property
    def pooling(self) -> str:
        """How a bare encoder's states become an embedding: as an embedder's config says, or the settings."""
        pooling: str = getattr(config_of(self.dense), "pooling", None) or self.settings.distillation.pooling
        return pooling

    @property
    def align(self) -> int:
        """The number that FFN widths and the hidden size are rounded up to a multiple of."""
        align = self.settings.width_align
        if align is None:
            assert self.table is not None
            align = self.table.align
        return align


def start(settings: PruneSettings, table_file: Path | None = None) -> Job:
    """Load and check everything. Nothing is written yet.

    table_file: the latency table of the interrupted run that this one resumes.
    """
    clock = Clock()
    for source in (settings.model, settings.teacher):
        if source is not None:
            check_source(source)
    task = settings.make_task()
    train, validation, evaluation = _read_data(settings, task)
    dense, tokenizer, teacher = _load_models(settings, task)
    data = {"training": train, "validation": validation, "evaluation": evaluation}
    say(f"tokenising {'; '.join(f'{name}: {task.describe(examples)}' for name, examples in data.items())}")
    validation, evaluation = (
        task.prepare(examples, tokenizer, dense, teacher) for examples in (validation, evaluation)
    )
    lengths = validation.arrival_lengths()
    workload = Workload.arrival_order(lengths, min(BATCH_SIZE, len(lengths)), TIMED_BATCHES)
    # Measuring a table takes minutes, and bad rows are refused before it; else a target that is out of reach
    # is refused before a large file is tokenised.
    measures = settings.is_timed and settings.latency_table is None and table_file is None
    features = task.features(train, tokenizer, dense) if measures else None
    table = latency_table(settings, dense, workload, table_file) if settings.is_timed else None
    budget = budget_for(settings, dense, lengths, table)
    if features is None:
        features = task.features(train, tokenizer, dense)
    if settings.cache_teacher is not None:
        features = Numbered(features)
    share = settings.gate_fraction
    return Job(
        settings=settings,
        clock=clock,
        dense=dense,
        teacher=teacher,
        tokenizer=tokenizer,
        task=task,
        train=features,
        gate_train=Share(features, share, settings.seed) if share < 1 else features,
        validation=validation,
        evaluation=evaluation,
        budget=budget,
        lengths=lengths,
        workload=workload if table is None else table.workload,
        table=table,
        collate=partial(
            pad_batch, pad_token_id=padding_id(dense.config), limit=longest_sequence(dense.config)
        ),
        retrain_windows=_with_unlabelled(settings, features, tokenizer),
    )


def _with_unlabelled(settings: PruneSettings, features: Features, tokenizer: Any) -> Both | None:
    """The training windows with those that are made of them; None where none are asked for."""
    seed = settings.seed
    derived: list[Features] = []
    if settings.cross_pairs:
        separator, size = tokenizer.sep_token_id, settings.max_length
        derived.append(CrossPairs(features, settings.cross_pairs, separator, size, seed))
    named = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    bounds = {getattr(tokenizer, name) for name in named} - {None}
    if settings.masked_texts:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token: masked_texts needs one (shuffled_texts does not)"
            )
        derived.append(AlteredWindows(features, settings.masked_texts, bounds, tokenizer.mask_token_id, seed))
    if settings.shuffled_texts:
        derived.append(AlteredWindows(features, settings.shuffled_texts, bounds, seed=seed))
    if not derived:
        return None
    windows = Both(features, *derived)
    windows.check_batches(settings.train_batch)
    return windows


def check_signal(job: Job) -> None:
    """ValueError where a phase would have nothing to learn from, or its scores need labels that there are
    not."""
    settings, labelled = job.settings, is_labelled(job.collate([job.train[0]]))
    scores_by_loss = settings.recipe in BY_LABELS
    if scores_by_loss and (not labelled or job.task_loss is not None):
        raise ValueError(
            f"recipe {settings.recipe} scores by the usual loss on labels, which the data has not, or the "
            "caller replaced: fast, joint, paper and random need none"
        )
    if labelled or job.has_own_loss:
        return
    for phase in ("gates", "retrain"):
        scored_only = phase == "gates" and not settings.trains_gates
        if not scored_only and not settings.distillation_in(phase).needs_teacher:
            raise ValueError(
                f"the {phase} phase would have nothing to learn from: the data has no labels, and no teacher "
                "teaches in this phase"
            )


@contextmanager
def running(model: nn.Module, dtype: str | None = None) -> Iterator[Any]:
    """The model inside the block as it runs fastest: packed, or (with a line that says why) as it is where
    `optimize` does not take it; in evaluation mode. dtype: as for `optimize`."""
    try:
        fast = None if packed_encoders(model) else optimize(model, dtype=dtype)
    except ValueError as refusal:
        say(f"the {type(model).__name__} runs as it is, because {refusal}")
        with evaluating(model):
            yield model
        return
    try:
        yield model
    finally:
        if fast is not None:
            restore(fast)


@contextmanager
def paused(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Inside the block the model is as it was before `running` where that runs it in another dtype than this
    one: a teacher can then be timed as it would be served, while it teaches."""
    runs_as_asked = {packed.linear_dtype for packed in packed_encoders(model)} <= {dtype}
    with nullcontext() if runs_as_asked else restored(model):
        yield


def timed_part(model: Any) -> Any:
    """What is timed of a model: itself, or its encoder where its forward takes other inputs than token ids
    and a mask."""
    parameters = inspect.signature(model.forward).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty
              and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}  # fmt: skip
    ids = ("input_ids", "attention_mask")
    takes = all(name in parameters for name in ids) and needed <= {*ids}
    return model if takes and len(encoders_of(model)) <= 1 else running_encoder(model)


def _read_data(settings: PruneSettings, task: Task) -> tuple[Any, Any, Any]:
    """Training, validation and evaluation examples. Without a validation file, a part of the training file is
    held out for it."""
    read, source = (task.read_training, settings.train_file)
    if source is None:
        read, source = task.read_texts, settings.texts
    assert source is not None
    train, validation = read(source, settings.validation_file is not None)
    if settings.validation_file is not None:
        validation = task.read(settings.validation_file, "validation")
    else:
        of = "training file" if settings.texts is None else "texts"
        say(f"no validation file: held out for it, of the {of}: {task.describe(validation)}")
    evaluation = validation
    if settings.eval_file is not None:
        evaluation = task.read(settings.eval_file, "validation")
    return train, task.to_choose_on(validation), evaluation


def _load_models(
    settings: PruneSettings, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, PreTrainedModel]:
    """The dense model, its tokenizer and its teacher, checked and on this process's device."""
    dense, tokenizer = task.load_model(settings.model), load_tokenizer(settings.model)
    check_length(settings.max_length, dense.config)
    teacher = dense
    if settings.teacher is not None:
        teacher = load_teacher(settings.teacher, settings.model, dense, tokenizer, task)
    for model in (dense, teacher):
        nn.Module.to(model, state().device)
    refusal = refuse_encoder(running_encoder(dense))
    if refusal is not None:
        raise ValueError(f"{settings.model} cannot be scored and timed on {dense.device}: {refusal}")
    check_phases(settings, dense, teacher)
    return dense, tokenizer, teacher


def check_length(max_length: int, config: PreTrainedConfig) -> None:
    """ValueError where windows of this many tokens are longer than the model takes."""
    longest = longest_sequence(config)
    if max_length > longest:
        raise ValueError(
            f"max_length is {max_length}; the model's position table allows {longest} tokens: give "
            f"--max-length {longest}, or less"
        )


def load_teacher(
    source: str, name: str, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task
) -> PreTrainedModel:
    """The teacher of this name; ValueError where it cannot teach the model `dense`, whose name is `name`."""
    teacher, teacher_tokenizer = task.load_model(source), load_tokenizer(source)
    faults = []
    sizes = teacher.config.vocab_size, dense.config.vocab_size
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        faults.append(f"its vocabulary has {sizes[0]} tokens and is not the student's ({sizes[1]})")
    if teacher.config.num_labels != dense.config.num_labels:
        faults.append(f"it has {teacher.config.num_labels} labels, the student {dense.config.num_labels}")
    limits = longest_sequence(teacher.config), longest_sequence(dense.config)
    if limits[0] != limits[1]:
        faults.append(f"it takes {limits[0]} tokens, the student {limits[1]}")
    faults += filter(None, [other_meaning(teacher, dense)])
    if faults:
        raise ValueError(f"{source} cannot teach {name}: {'; '.join(faults)}")
    return teacher


def check_phases(settings: PruneSettings, dense: nn.Module, teacher: nn.Module) -> None:
    """ValueError where the processes cannot share a batch, the teacher's layers cannot be compared, or the
    model cannot run here in the dtype that it shall be served in."""
    if has_batches(settings):
        per_process(settings.train_batch)
    dtype = settings.served_dtype
    refusal = refuse_encoder(running_encoder(dense), dtype == "int8", dtype == "bfloat16") if dtype else None
    if refusal is not None:
        raise ValueError(f"the pruned model cannot be served in {dtype} here: {refusal}")
    for phase in ("gates", "retrain"):
        distillation = settings.distillation_in(phase)
        if distillation.hidden:
            layers = [sizes_of(model).num_hidden_layers for model in (dense, teacher)]
            distillation.layer_pairs(*layers)


def latency_table(
    settings: PruneSettings, dense: PreTrainedModel, workload: Workload, table_file: Path | None
) -> LatencyTable:
    """The table that the settings name, or the one that this run has written before, or a new one.

    Errors: ValueError for a table of another machine or model.
    """
    file, encoder = settings.latency_table or table_file, running_encoder(dense)
    config, device = encoder.config, encoder.device.type
    if file is None:
        say("measuring how long each part of a layer takes (pruned-ops latency-table keeps such a table)")
        with threads(settings.threads):
            return once(lambda: measure_table(config, workload, device=device, dtype=settings.served_dtype))
    if not file.is_file():
        raise FileNotFoundError(f"there is no latency table {file}; pruned-ops latency-table makes one")
    table = LatencyTable.load(file)
    described = model_shape(dense), config, settings.served_dtype or "float32", device
    with threads(settings.threads):
        refusal = once(lambda: table.refuse(*described))
    if refusal is not None:
        remake = table.remake_command(file, settings.model, *described[2:], settings.threads)
        raise ValueError(f"{file} cannot be used: {refusal}; make it again: {remake}")
    return table


def budget_for(
    settings: PruneSettings, dense: PreTrainedModel, lengths: Sequence[int], table: LatencyTable | None
) -> Budget:
    """The budget in the targets' unit (MACs where there is no target); ValueError for a target out of
    reach, and for parts, a compensation or a decision that the model does not allow."""
    check_prunable(dense, settings.parts)
    embeds = settings.task == "embedding" or find_encoder(dense) is dense
    if embeds and "hidden" in settings.parts:
        raise ValueError("an embedding is as wide as the hidden size: parts hidden cannot be pruned")
    if settings.decision is not None:
        decision = Decision.load(settings.decision)
        check_decision(dense, decision)
        if embeds and decision.hidden is not None:
            raise ValueError(
                f"{settings.decision} cuts hidden dimensions, and an embedding is as wide as the hidden size"
            )
    refuse_compensation(dense, settings.compensation)
    shape = model_shape(dense)
    budget: Budget
    if settings.targets:
        budget = make_budget(settings.targets[0], shape, lengths, table)
    else:
        budget = SizeBudget(shape, "macs", lengths)
    budget.unmade_hidden = unmade_hidden(find_encoder(dense))
    for target in settings.targets:
        budget.check_reachable(target, settings.parts, settings.width_align or 1)
    return budget


def open_cache(folder: Path, job: Job) -> TeacherCache:
    """The cache of the teacher's logits for the training windows, in the dtype that it runs in. The job's
    precision is decided by now."""
    teacher, features = job.teacher, job.train
    mark = once(lambda: fingerprint(teacher, features))
    types = len(AnswerType) if isinstance(teacher, PrunedBertForNaturalQuestions) else 0
    dtype = job.teacher_dtype or str(teacher.dtype).removeprefix("torch.")
    return TeacherCache(folder, lengths_of(features), mark, types, dtype)
