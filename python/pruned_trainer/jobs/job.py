"""What a pruning run loads and checks before any time is spent on training."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload
from pruned_ops.models.heads import AnswerType, PrunedBertForNaturalQuestions
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import model_shape
from pruned_trainer.distributed import once, per_process, say, state
from pruned_trainer.jobs.output import load_model, load_tokenizer
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.budget import Budget, SizeBudget, Target, make_budget
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.tasks.task import Prepared, Task
from pruned_trainer.training.batches import Numbered, Part, lengths_of, pad_batch
from pruned_trainer.training.distillation import Projection
from pruned_trainer.training.phase import training_arguments
from pruned_trainer.training.teacher_cache import TeacherCache, fingerprint
from pruned_trainer.training.trainer import PruningTrainer

# Batches per round and rounds of the timing: about a minute for a small encoder on two cores.
TIMED_BATCHES, TIMED_ROUNDS = 16, 7
BATCH_SIZE = 8


@dataclass
class Job:
    """What a run holds from its first phase to its last.

    dense: the model as it came, frozen. teacher: what distils it, the same unless another was given.
    gate_train: the part of the training windows that gates are trained on.
    workload: what is timed. table: measured where a target is a time.
    """

    settings: PruneSettings
    dense: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    task: Task
    train: Sequence[dict[str, Any]]
    gate_train: Sequence[dict[str, Any]]
    validation: Prepared
    evaluation: Prepared
    budget: Budget
    workload: Workload
    table: LatencyTable | None
    cache: TeacherCache | None
    started: float

    @property
    def align(self) -> int:
        """What FFN widths and the hidden size are rounded up to."""
        chosen = self.settings.width_align
        if chosen is None:
            assert self.table is not None
            chosen = self.table.align
        return chosen


def start(settings: PruneSettings, targets: Sequence[Target] = (), table_file: Path | None = None) -> Job:
    """Load and check everything. Nothing is written yet (but a teacher cache, where one is asked for).

    targets: more than the settings' one, in the same unit. table_file: a table from this run's first part.
    """
    started = time.perf_counter()
    task = settings.make_task()
    train, validation, evaluation = _read_data(settings, task)
    dense, tokenizer = load_model(settings.model), load_tokenizer(settings.model)
    task.check_model(dense)
    longest = longest_sequence(dense.config)
    if settings.max_length > longest:
        raise ValueError(
            f"max_length is {settings.max_length}; the model's position table allows {longest} tokens"
        )
    teacher = load_teacher(settings, dense, tokenizer, task)
    for model in (dense, teacher):
        nn.Module.to(model, state().device)
    per_process(settings.train_batch)
    for phase in ("gates", "retrain"):
        distillation = settings.distillation_in(phase)
        if distillation.hidden:
            Projection.pairs_of(dense.config, teacher.config, distillation)
    read = {"training": train, "validation": validation, "evaluation": evaluation}
    say(f"tokenising {'; '.join(f'{name}: {task.describe(examples)}' for name, examples in read.items())}")
    held, judged = (task.prepare(examples, tokenizer) for examples in (validation, evaluation))
    lengths = held.arrival_lengths()
    workload = Workload.arrival_order(lengths, min(BATCH_SIZE, len(lengths)), TIMED_BATCHES)
    wanted = [target for target in (settings.target, *targets) if target is not None]
    table = None
    if any(target.is_time for target in wanted):
        table = latency_table(settings, dense, workload, table_file)
        workload = table.workload
    shape = model_shape(dense)
    budget = make_budget(wanted[0], shape, lengths, table) if wanted else SizeBudget(shape, "macs", lengths)
    for target in wanted:
        budget.check_reachable(target, settings.parts, settings.width_align or 1)
    features = task.features(train, tokenizer)
    cache = None
    if settings.cache_teacher is not None:
        features = Numbered(features)
        cache = open_cache(settings.cache_teacher, teacher, features)
    gates = features
    if settings.gate_fraction < 1:
        gates = Part(features, settings.gate_fraction, settings.seed)
    return Job(
        settings, dense, teacher, tokenizer, task, features, gates, held, judged, budget, workload, table,
        cache, started,
    )  # fmt: skip


def load_teacher(
    settings: PruneSettings, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task
) -> PreTrainedModel:
    """The model to be pruned itself, or another; ValueError where that one cannot teach it."""
    if settings.teacher is None:
        return dense
    teacher, its = load_model(settings.teacher), load_tokenizer(settings.teacher)
    task.check_model(teacher)
    faults = []
    if its.get_vocab() != tokenizer.get_vocab() or teacher.config.vocab_size != dense.config.vocab_size:
        faults.append(
            f"its vocabulary has {teacher.config.vocab_size} tokens and is not the student's "
            f"({dense.config.vocab_size})"
        )
    if teacher.config.num_labels != dense.config.num_labels:
        faults.append(f"it has {teacher.config.num_labels} labels, the student {dense.config.num_labels}")
    its_limit, limit = longest_sequence(teacher.config), longest_sequence(dense.config)
    if its_limit != limit:
        faults.append(f"it takes {its_limit} tokens, the student {limit}")
    if faults:
        raise ValueError(f"{settings.teacher} cannot teach {settings.model}: {'; '.join(faults)}")
    return teacher


def latency_table(
    settings: PruneSettings, dense: PreTrainedModel, workload: Workload, table_file: Path | None
) -> LatencyTable:
    """The user's table, or this run's own, or a new one; ValueError for one that is not of this machine and
    model."""
    given = settings.latency_table or table_file
    if given is None:
        say("measuring how long each part of a layer takes (pruned-ops latency-table keeps such a table)")
        return once(lambda: measure_table(dense.config, workload, device=dense.device.type))
    table = LatencyTable.load(given)
    described = model_shape(dense), dense.config.hidden_act, "float32", dense.device.type
    refusal = once(lambda: table.refuse(*described))
    if refusal is not None:
        remake = table.remake_command(given)
        raise ValueError(f"{given} cannot be used: {refusal}; make it again: {remake}")
    return table


def open_cache(folder: Path, teacher: PreTrainedModel, features: Sequence[dict[str, Any]]) -> TeacherCache:
    """The cache of this teacher's logits on these windows."""
    mark = once(lambda: fingerprint(teacher, features))
    types = len(AnswerType) if isinstance(teacher, PrunedBertForNaturalQuestions) else 0
    return TeacherCache(folder, lengths_of(features), mark, types)


def _read_data(settings: PruneSettings, task: Task) -> tuple[Any, Any, Any]:
    """Training, validation and evaluation examples. Without a validation file a part of the training file
    serves."""
    train, validation = task.read_training(settings.train_file, settings.validation_file is not None)
    if settings.validation_file is not None:
        validation = task.read(settings.validation_file, "validation")
    else:
        say(f"no validation file: held out for it, of the training file: {task.describe(validation)}")
    evaluation = validation
    if settings.eval_file is not None:
        evaluation = task.read(settings.eval_file, "validation")
    return train, validation, evaluation


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
    """A PruningTrainer with this run's settings for `steps` steps, with gates or (`phase` None) without.

    timing: it is run for the clock: features in their order, nothing is written."""
    settings = job.settings
    rate = settings.learning_rate if phase else settings.retrain_learning_rate
    more: dict[str, Any] = {
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "torch_compile": settings.compile and phase is None,
    }
    if timing:
        more["train_sampling_strategy"] = "sequential"
    else:
        more.update(save_strategy="steps", save_steps=settings.save_steps)
        more["report_to"] = ["tensorboard"] if settings.tensorboard else []
    args = training_arguments(folder, steps, per_process(settings.train_batch), rate, settings.seed, **more)
    if settings.tensorboard:  # the Trainer's callback takes its folder from the environment alone
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent / "tensorboard" / folder.name)
    distillation = settings.distillation_in("gates" if phase else "retrain")
    return PruningTrainer(
        model,
        args,
        distillation,
        teacher=teacher if distillation.needs_teacher else None,
        gate_phase=phase,
        cache=job.cache,
        kept_hidden=kept_hidden,
        train_dataset=job.gate_train if phase else job.train,
        data_collator=partial(pad_batch, pad_token_id=model.config.pad_token_id),
    )
