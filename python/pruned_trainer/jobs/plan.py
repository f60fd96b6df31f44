"""The plan of a run: the steps of each phase, as the settings give them or as many as fit into the time."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from pruned_trainer.distributed import once, say
from pruned_trainer.jobs.choice import freeze_for, gate_phase_for
from pruned_trainer.jobs.job import Job, running
from pruned_trainer.jobs.precision import (
    COMPARED,
    faster,
    is_worth_comparing,
    step_seconds,
    timing_batches,
)
from pruned_trainer.jobs.timed_choice import ROUNDS, choice_workload, round_seconds
from pruned_trainer.jobs.trainers import build_trainer
from pruned_trainer.pruning import importance, surgeon
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide, decide_at
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.pruning.gates import Gates
from pruned_trainer.pruning.options import UNTRAINED, score_steps
from pruned_trainer.tasks.windows import Features
from pruned_trainer.training.phase import prepare_student

# The part of the training time that goes to the gates. The rest trains the narrow model, which learns more in
# a minute.
GATE_SHARE = 0.25
# The part of --max-minutes that is kept back for the decision, compaction, checkpoints and the unevenness of
# shared machines.
RESERVE = 0.05
# The usual number of choices that are timed before one meets a target in time.
TIMED_CHOICES = 3
# The validation windows by which the time of a scoring is told.
SCORED_WINDOWS = 64


@dataclass(frozen=True)
class Plan:
    """Steps of both phases, and the seconds of a step that they were worked out from (None where they do not
    come from a time).

    retrain_steps: the steps of each narrow model, where a run makes several; a step of theirs takes
    retrain_step_seconds on average. precision: that of the training.
    """

    gate_steps: int
    retrain_steps: int
    gate_step_seconds: float | None = None
    retrain_step_seconds: float | None = None
    precision: str = "fp32"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(job: Job) -> Plan:
    """The steps that the settings give; those that fit into max_minutes, if it is set; else those of epochs.

    The time of a step is measured once, here, on copies; from then on the steps and the precision are fixed,
    so that the same seed, steps, precision and data give the same result.
    """
    settings, minutes = job.settings, job.settings.max_minutes
    if minutes is not None and _left(job, minutes) <= 0:  # said before the steps are timed
        raise _too_little(job, minutes, 0)
    counted = _from_settings(job) if minutes is None else None
    precision, seconds = settings.precision, None
    if precision == "auto":
        precision, seconds = _fastest(job, counted)
    if counted is None:
        assert minutes is not None
        counted = _in_minutes(job, minutes, seconds)
    plan = replace(counted, precision=precision)
    if settings.trains_gates and plan.gate_steps < len(settings.targets):
        raise ValueError(
            f"{plan.gate_steps} gate steps cannot pass {len(settings.targets)} targets one after another"
        )
    averaged = round(plan.retrain_steps * settings.average_steps)
    if settings.average_steps and averaged < 2:
        raise ValueError(
            f"average_steps is {settings.average_steps:g}, which is {averaged} of {plan.retrain_steps} "
            "retrain steps, and a mean needs two: ask for a larger share or more steps, or leave it out"
        )
    return plan


def _epoch(job: Job, features: Features) -> int:
    """Steps that see each of these features once."""
    return math.ceil(len(features) / job.settings.train_batch)


def _given_gate_steps(job: Job) -> int | None:
    """The gate steps where the settings, or the recipe, decide them; None where they do not."""
    settings = job.settings
    if settings.decision is not None:
        return 0
    if settings.gate_steps is not None:
        return settings.gate_steps
    if settings.gate_epochs is not None:
        return math.ceil(_epoch(job, job.gate_train) * settings.gate_epochs)
    return score_steps(settings.recipe, settings.train_batch)


def _from_settings(job: Job) -> Plan:
    gate, retrain = _given_gate_steps(job), job.settings.retrain_steps
    if gate is None:
        gate = _epoch(job, job.gate_train)
    if retrain is None:
        epochs = job.settings.retrain_epochs
        epochs = job.settings.default_retrain_epochs if epochs is None else epochs
        retrain = math.ceil(_epoch(job, job.retrain_data) * epochs)
    return Plan(gate, retrain)


def _fastest(job: Job, counted: Plan | None) -> tuple[str, tuple[float, float] | None]:
    """The precision in which the training takes the least time, and the seconds of its steps (None where they
    were not measured: no instructions for bf16, or too few steps for it to matter).

    counted: the steps that are to come, where time does not decide that."""
    models = max(len(job.settings.targets), 1)
    steps = None if counted is None else counted.gate_steps + models * counted.retrain_steps
    if not is_worth_comparing(steps, job.device):
        return "fp32", None
    taken = {
        precision: _step_seconds(replace(job, settings=replace(job.settings, precision=precision)))
        for precision in COMPARED
    }
    (gate, retrain), (gate_bf16, retrain_bf16) = taken["fp32"], taken["bf16"]
    ratio = retrain_bf16 / retrain
    if job.settings.trains_gates:
        ratio = GATE_SHARE * gate_bf16 / gate + (1 - GATE_SHARE) * ratio
    chosen = faster(ratio)
    return chosen, taken[chosen]


def _in_minutes(job: Job, minutes: float, seconds: tuple[float, float] | None) -> Plan:
    """seconds: those of a step of each phase, where they are known already."""
    settings = job.settings
    gate, retrain = _given_gate_steps(job), settings.retrain_steps
    if seconds is None:
        say("measuring how long a training step takes")
        seconds = _step_seconds(job)
    gate_seconds, retrain_seconds = seconds
    models = max(len(settings.targets), 1)
    if settings.recipe == "paper":
        gate_seconds *= len(settings.parts)  # each part's gates train apart
    if settings.gradual and not settings.trains_gates:
        gate_seconds *= models  # each model is scored
    averaging = once(lambda: _averaging_seconds(job))

    def fit() -> tuple[Plan, float]:
        seconds_left = _left(job, minutes) - averaging
        gate_steps, retrain_steps = gate, retrain
        if gate_steps is None:  # all that the other phase leaves, where that one is given
            share = (
                seconds_left * GATE_SHARE
                if retrain is None
                else seconds_left - retrain * retrain_seconds * models
            )
            gate_steps = int(share / gate_seconds)
        if retrain_steps is None:
            retrain_steps = int((seconds_left - gate_steps * gate_seconds) / retrain_seconds / models)
        return Plan(gate_steps, retrain_steps, gate_seconds, retrain_seconds), seconds_left

    plan, seconds_left = once(fit)
    given_seconds = (gate or 0) * gate_seconds + (retrain or 0) * models * retrain_seconds
    if (
        given_seconds > seconds_left
        or plan.gate_steps < (gate is None)
        or plan.retrain_steps < (retrain is None)
    ):
        steps = (20 if gate is None else gate) * gate_seconds + (
            20 if retrain is None else retrain
        ) * models * retrain_seconds
        raise _too_little(job, minutes, steps + averaging)
    return plan


def _left(job: Job, minutes: float) -> float:
    """The seconds of these minutes that are left for steps."""
    return minutes * 60 * (1 - RESERVE) - job.clock.seconds() - _deciding_seconds(job)


def _too_little(job: Job, minutes: float, steps: float) -> ValueError:
    """The refusal of minutes in which steps (and what comes after them) of so many seconds do not fit."""
    needed = (job.clock.seconds() + _deciding_seconds(job) + steps) / 60 / (1 - RESERVE)
    return ValueError(f"--max-minutes {minutes:g} is too little here: at least {needed:.1f} are needed")


def _step_seconds(job: Job) -> tuple[float, float]:
    """Seconds of a step with gates, and of a step of a narrow model: the mean over models of each target's
    size. The models are thrown away."""
    settings = job.settings
    spanning = _spanning_batches(job)
    timed = replace(job, train=spanning, gate_train=spanning, cache=None, retrain_windows=None)
    gate = 0.0
    if settings.recipe in UNTRAINED and settings.decision is None:
        gate = _score_seconds(job, len(importance.left_out(job.budget.dense, settings.parts)))
    student = copy.deepcopy(job.dense)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with (
        attached(student, settings.seed, settings.parts) as gates,
        running(job.teacher, job.teacher_dtype) as teacher,
    ):
        decisions = _any_decisions(job, gates)
        retrain = statistics.mean(
            _narrow_seconds(timed, student, teacher, decision) for decision in decisions
        )
        if settings.trains_gates:
            phase = gate_phase_for(job, gates)
            freeze_for(job, student, gates)
            gate = _time_steps(timed, student, teacher, phase)
    return once(lambda: (gate, retrain))  # the main process's times are everyone's


def _narrow_seconds(
    job: Job, student: PreTrainedModel, teacher: PreTrainedModel, decision: Decision
) -> float:
    """Seconds of a step of the narrow model of a decision."""
    narrow = compact(student, decision)
    prepare_student(narrow, job.settings.dropout, job.settings.train_embeddings)
    return _time_steps(job, narrow, teacher, None)


def _any_decisions(job: Job, gates: Gates) -> list[Decision]:
    """The decision that is given; or for each target a choice of its size, of gates that a little seeded
    noise tells apart."""
    if job.settings.decision is not None:
        return [Decision.load(job.settings.decision)]
    for i, log_alpha in enumerate(gates.locations()):
        noise = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(i))
        log_alpha.data += 0.01 * noise.to(log_alpha)
    if not job.settings.targets:
        return [decide_at(gates.scores(), job.budget, 0.0, job.align)]
    return [decide(gates.scores(), job.budget, target, job.align) for target in job.settings.targets]


def _deciding_seconds(job: Job) -> float:
    """Seconds that timing the choices will take: both models, TIMED_CHOICES times for each target in time."""
    if job.table is None:  # no target in time
        return 0.0
    rounds = TIMED_CHOICES * (ROUNDS + 1)
    return sum(
        rounds * len(choice_workload(job, target).batches) * round_seconds(job, target)
        for target in job.settings.targets
    )


def _averaging_seconds(job: Job) -> float:
    """Seconds that scoring the last weights of each target's model, and their mean, will take: what the dense
    model takes for some of the validation windows, for all of them and as often as they are passed."""
    if not job.settings.average_steps:
        return 0.0
    windows, size = job.validation.windows, job.settings.train_batch
    sample = windows[:: max(len(windows) // SCORED_WINDOWS, 1)][:SCORED_WINDOWS]
    batches = [job.unlabelled_batch(sample[begin : begin + size]) for begin in range(0, len(sample), size)]
    with running(job.dense) as dense, torch.no_grad():
        start = time.perf_counter()
        for batch in batches:
            dense(**batch)
        seconds = time.perf_counter() - start
    passes = 2 * (1 + bool(job.task.thresholds))  # thresholds are chosen in a pass of their own
    return max(len(job.settings.targets), 1) * passes * seconds * len(windows) / len(sample)


def _score_seconds(job: Job, choices: int) -> float:
    """Seconds that the scores of one minibatch take: the passes of the surgeon or of gain, or a forward pass
    for each of leave-one-out's choices."""
    if job.settings.recipe == "random":
        return 0.0
    features = _spanning_batches(job)[: job.settings.train_batch]
    batch = job.batch(features)
    parts = job.settings.parts
    start = time.perf_counter()
    if job.settings.recipe == "fast":
        surgeon.moments_of(job.dense, [batch], parts, pooling=job.pooling)
    else:
        importance.score("gain", job.dense, [batch], job.budget, parts)
    # A forward pass is a third of gain's forward and backward pass.
    passes = (choices + 1) / 3 if job.settings.recipe == "leave-one-out" else 1
    return (time.perf_counter() - start) * passes


def _spanning_batches(job: Job) -> list[dict[str, Any]]:
    return timing_batches(job.train, job.settings.train_batch, job.settings.precision)


def _time_steps(job: Job, model: PreTrainedModel, teacher: PreTrainedModel, phase: GatePhase | None) -> float:
    """Mean seconds of a step over the job's windows, in their order; the first ones warm up."""
    return step_seconds(
        job.settings.precision,
        lambda folder, steps: build_trainer(job, model, teacher, folder, steps, phase, timing=True),
    )
