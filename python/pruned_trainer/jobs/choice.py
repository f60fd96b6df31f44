"""What stays: gates trained by a recipe, or importance scores; then a decision for each target, held to
measured time where the target is a time; and the narrow models that the decisions make."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from pruned_ops.files import write_json
from pruned_ops.measure.timing import interleave
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, once, say, state
from pruned_trainer.jobs.job import Job, build_trainer
from pruned_trainer.jobs.output import load_model
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide, decide_at
from pruned_trainer.pruning.gate_phase import GatePhase, HoldTarget, PayPerGate
from pruned_trainer.pruning.gates import Gates, PerGate, Scores
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.phase import prepare_student, run

# A choice that meets a target in time lies between these parts of the time allowed: within 3% of it, a little
# below, because the next measurement of the same models may differ by a percent.
MEETS = (0.97, 1.0)
AIM = 0.99
# Choices that are made and timed before the best so far is taken.
ATTEMPTS, ROUNDS = 8, 5
# The paper does not state its threshold: gates whose deterministic value is at least 1/2 stay.
PAPER_THRESHOLD = 0.0

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Chosen:
    """A decision and where its narrow model lies."""

    decision: Decision
    folder: Path

    def load(self) -> PreTrainedModel:
        """The narrow model, as the gate phase left it."""
        return load_model(str(self.folder))


def choose(job: Job, folder: Path, steps: int, targets: Sequence[Target]) -> tuple[list[Chosen], Log]:
    """A decision and a narrow model for each target (one without a target, by threshold), in `folder`.

    targets fall in size. What an earlier, interrupted run has written there is taken as it is, with the log
    and the time that it took.
    """
    wanted: list[Target | None] = list(targets) or [None]
    done = _written(folder, len(wanted))
    record = folder / "choice.json"
    if done is not None and record.is_file():
        recorded = json.loads(record.read_text(encoding="utf-8"))
        job.started -= recorded["seconds"]
        return done, recorded["log"]
    set_seed(job.settings.seed)
    if job.settings.recipe == "joint":
        log = _joint(job, folder, steps, targets)
    else:
        scores, log = _paper(job, folder, steps) if job.settings.recipe == "paper" else _scored(job, steps)
        for number, target in enumerate(wanted):
            _capture(job, folder, number, copy.deepcopy(job.dense), scores, target)
    done = _written(folder, len(wanted))
    assert done is not None
    if is_main():
        write_json(record, {"log": log, "seconds": time.perf_counter() - job.started})
    return done, log


def gate_phase_for(job: Job, gates: Gates, targets: Sequence[Target]) -> GatePhase:
    """The recipe's term of the loss."""
    settings = job.settings
    if settings.recipe == "paper":
        return PayPerGate(gates, settings.multiples, settings.gate_learning_rate, settings.penalty)
    fractions = [job.budget.wanted(target) for target in targets]
    return HoldTarget(gates, job.budget, fractions, settings.gate_learning_rate, settings.penalty)


def freeze_for(job: Job, student: PreTrainedModel, gates: Gates) -> None:
    """In the paper's recipe the gates alone train."""
    if job.settings.recipe == "paper":
        student.requires_grad_(False)
        gates.requires_grad_(True)


def _joint(job: Job, folder: Path, steps: int, targets: Sequence[Target]) -> Log:
    """Gates and weights together; a decision is taken as the training passes each target."""
    settings = job.settings
    student = copy.deepcopy(job.dense)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with attached(student, settings.seed, settings.parts) as gates, optimized(job.teacher) as teacher:
        phase = gate_phase_for(job, gates, targets)
        trainer = build_trainer(job, student, teacher, folder / "gates", steps, phase)
        ends = [round(steps * (k + 1) / len(targets)) for k in range(len(targets))]

        def capture(number: int) -> None:
            _capture(job, folder, number, student, gates.scores(), targets[number])

        trainer.add_callback(_AtSteps(ends[:-1], capture))
        log = run(trainer, "gate")
        capture(len(targets) - 1)
    return log


def _paper(job: Job, folder: Path, steps: int) -> tuple[Scores, Log]:
    """Each part's gates alone, on frozen weights; the scores of all parts together."""
    log: Log = []
    each = {}
    for part in job.settings.parts:
        each[part], own = paper_gates(job, folder / f"gates-{part}", part, steps)
        log += own
    return together(job, each), log


def paper_gates(job: Job, folder: Path, part: str, steps: int) -> tuple[Scores, Log]:
    """Gates on one part, trained on frozen weights at the settings' price; checkpoints go into `folder`, and
    training goes on from what is there."""
    settings = job.settings
    student = copy.deepcopy(job.dense)
    prepare_student(student, settings.dropout, False)
    say(f"gates on {part}, at {settings.multiples[part]:g} times the paper's lambda")
    with attached(student, settings.seed, [part]) as gates, optimized(job.teacher) as teacher:
        freeze_for(job, student, gates)
        phase = gate_phase_for(job, gates, [])
        log = run(build_trainer(job, student, teacher, folder, steps, phase), "gate")
        return gates.scores(), log


def together(job: Job, each: Mapping[str, Scores]) -> Scores:
    """The scores of gates that were trained apart, by part; parts that had none stay as they are."""
    rank, values = PerGate.full(job.budget.dense, float("inf")), PerGate.full(job.budget.dense, 1.0)
    for part, found in each.items():
        rank, values = rank.replace(part, found.rank), values.replace(part, found.values)
    return Scores(rank, values)


def _scored(job: Job, steps: int) -> tuple[Scores, Log]:
    """Importance scores over `steps` minibatches of the training file."""
    settings = job.settings
    batches = score_batches(job, steps)

    def work() -> Scores:
        return importance.score(
            settings.recipe, job.dense, batches, job.budget, settings.parts, settings.seed, is_main()
        )

    # All processes share leave-one-out's many passes; the others are done before one could ask for help.
    return (work() if settings.recipe == "leave-one-out" else once(work)), []


def score_batches(job: Job, steps: int) -> list[dict[str, Tensor]]:
    """The first `steps` minibatches of the gates' training windows, in an order of the seed; on the model's
    device."""
    settings = job.settings
    data = job.gate_train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    size = settings.train_batch
    collate = partial(pad_batch, pad_token_id=job.dense.config.pad_token_id)
    chosen = [order[start : start + size] for start in range(0, min(steps * size, len(order)), size)]
    device = job.dense.device
    return [
        {k: v.to(device) for k, v in collate([data[i] for i in rows]).items() if k != "number"}
        for rows in chosen
    ]


class _AtSteps(TrainerCallback):
    """Calls back after each of these steps, with its number among them."""

    def __init__(self, steps: Sequence[int], work: Any) -> None:
        self.steps, self.work = list(steps), work

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.work(self.steps.index(state.global_step))


def _capture(
    job: Job, folder: Path, number: int, student: PreTrainedModel, scores: Scores, target: Target | None
) -> None:
    """Decide for one target, and write the decision and its narrow model."""
    if target is None:
        decision = decide_at(scores, job.budget, PAPER_THRESHOLD, job.align)
    elif target.is_time:
        decision = once(lambda: decide_in_time(job, student, scores, target))
    else:
        decision = decide(scores, job.budget, target, job.align)
    if is_main():
        place = folder / f"narrow-{number}"
        compact(student, decision).save_pretrained(place)
        decision.save(folder / f"decision-{number}.json")  # it comes last: where it is, all is
    state().wait_for_everyone()


def _written(folder: Path, number: int) -> list[Chosen] | None:
    places = [(folder / f"decision-{k}.json", folder / f"narrow-{k}") for k in range(number)]
    if not all(decision.is_file() for decision, _ in places):
        return None
    return [Chosen(Decision.load(decision), narrow) for decision, narrow in places]


def decide_in_time(job: Job, student: PreTrainedModel, scores: Scores, target: Target) -> Decision:
    """The best-ranking choice whose measured time meets the target: decide by the table, time the narrow
    model against the dense one, correct what is asked of the table, and again.

    ValueError, with the fastest that was seen, where none of ATTEMPTS choices meets it.
    """
    asked = job.budget.wanted(target)
    fraction, best, timed = asked * AIM, None, {}  # timed: the shapes that were, and what they took
    # Of the fractions asked of the table: the largest that met the target, the smallest that did not.
    low, high = 0.0, 1.0
    for _ in range(ATTEMPTS):
        try:
            decision = decide(scores, job.budget, target, job.align, fraction)
        except ValueError:  # no choice is that small
            low, fraction = max(low, fraction), (max(low, fraction) + high) / 2
            continue
        shape = decision.shape(job.budget.dense)
        if shape in timed:
            break
        measured = timed[shape] = _measured_fraction(job, compact(student, decision), target)
        say(
            f"a choice that the table puts at {job.budget.fraction(shape):.3f} of the dense time takes "
            f"{measured:.3f} of it ({asked:.3f} asked)"
        )
        if asked * MEETS[0] <= measured <= asked * MEETS[1]:
            return decision
        if measured < asked:
            low, best = fraction, decision
        else:
            high = fraction
        corrected = fraction * asked * AIM / measured
        fraction = corrected if low < corrected < high else (low + high) / 2
    if best is None:
        fastest = f"the fastest took {min(timed.values()):.3f}" if timed else "the smallest is larger"
        raise ValueError(f"no choice took at most {asked:.3f} of the dense time; {fastest}")
    return best


def _measured_fraction(job: Job, narrow: PreTrainedModel, target: Target) -> float:
    """Seconds of the narrow model over seconds of the dense one on the workload, interleaved."""
    config = job.dense.config
    inputs = job.workload.inputs(config.vocab_size, config.pad_token_id, job.dense.device)
    with optimized(job.dense) as dense, optimized(narrow.eval()) as fast:
        runners = {"dense": lambda batch: dense(**batch), "narrow": lambda batch: fast(**batch)}
        timings = interleave(runners, job.workload, inputs, ROUNDS)
    if target.unit == "latency_ms":
        return timings["narrow"].ms(50) / job.budget.total
    return 1 / timings["narrow"].speedup_over(timings["dense"])
