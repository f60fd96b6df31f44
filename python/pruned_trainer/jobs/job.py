"""A job: everything that a pruning run loads and checks before it spends time on training, and the trainers
of its phases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import check_source
from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload
from pruned_ops.models.heads import AnswerType, PrunedBertForNaturalQuestions
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import model_shape
from pruned_trainer.distributed import is_main, once, per_process, say, state
from pruned_trainer.jobs.output import load_tokenizer
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.budget import Budget, SizeBudget, make_budget
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.tasks.task import Prepared, Task
from pruned_trainer.training.batches import Features, Numbered, Share, lengths_of, pad_batch
from pruned_trainer.training.callbacks import tensorboard_writer
from pruned_trainer.training.phase import training_arguments
from pruned_trainer.training.teacher_cache import TeacherCache, fingerprint
from pruned_trainer.training.trainer import PruningTrainer

# Batches per round and rounds of the timing: about a minute for a small encoder on two cores.
TIMED_BATCHES, TIMED_ROUNDS = 16, 7
BATCH_SIZE = 8
# The training arguments of a trainer whose steps are only timed.
TIMING: dict[str, Any] = {"train_sampling_strategy": "sequential"}


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


@dataclass(frozen=True)
class Job:
    """What a run holds from its first phase to its last.

    dense: the model as it came, frozen. teacher: the model that distils it; the same one, unless the settings
    name another. train, gate_train: the training windows, and the share of them that gates are trained on.
    workload: the batches that are timed. table: how long each part of a layer takes, where a target is a
    time.
    """

    settings: PruneSettings
    clock: Clock
    dense: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    task: Task
    train: Features
    gate_train: Features
    validation: Prepared
    evaluation: Prepared
    budget: Budget
    workload: Workload
    table: LatencyTable | None
    cache: TeacherCache | None

    @property
    def align(self) -> int:
        """The number that FFN widths and the hidden size are rounded up to a multiple of."""
        align = self.settings.width_align
        if align is None:
            assert self.table is not None
            align = self.table.align
        return align


def start(settings: PruneSettings, table_file: Path | None = None) -> Job:
    """Load and check everything. Nothing is written yet, except a teacher cache where the settings ask for
    one.

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
    table = latency_table(settings, dense, workload, table_file) if settings.is_timed else None
    budget = _make_budget(settings, dense, lengths, table)
    features = task.features(train, tokenizer, dense)
    cache = None
    if settings.cache_teacher is not None:
        features = Numbered(features)
        cache = open_cache(settings.cache_teacher, teacher, features)
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
        workload=workload if table is None else table.workload,
        table=table,
        cache=cache,
    )


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
        say(f"no validation file: held out for it, of the training file: {task.describe(validation)}")
    evaluation = validation
    if settings.eval_file is not None:
        evaluation = task.read(settings.eval_file, "validation")
    return train, validation, evaluation


def _load_models(
    settings: PruneSettings, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, PreTrainedModel]:
    """The dense model, its tokenizer and its teacher, checked and on this process's device."""
    dense, tokenizer = task.load_model(settings.model), load_tokenizer(settings.model)
    check_length(settings.max_length, dense.config)
    teacher = load_teacher(settings, dense, tokenizer, task)
    for model in (dense, teacher):
        nn.Module.to(model, state().device)
    _check_phases(settings, dense, teacher)
    return dense, tokenizer, teacher


def check_length(max_length: int, config: PreTrainedConfig) -> None:
    """ValueError where windows of this many tokens are longer than the model takes."""
    longest = longest_sequence(config)
    if max_length > longest:
        raise ValueError(f"max_length is {max_length}; the model's position table allows {longest} tokens")


def load_teacher(
    settings: PruneSettings, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task
) -> PreTrainedModel:
    """The settings' teacher, or the model to be pruned itself; ValueError where the teacher cannot teach
    it."""
    if settings.teacher is None:
        return dense
    teacher, teacher_tokenizer = task.load_model(settings.teacher), load_tokenizer(settings.teacher)
    faults = []
    sizes = teacher.config.vocab_size, dense.config.vocab_size
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        faults.append(f"its vocabulary has {sizes[0]} tokens and is not the student's ({sizes[1]})")
    if teacher.config.num_labels != dense.config.num_labels:
        faults.append(f"it has {teacher.config.num_labels} labels, the student {dense.config.num_labels}")
    limits = longest_sequence(teacher.config), longest_sequence(dense.config)
    if limits[0] != limits[1]:
        faults.append(f"it takes {limits[0]} tokens, the student {limits[1]}")
    if faults:
        raise ValueError(f"{settings.teacher} cannot teach {settings.model}: {'; '.join(faults)}")
    return teacher


def _check_phases(settings: PruneSettings, dense: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """ValueError where the processes cannot share a batch, or the teacher's layers cannot be compared."""
    per_process(settings.train_batch)
    for phase in ("gates", "retrain"):
        distillation = settings.distillation_in(phase)
        if distillation.hidden:
            distillation.layer_pairs(dense.config.num_hidden_layers, teacher.config.num_hidden_layers)


def latency_table(
    settings: PruneSettings, dense: PreTrainedModel, workload: Workload, table_file: Path | None
) -> LatencyTable:
    """The table that the settings name, or the one that this run has written before, or a new one.

    Errors: ValueError for a table of another machine or model.
    """
    file = settings.latency_table or table_file
    if file is None:
        say("measuring how long each part of a layer takes (pruned-ops latency-table keeps such a table)")
        return once(lambda: measure_table(dense.config, workload, device=dense.device.type))
    if not file.is_file():
        raise FileNotFoundError(f"there is no latency table {file}; pruned-ops latency-table makes one")
    table = LatencyTable.load(file)
    described = model_shape(dense), dense.config.hidden_act, "float32", dense.device.type
    refusal = once(lambda: table.refuse(*described))
    if refusal is not None:
        remake = table.remake_command(file)
        raise ValueError(f"{file} cannot be used: {refusal}; make it again: {remake}")
    return table


def _make_budget(
    settings: PruneSettings, dense: PreTrainedModel, lengths: Sequence[int], table: LatencyTable | None
) -> Budget:
    """The budget in the targets' unit (MACs where there is no target); ValueError for a target out of
    reach."""
    shape = model_shape(dense)
    if not settings.targets:
        return SizeBudget(shape, "macs", lengths)
    budget = make_budget(settings.targets[0], shape, lengths, table)
    for target in settings.targets:
        budget.check_reachable(target, settings.parts, settings.width_align or 1)
    return budget


def open_cache(folder: Path, teacher: PreTrainedModel, features: Features) -> TeacherCache:
    """The cache of this teacher's logits for these windows."""
    mark = once(lambda: fingerprint(teacher, features))
    types = len(AnswerType) if isinstance(teacher, PrunedBertForNaturalQuestions) else 0
    return TeacherCache(folder, lengths_of(features), mark, types)


def build_trainer(
    job: Job,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    steps: int,
    phase: GatePhase | None,
    kept_hidden: Sequence[int] | None = None,
    timing: bool = False,
) -> PruningTrainer:
    """A trainer with this run's settings for `steps` steps, with gates or (`phase` None) without.

    kept_hidden: as for `PruningTrainer`. timing: the trainer only serves to time its steps, so it takes the
    features in their order and writes nothing.
    """
    settings = job.settings
    rate = settings.learning_rate if phase else settings.retrain_learning_rate
    distillation = settings.distillation_in("gates" if phase else "retrain")
    # An embedder's config says how its states are pooled.
    distillation = replace(distillation, pooling=getattr(job.dense.config, "pooling", distillation.pooling))
    trainer = PruningTrainer(
        model,
        training_arguments(
            folder,
            steps,
            per_process(settings.train_batch),
            rate,
            settings.seed,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            torch_compile=settings.compile and phase is None,
            **(TIMING if timing else {"save_strategy": "steps", "save_steps": settings.save_steps}),
        ),
        distillation,
        teacher=teacher if distillation.needs_teacher else None,
        gate_phase=phase,
        cache=job.cache,
        kept_hidden=kept_hidden,
        train_dataset=job.gate_train if phase else job.train,
        data_collator=partial(pad_batch, pad_token_id=model.config.pad_token_id),
    )
    if settings.tensorboard and not timing and is_main():
        trainer.add_callback(tensorboard_writer(folder.parent / "tensorboard" / folder.name))
    return trainer
