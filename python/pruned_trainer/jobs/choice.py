"""The choice: gates trained by a recipe, or importance scores; then a decision and a narrow model for each
target."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed

from pruned_ops.files import read_json, write_json
from pruned_ops.models.model_card import WEIGHTS
from pruned_trainer.distributed import is_main, once, say, state
from pruned_trainer.jobs.job import Job, running
from pruned_trainer.jobs.timed_choice import decide_in_time
from pruned_trainer.jobs.trainers import build_trainer
from pruned_trainer.pruning import importance, surgeon
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import ShareOfGates
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.compensate import compensate
from pruned_trainer.pruning.decision import Decision, decide, decide_at
from pruned_trainer.pruning.expand import close, expanded
from pruned_trainer.pruning.gate_phase import GatePhase, HoldTarget, PayPerGate
from pruned_trainer.pruning.gates import Gates, PerGate, Scores
from pruned_trainer.pruning.options import Target
from pruned_trainer.training.phase import Log, prepare_student, run

# Windows that a compensation is solved on, and validation windows that choose the way.
CALIBRATION_WINDOWS, CHOOSING_WINDOWS = 128, 64
# The paper does not state its threshold: gates whose deterministic value is at least 1/2 stay.
PAPER_THRESHOLD = 0.0

DECISION = "decision.json"  # in a run's output
_RECORD = "choice.json"  # the log of the gates' training, and the seconds until its end


@dataclass(frozen=True)
class Chosen:
    """The decision for one target, and the folder of the narrow model that it makes.

    A run keeps both in its own folder, numbered by the target, until its output is whole. The decision is
    written after the model: where there is a decision, both are whole.
    """

    decision: Decision
    model_folder: Path

    @staticmethod
    def _paths(folder: Path, number: int) -> tuple[Path, Path]:
        return folder / f"decision-{number}.json", folder / f"narrow-{number}"

    @classmethod
    def write(cls, folder: Path, number: int, narrow: PreTrainedModel, decision: Decision) -> Chosen:
        """Write a decision and the narrow model that it made into a run's folder."""
        file, model_folder = cls._paths(folder, number)
        model_folder.mkdir(exist_ok=True)
        save_model(narrow, str(model_folder / WEIGHTS))
        decision.save(file)
        return cls(decision, model_folder)

    @classmethod
    def read(cls, folder: Path, number: int) -> Chosen | None:
        """What `write` left in a run's folder; None where it has not come to its end."""
        file, model_folder = cls._paths(folder, number)
        return cls(Decision.load(file), model_folder) if file.is_file() else None

    @classmethod
    def remove_all(cls, folder: Path) -> None:
        """Remove everything that `write` left in a run's folder."""
        for file in folder.glob("decision-*.json"):
            file.unlink()
        for model_folder in folder.glob("narrow-*"):
            shutil.rmtree(model_folder)

    def load(self, dense: Any) -> Any:
        """The narrow model of this dense one, as the gate phase left it."""
        narrow = compact(dense, self.decision)
        load_model(narrow, str(self.model_folder / WEIGHTS))
        return narrow

    def publish(self, folder: Path) -> None:
        """Write the decision beside the trained model, for the user."""
        self.decision.save(folder / DECISION)

    @classmethod
    def published(cls, folder: Path) -> Chosen:
        """The decision and the trained model of a run's output folder."""
        return cls(Decision.load(folder / DECISION), folder)


class Choices(NamedTuple):
    """What `choose` returns: a choice for each target, the log of the gates' training, and the seconds that
    an interrupted run took until all were made (0 where this run made them)."""

    chosen: list[Chosen]
    log: Log
    earlier_seconds: float


def choose(job: Job, folder: Path, steps: int) -> Choices:
    """Make a decision and a narrow model for each target (without a target, one by threshold), in `folder`.

    Where an earlier, interrupted run has written them all, nothing is trained or decided again.
    """
    targets: list[Target | None] = list(job.settings.targets) or [None]
    recorded = _read_all(folder, len(targets))
    if recorded is not None:
        return recorded
    set_seed(job.settings.seed)
    log: Log = []
    if job.settings.decision is not None:
        # Whatever made up for the loss then did so on another model: it is asked for anew, or left.
        decision = replace(Decision.load(job.settings.decision), compensation={})
        write_compensated(job, folder, 0, copy.deepcopy(job.dense), decision)
    elif job.settings.recipe == "joint":
        log = train_jointly(job, folder, steps)
    else:
        scores, log = _paper(job, folder, steps) if job.settings.recipe == "paper" else _scored(job, steps)
        for number, (target, target_scores) in enumerate(zip(targets, scores, strict=True)):
            decide_for(job, folder, number, copy.deepcopy(job.dense), target_scores, target)
    if is_main():
        write_json(folder / _RECORD, {"log": log, "seconds": job.clock.seconds()})
    state().wait_for_everyone()
    choices = _read_all(folder, len(targets))  # in every run, so that what a resumed run reads is tried
    assert choices is not None
    return choices._replace(earlier_seconds=0.0)


def _read_all(folder: Path, number: int) -> Choices | None:
    """The choices that a run has written into its folder, or None where one of them is missing."""
    record = folder / _RECORD
    chosen = [Chosen.read(folder, k) for k in range(number)]
    if not record.is_file() or None in chosen:
        return None
    log, seconds = _recorded(record)
    return Choices([c for c in chosen if c is not None], log, seconds)


def _recorded(file: Path) -> tuple[Log, float]:
    """The log and the seconds in a record; ValueError that names the file where it holds anything else."""
    recorded = read_json(file, "record of a choice")
    fields = recorded if isinstance(recorded, dict) else {}
    log, seconds = fields.get("log"), fields.get("seconds")
    is_log = isinstance(log, list) and all(isinstance(entry, dict) for entry in log)
    if log is None or not is_log or not isinstance(seconds, (int, float)):
        raise ValueError(f"{file} is no record of a choice; --overwrite starts anew")
    return log, seconds


def remove_choices(folder: Path) -> None:
    """Remove what `choose` left in a run's folder, and the gates' checkpoints."""
    Chosen.remove_all(folder)
    for checkpoints in folder.glob("gates*"):
        shutil.rmtree(checkpoints)
    (folder / _RECORD).unlink(missing_ok=True)


def gate_phase_for(job: Job, gates: Gates) -> GatePhase:
    """The recipe's term of the loss. The paper's recipe charges its prices where there is no target; where
    there are targets, it holds the share of each part's gates that they allow."""
    settings, budget = job.settings, job.budget
    rate, penalty = settings.gate_learning_rate, settings.penalty
    fractions = [budget.allowed_fraction(target) for target in settings.targets]
    if settings.recipe == "joint":
        return HoldTarget(gates, budget, fractions, rate, penalty)
    if not fractions:
        return PayPerGate(gates, settings.multiples, rate, penalty)
    shares = [budget.even_share(settings.parts, fraction) for fraction in fractions]
    return HoldTarget(gates, ShareOfGates(gates.parts), shares, rate, penalty)


def freeze_for(job: Job, student: PreTrainedModel, gates: Gates) -> None:
    """Freeze the weights in the paper's recipe, where the gates alone train."""
    if job.settings.recipe == "paper":
        student.requires_grad_(False)
        gates.requires_grad_(True)


def train_jointly(job: Job, folder: Path, steps: int) -> Log:
    """Train gates and weights together, and decide for each target when the training has passed it.

    Where the job has an earlier narrow model, the training begins with that."""
    settings = job.settings
    targets = settings.targets
    earlier = job.earlier
    student = copy.deepcopy(job.dense) if earlier is None else expanded(job.dense, *earlier)
    prepare_student(student, settings.dropout, settings.train_embeddings)
    with (
        attached(student, settings.seed, settings.parts) as gates,
        running(job.teacher, job.teacher_dtype) as teacher,
    ):
        if earlier is not None:
            close(gates, earlier.decision)
        phase = announced(gate_phase_for(job, gates), steps)
        trainer = build_trainer(job, student, teacher, folder / "gates", steps, phase)

        def decide_next(number: int) -> None:
            decide_for(job, folder, number, student, gates.scores(), targets[number])

        trainer.add_callback(_AtSteps(phase.stage_ends(steps), decide_next))
        return run(trainer, "gate", settings.resumable)


def announced(phase: GatePhase, steps: int) -> GatePhase:
    """Tell the user what is unusual about a training of `steps` steps, and return the phase."""
    for remark in phase.remarks(steps):
        say(remark)
    return phase


def _paper(job: Job, folder: Path, steps: int) -> tuple[list[Scores], Log]:
    """The scores of all parts together for each target, after each part's gates were trained alone on frozen
    weights."""
    log: Log = []
    by_part = {}
    for part in job.settings.parts:
        by_part[part], part_log = paper_gates(job, folder / f"gates-{part}", part, steps)
        log += part_log
    return [
        together(job, {part: scores[k] for part, scores in by_part.items()})
        for k in range(max(len(job.settings.targets), 1))
    ], log


def paper_gates(job: Job, folder: Path, part: str, steps: int) -> tuple[list[Scores], Log]:
    """Train the gates of one part on frozen weights, towards the share that each target allows or at the
    settings' price; the scores are those at the end of each target's steps.

    Checkpoints and scores go into `folder`, and training goes on from the last checkpoint that is there.
    """
    settings = job.settings
    student = copy.deepcopy(job.dense)
    prepare_student(student, settings.dropout, False)
    with (
        attached(student, settings.seed, [part]) as gates,
        running(job.teacher, job.teacher_dtype) as teacher,
    ):
        freeze_for(job, student, gates)
        phase = gate_phase_for(job, gates)
        held = ", ".join(f"{share:.3f}" for share in getattr(phase, "fractions", ()))
        price = f"{settings.multiples[part]:g} times the paper's lambda"
        say(f"gates on {part}, " + (f"held to shares of {held}" if held else f"at {price}"))
        trainer = build_trainer(job, student, teacher, folder, steps, announced(phase, steps))
        files = [folder / f"scores-{k}.pt" for k in range(phase.stages)]

        def keep(number: int) -> None:
            if is_main():
                gates.scores().save(files[number])
            state().wait_for_everyone()

        trainer.add_callback(_AtSteps(phase.stage_ends(steps), keep))
        log = run(trainer, "gate", settings.resumable)
    return [Scores.load(file) for file in files], log


def together(job: Job, scores: Mapping[str, Scores]) -> Scores:
    """One set of scores out of those of gates that were trained apart, by part; the other parts stay whole.

    Where there are targets, a gate's rank is its place among the gates of its own part, because log_alphas of
    separate trainings are not on one scale: the choice then removes the same share of each part.
    """
    rank, values = PerGate.full(job.budget.dense, float("inf")), PerGate.full(job.budget.dense, 1.0)
    for part, part_scores in scores.items():
        rank = rank.replace(part, part_scores.rank.places() if job.settings.targets else part_scores.rank)
        values = values.replace(part, part_scores.values)
    return Scores(rank, values)


def _scored(job: Job, steps: int) -> tuple[list[Scores], Log]:
    """Importance scores over `steps` minibatches of the training file, the same for each target; of the
    job's earlier narrow model, where it has one."""
    settings, earlier = job.settings, job.earlier
    batches = score_batches(job, steps)

    def score() -> Scores:
        if settings.recipe == "fast":
            model, left = (job.dense, None) if earlier is None else earlier
            return surgeon.score(
                model, batches, job.budget, settings.parts, settings.seed, job.pooling, is_main(), left
            )
        return importance.score(
            settings.recipe, job.dense, batches, job.budget, settings.parts, settings.seed, is_main()
        )

    # All processes share leave-one-out's many passes; the other methods are done before one could ask for
    # help.
    scores = score() if settings.recipe == "leave-one-out" else once(score)
    return [scores] * len(settings.targets), []


def score_batches(job: Job, steps: int) -> list[dict[str, Tensor]]:
    """The windows of the first `steps` minibatches of the gates' training, in an order of the seed; batched
    with others of like lengths, which need little padding, on the model's device."""
    settings = job.settings
    data = job.gate_train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    size = settings.train_batch
    chosen = sorted((data[i] for i in order[: steps * size]), key=tokens_of)
    return [job.batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]


class _AtSteps(TrainerCallback):
    """Calls `work` with the number of each of these steps, which do not fall, when training has reached it.

    The last call comes at the end of training, when the last checkpoint is whole: a run that is killed then
    resumes there, past the last step.
    """

    def __init__(self, steps: Sequence[int], work: Callable[[int], None]) -> None:
        self.steps, self.work = list(steps), work

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for number, step in enumerate(self.steps[:-1]):
            if step == state.global_step:
                self.work(number)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.steps[-1]:  # else somebody stopped it
            self.work(len(self.steps) - 1)


def decide_for(
    job: Job, folder: Path, number: int, student: PreTrainedModel, scores: Scores, target: Target | None
) -> None:
    """Decide for one target, and write the decision and its narrow model."""
    if target is None:
        decision = decide_at(scores, job.budget, PAPER_THRESHOLD, job.align)
    elif target.is_time:
        decision = once(lambda: decide_in_time(job, student, scores, target))
    else:
        decision = decide(scores, job.budget, target, job.align)
    write_compensated(job, folder, number, student, decision)


def write_compensated(
    job: Job, folder: Path, number: int, student: PreTrainedModel, decision: Decision
) -> None:
    """Write the decision for the target of this number, and the narrow model that it makes of the student."""
    if is_main():
        Chosen.write(folder, number, *compensated(job, student, decision))
    state().wait_for_everyone()


def compensated(job: Job, student: PreTrainedModel, decision: Decision) -> tuple[PreTrainedModel, Decision]:
    """The narrow model of the decision, compensated on training windows in the way that is best on validation
    windows; and the decision, which says how. Where no gates were trained, it is cut out of the job's earlier
    narrow model, if there is one."""
    cut, method = decision, job.settings.compensation
    if job.earlier is not None and not job.settings.trains_gates:
        student, cut = job.earlier.model, decision.within(job.earlier.decision)
    narrow = compact(student, cut)
    if method == "none":
        return narrow, decision
    size, windows = job.settings.train_batch, job.validation.windows
    chosen = sorted(windows[:: max(len(windows) // CHOOSING_WINDOWS, 1)][:CHOOSING_WINDOWS], key=tokens_of)
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    validation = [job.unlabelled_batch(group) for group in groups]
    calibration = score_batches(job, -(-CALIBRATION_WINDOWS // size))
    compensation = compensate(
        narrow, student, cut, calibration, method, validation, job.dense, pooling=job.pooling
    )
    say(f"compensated: {compensation}")
    return narrow, replace(decision, compensation=compensation.methods)


def tokens_of(window: Any) -> int:
    """The length of a window, an object with a length or a dictionary of ids; 0 where a caller's collator
    makes the ids."""
    return len(window.get("input_ids", ())) if isinstance(window, Mapping) else len(window)
