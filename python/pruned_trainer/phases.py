"""The two trainings of a run, gates and then the narrow model, and how many steps of each fit into the
time."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pruned_ops.optimize import optimized
from pruned_trainer.attach import attached
from pruned_trainer.callbacks import StepClock
from pruned_trainer.compact import compact
from pruned_trainer.decision import Decision, decide
from pruned_trainer.job import Job, say
from pruned_trainer.trainer import (
    GatePhase,
    PruningTrainer,
    pad_batch,
    prepare_student,
    run,
    training_arguments,
)

# Part of the training time that goes to the gates; the rest trains the narrow model, which learns more a
# minute.
GATE_SHARE = 0.3
# Steps that are run to learn how long one takes: the first ones warm up, the others span the lengths that
# occur.
WARMUP_STEPS, TIMED_STEPS = 2, 8
# Kept back of --max-minutes for compaction, logging and the unevenness of shared machines.
RESERVE = 0.04

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Steps of both phases, and the seconds a step that they were worked out from (None: not from time)."""

    gate_steps: int
    retrain_steps: int
    gate_step_seconds: float | None = None
    retrain_step_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build_trainer(
    job: Job,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    steps: int,
    phase: GatePhase | None,
) -> PruningTrainer:
    """A PruningTrainer with this run's settings for `steps` steps, with gates or (`phase` None) without."""
    settings = job.settings
    rate = settings.learning_rate if phase else settings.retrain_learning_rate
    args = training_arguments(folder, steps, settings.batch_size, rate, settings.seed)
    return PruningTrainer(
        model,
        args,
        settings.distillation,
        teacher=teacher,
        gate_phase=phase,
        train_dataset=job.train,
        data_collator=partial(pad_batch, pad_token_id=model.config.pad_token_id),
    )


def train_gates(job: Job, folder: Path, steps: int) -> tuple[Decision, PreTrainedModel, Log]:
    """Gates and weights together under the Lagrangian; then the decision and the narrow model it makes."""
    settings = job.settings
    student = copy.deepcopy(job.teacher)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with attached(student, settings.seed) as gates, optimized(job.teacher) as teacher:
        phase = GatePhase(gates, job.budget, settings.target, settings.gate_learning_rate)
        log = run(build_trainer(job, student, teacher, folder / "gates", steps, phase), "gate")
        decision = decide(gates, job.budget, settings.target, settings.align)
    return decision, compact(student, decision), log


def retrain(job: Job, narrow: PreTrainedModel, folder: Path, steps: int) -> Log:
    """Train the narrow model on, in place, distilled from the teacher."""
    prepare_student(narrow, job.settings.dropout, job.settings.train_embeddings)
    with optimized(job.teacher) as teacher:
        log = run(build_trainer(job, narrow, teacher, folder / "retrain", steps, None), "retrain")
    narrow.eval()
    return log


def make_plan(job: Job) -> Plan:
    """Steps from the settings: given ones first, then those that fit into max_minutes, else epochs.

    The time of a step is measured once, here, on copies; from then on the steps are fixed, so that the same
    seed, steps and data give the same result.
    """
    settings = job.settings
    epoch = math.ceil(len(job.train) / settings.batch_size)
    if settings.max_minutes is None:
        gate = settings.gate_steps or math.ceil(epoch * (settings.gate_epochs or 1))
        return Plan(gate, settings.retrain_steps or math.ceil(epoch * (settings.retrain_epochs or 1)))
    say("measuring how long a training step takes")
    gate_seconds, retrain_seconds = _step_seconds(job)
    left = settings.max_minutes * 60 * (1 - RESERVE) - (time.perf_counter() - job.started)
    gate = settings.gate_steps or int(left * GATE_SHARE / gate_seconds)
    again = settings.retrain_steps or int((left - gate * gate_seconds) / retrain_seconds)
    if gate < 1 or again < 1:
        least = (
            (time.perf_counter() - job.started + 20 * (gate_seconds + retrain_seconds)) / 60 / (1 - RESERVE)
        )
        raise ValueError(
            f"--max-minutes {settings.max_minutes:g} is too little here: at least {least:.1f} are needed"
        )
    return Plan(gate, again, gate_seconds, retrain_seconds)


def _step_seconds(job: Job) -> tuple[float, float]:
    """Seconds of a step with gates, and of one with a model of the target's size; the models are thrown
    away."""
    settings = job.settings
    timed = copy.copy(job)
    timed.train = _spanning_batches(job)
    student = copy.deepcopy(job.teacher)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with attached(student, settings.seed) as gates, optimized(job.teacher) as teacher:
        # Any choice of the right size will do: a little seeded noise tells apart gates that are still alike.
        for i, log_alpha in enumerate([*gates.heads, *gates.ffn]):
            log_alpha.data += 0.01 * torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(i))
        narrow = compact(student, decide(gates, job.budget, settings.target, settings.align))
        phase = GatePhase(gates, job.budget, settings.target, settings.gate_learning_rate)
        gate = _time_steps(timed, student, teacher, phase)
        prepare_student(narrow, settings.dropout, settings.train_embeddings)
        return gate, _time_steps(timed, narrow, teacher, None)


def _spanning_batches(job: Job) -> list[dict[str, Any]]:
    """Features of WARMUP_STEPS + TIMED_STEPS batches, each of like lengths, that span the lengths in even
    steps."""
    size = job.settings.batch_size
    ordered = sorted(job.train, key=lambda feature: len(feature["input_ids"]))
    last = max(len(ordered) - size, 0)
    places = [round(last * (i + 0.5) / TIMED_STEPS) for i in range(TIMED_STEPS)]
    warm = [places[TIMED_STEPS // 2]] * WARMUP_STEPS
    return [feature for place in warm + places for feature in ordered[place : place + size]]


def _time_steps(job: Job, model: PreTrainedModel, teacher: PreTrainedModel, phase: GatePhase | None) -> float:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(job, model, teacher, Path(folder), WARMUP_STEPS + TIMED_STEPS, phase)
        trainer.args.train_sampling_strategy = "sequential"
        trainer.add_callback(clock)
        trainer.train()
    return statistics.mean(clock.seconds[WARMUP_STEPS:])
