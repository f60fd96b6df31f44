"""How many steps of each phase a run takes: as told, or as many as fit into the time."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import once, say
from pruned_trainer.jobs.choice import ROUNDS, freeze_for, gate_phase_for
from pruned_trainer.jobs.job import Job, build_trainer
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import decide, decide_at
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.pruning.importance import METHODS
from pruned_trainer.training.batches import lengths_of, pad_batch
from pruned_trainer.training.callbacks import StepClock
from pruned_trainer.training.phase import prepare_student

# Part of the training time that goes to the gates; the rest trains the narrow model, which learns more a
# minute.
GATE_SHARE = 0.25
# Steps that are run to learn how long one takes: the first ones warm up, the others span the lengths that
# occur.
WARMUP_STEPS, TIMED_STEPS = 2, 8
# Kept back of --max-minutes for the decision, compaction, checkpoints and the unevenness of shared machines.
RESERVE = 0.05
# Minibatches that importance scores are taken over where nothing else is said. Leave-one-out passes over them
# again for every head and group.
SCORE_STEPS = {"gain": 64, "leave-one-out": 8, "random": 1}
# Choices that are timed before one meets a target in time, usually.
TIMED_CHOICES = 3


@dataclass(frozen=True)
class Plan:
    """Steps of both phases, and the seconds a step that they were worked out from (None: not from time).

    retrain_steps: of each narrow model, where a run makes several.
    """

    gate_steps: int
    retrain_steps: int
    gate_step_seconds: float | None = None
    retrain_step_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(job: Job, targets: list[Target]) -> Plan:
    """Steps from the settings: given ones first, then those that fit into max_minutes, else epochs.

    The time of a step is measured once, here, on copies; from then on the steps are fixed, so that the same
    seed, steps and data give the same result.
    """
    plan = _as_told(job) if job.settings.max_minutes is None else _in_minutes(job, targets)
    if job.settings.recipe == "joint" and plan.gate_steps < len(targets):
        raise ValueError(f"{plan.gate_steps} gate steps cannot pass {len(targets)} targets one after another")
    return plan


def _epoch(job: Job, features: Sequence[Any]) -> int:
    return math.ceil(len(features) / job.settings.train_batch)


def _given_gate_steps(job: Job) -> int | None:
    settings = job.settings
    if settings.gate_steps is not None:
        return settings.gate_steps
    if settings.gate_epochs is not None:
        return math.ceil(_epoch(job, job.gate_train) * settings.gate_epochs)
    return SCORE_STEPS.get(settings.recipe)


def _as_told(job: Job) -> Plan:
    gate, again, epochs = _given_gate_steps(job), job.settings.retrain_steps, job.settings.retrain_epochs
    if again is None:
        again = math.ceil(_epoch(job, job.train) * (1 if epochs is None else epochs))
    return Plan(_epoch(job, job.gate_train) if gate is None else gate, again)


def _in_minutes(job: Job, targets: list[Target]) -> Plan:
    settings = job.settings
    gate, again = _given_gate_steps(job), settings.retrain_steps
    assert settings.max_minutes is not None
    say("measuring how long a training step takes")
    gate_seconds, retrain_seconds = _step_seconds(job, targets[-1] if targets else None)
    minutes, models = settings.max_minutes, max(len(targets), 1)
    if settings.recipe == "paper":
        gate_seconds *= len(settings.parts)  # each part's gates train apart

    def fit() -> Plan:
        left = (
            minutes * 60 * (1 - RESERVE)
            - (time.perf_counter() - job.started)
            - _deciding_seconds(job, targets)
        )
        first, then = gate, again
        if first is None:  # all that the other phase leaves, where that one is given
            share = left * GATE_SHARE if then is None else left - then * retrain_seconds * models
            first = int(share / gate_seconds)
        if then is None:
            then = int((left - first * gate_seconds) / retrain_seconds / models)
        return Plan(first, then, gate_seconds, retrain_seconds)

    plan = once(fit)
    if plan.gate_steps < 1 or plan.retrain_steps < (0 if again is not None else 1):
        steps = (gate or 20) * gate_seconds + (20 if again is None else again) * models * retrain_seconds
        needed = time.perf_counter() - job.started + _deciding_seconds(job, targets) + steps
        raise ValueError(
            f"--max-minutes {minutes:g} is too little here: at least "
            f"{needed / 60 / (1 - RESERVE):.1f} are needed"
        )
    return plan


def _step_seconds(job: Job, target: Target | None) -> tuple[float, float]:
    """Seconds of a step with gates, and of one with a model of the target's size; the models are thrown
    away."""
    settings = job.settings
    timed = copy.copy(job)
    timed.train = timed.gate_train = _spanning_batches(job)
    timed.cache = None
    gate = 0.0
    if settings.recipe in METHODS:
        gate = _score_seconds(job, len(importance.left_out(job.budget.dense, settings.parts)))
    student = copy.deepcopy(job.dense)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with attached(student, settings.seed, settings.parts) as gates, optimized(job.teacher) as teacher:
        # Any choice of the right size will do: a little seeded noise tells apart gates that are still alike.
        for i, log_alpha in enumerate(gates.locations()):
            noise = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(i))
            log_alpha.data += 0.01 * noise.to(log_alpha)
        decision = decide_at(gates.scores(), job.budget, 0.0, job.align)
        if target is not None:
            decision = decide(gates.scores(), job.budget, target, job.align)
        narrow = compact(student, decision)
        if settings.recipe not in METHODS:
            phase = gate_phase_for(job, gates, [] if target is None else [target])
            freeze_for(job, student, gates)
            gate = _time_steps(timed, student, teacher, phase)
        prepare_student(narrow, settings.dropout, settings.train_embeddings)
        again = _time_steps(timed, narrow, teacher, None)
    return once(lambda: (gate, again))  # the main process's times are everyone's


def _deciding_seconds(job: Job, targets: list[Target]) -> float:
    """What timing the choices will take: both models, TIMED_CHOICES times for each target in time."""
    if job.table is None:
        return 0.0
    batches = len(job.workload.batches) * (ROUNDS + 1)
    both = job.budget.total * (1 + job.budget.wanted(targets[-1])) / 1000
    return TIMED_CHOICES * len(targets) * batches * both


def _score_seconds(job: Job, choices: int) -> float:
    """Seconds that scores take for each minibatch: gain's forward and backward, or a forward a choice."""
    if job.settings.recipe == "random":
        return 0.0
    features = _spanning_batches(job)[: job.settings.train_batch]
    batch = pad_batch(features, job.dense.config.pad_token_id)
    batch = {name: tensor.to(job.dense.device) for name, tensor in batch.items() if name != "number"}
    parts = job.settings.parts
    start = time.perf_counter()
    importance.score("gain", job.dense, [batch], job.budget, parts)
    # A forward is a third of both.
    return (time.perf_counter() - start) * (1 if job.settings.recipe == "gain" else (choices + 1) / 3)


def _spanning_batches(job: Job) -> list[dict[str, Any]]:
    """Features of WARMUP_STEPS + TIMED_STEPS batches, each of like lengths, that span the lengths in even
    steps."""
    size = job.settings.train_batch
    lengths = lengths_of(job.train)
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    last = max(len(ordered) - size, 0)
    places = [round(last * (i + 0.5) / TIMED_STEPS) for i in range(TIMED_STEPS)]
    warm = [places[TIMED_STEPS // 2]] * WARMUP_STEPS
    return [job.train[row] for place in warm + places for row in ordered[place : place + size]]


def _time_steps(job: Job, model: PreTrainedModel, teacher: PreTrainedModel, phase: GatePhase | None) -> float:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        steps = WARMUP_STEPS + TIMED_STEPS
        trainer = build_trainer(job, model, teacher, Path(folder), steps, phase, timing=True)
        trainer.add_callback(clock)
        trainer.train()
    return statistics.mean(clock.seconds[WARMUP_STEPS:])
