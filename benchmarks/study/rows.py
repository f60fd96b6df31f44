"""The study's pieces of work, each of which makes one record: a point of the curves, a row of the paper's
table, gates on hidden dimensions, the joint recipe beside the paper's."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness import Row
from pruned_ops import ModelShape
from pruned_ops.models.configuration import PrunedConfig
from pruned_ops.models.stock import find_encoder, model_shape
from pruned_trainer.jobs.choice import choose, compensated, score_batches
from pruned_trainer.jobs.evaluation import model_facts
from pruned_trainer.jobs.job import Clock, Job
from pruned_trainer.jobs.plan import make_plan
from pruned_trainer.jobs.prune import retrain
from pruned_trainer.jobs.trainers import build_trainer
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import ShareOfGates
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide_at
from pruned_trainer.pruning.gate_phase import SETTLING_STEPS, HoldTarget
from pruned_trainer.pruning.gates import PerGate, Scores
from pruned_trainer.pruning.options import MAX_PACE, PARTS, Target
from pruned_trainer.tasks.squad.metrics import EvaluationResult, bootstrap_interval
from pruned_trainer.tasks.squad.task import Questions
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.phase import prepare_student, run
from pruned_trainer.training.trainer import last_checkpoint
from study.records import Study, missing

# The four ways to choose. The first is ours, and the others are compared with it.
METHODS = ("l0", "leave-one-out", "gain", "random")
# The shares of heads and FFN units that the paper's rows remove, in the order in which they are made here.
# Row a is the dense model.
TABLE = {
    "e": (0.531, 0.649), "d": (0.440, 0.481), "g": (0.601, 0.784), "f": (0.576, 0.737), "b": (0.443, 0.0),
    "c": (0.0, 0.481),
}  # fmt: skip
# Rows beside the paper's: the dense model, and a model of every second layer, trained on for as many steps.
OTHERS = ("control", "half")
# Version 1 of the paper prunes the hidden dimension, too: row d, and a tenth of the dimensions.
HIDDEN_ROW, HIDDEN_SHARES = "h", (0.440, 0.481, 0.1)
# How a row's model is trained on: as in the paper's Table 2, and with a teacher. By the name: settings.
RETRAININGS = {"cross-entropy": {"distil_in": "none"}, "distilled": {"distil_in": "retrain"}}
# More minutes than any row takes: of the plan, only the time of a step is used.
ENDLESS = 1e6


def timed_training(folder: Path, steps: int, work: Callable[[], Any]) -> tuple[Any, float | None]:
    """The result of `work`, and the seconds that its `steps` training steps take: processor time of this
    process, which other processes do not lengthen, or the clock's on a GPU. A training that goes on from a
    checkpoint is timed over the steps that are left; the seconds are None where none are."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    before = last_checkpoint(folder)
    steps_left = steps - (int(before.name.rpartition("-")[2]) if before else 0)
    start = clock()
    result = work()
    return result, (clock() - start) * steps / steps_left if steps_left else None


def row_name(letter: str, retraining: str, seed: int) -> str:
    """The name of a row's piece of work, and of its scores."""
    return f"row-{letter}-{retraining}-seed{seed}" if letter != "a" else f"row-a-seed{seed}"


def gates(study: Study, seed: int, part: str, share: float) -> tuple[Scores, float | None]:
    """The part's gates, trained once on frozen weights with cross-entropy and held to closing this share of
    them; and the seconds that it took."""
    name = f"gates-{part}-{share:g}-seed{seed}"
    profile = study.profile
    folder = study.work / "training" / name
    seconds: list[float | None] = []

    def work() -> Scores:
        rate = {"gate_learning_rate": profile.gate_learning_rate}
        job = study.job_for(seed, batch_size=profile.gate_batch, distil_in="none", **rate)
        training = partial(_held_gates, job, folder, part, 1 - share, profile.gate_steps)
        scores, training_seconds = timed_training(folder, profile.gate_steps, training)
        seconds.append(training_seconds)
        return scores

    scores = study.scores(name, work)
    record = study.once(name, lambda: {"kind": "gates", "seconds": seconds[0] if seconds else None})
    shutil.rmtree(folder, ignore_errors=True)
    return scores, record["seconds"]


def _held_gates(job: Job, folder: Path, part: str, kept: float, steps: int) -> Scores:
    student = copy.deepcopy(job.dense)
    prepare_student(student, job.settings.dropout, False)
    student.requires_grad_(False)
    with attached(student, job.settings.seed, [part]) as gates_of_part:
        share = ShareOfGates([part])
        phase = HoldTarget(gates_of_part, share, [kept], job.settings.gate_learning_rate)
        run(build_trainer(job, student, job.teacher, folder, steps, phase), "gate")
        return gates_of_part.scores()


def importances(study: Study, seed: int, method: str) -> Scores:
    """The scores of every head and FFN unit by a method that trains nothing."""
    profile = study.profile

    def work() -> Scores:
        job = study.job_for(seed)
        batches = score_batches(job, profile.score_steps.get(method, 0))
        return importance.score(method, job.dense, batches, job.budget, ("heads", "ffn"), seed)

    return study.scores(f"{method}-seed{seed}", work)


def l0_for(study: Study, seed: int, part: str, fraction: float) -> tuple[Scores, Row]:
    """The trained gates that were held to the share nearest to `fraction`; and a field of a row: that
    share."""
    held = study.profile.hidden_fractions if part == "hidden" else study.profile.held
    share = min(held, key=lambda share: abs(share - fraction))
    return gates(study, seed, part, share)[0], {"held": share}


def without(job: Job, scores: Scores, part: str, fraction: float) -> Decision:
    """The decision that removes the lowest-ranking `fraction` of one part. It leaves the rest unscaled, so
    that the methods differ in their choice alone."""
    rank = torch.cat(scores.rank.of(part)).sort(descending=True).values
    stay = max(round(len(rank) * (1 - fraction)), 1)
    alone = PerGate.full(job.budget.dense, float("inf")).replace(part, scores.rank)
    same = Scores(alone, PerGate.full(job.budget.dense, 1.0))
    return decide_at(same, job.budget, float(rank[stay - 1]), align=1)


def scored(model: PreTrainedModel, held: Questions, questions: Questions) -> EvaluationResult:
    """The model's scores on the questions, at the threshold that is best for it on the held-out ones."""
    return questions.evaluate(model, held.best_thresholds(model))


def dense_scores(study: Study, curve: bool) -> EvaluationResult:
    """The dense model's scores, on the curves' questions or on the rows'."""
    job = study.job
    held, questions = (study.held, study.questions) if curve else (job.validation, job.evaluation)
    return study.result(f"dense-{'curve' if curve else 'row'}", lambda: scored(job.dense, held, questions))


def numbers(result: EvaluationResult, dense: EvaluationResult, when: str = "") -> Row:
    """F1 and span F1, and the points lost against the dense model, with 95% intervals over the questions.
    when: ends the fields' names, but for the intervals' own ends."""
    row: Row = {f"f1{when}": result.f1, f"f1_span{when}": result.f1_span}
    for name, value in dense.losses(result).items():
        if name.endswith("_interval"):
            loss = name.removesuffix("_interval") + when
            row[f"{loss}_low"], row[f"{loss}_high"] = value or (None, None)
        else:
            row[f"{name}{when}"] = value
    return row


def curve_point(study: Study, seed: int, part: str, fraction: float) -> Row:
    """All methods at one fraction of one part, without retraining, and how many points each is behind L0 on
    the same questions."""
    job, dense = study.job, dense_scores(study, curve=True)
    rows: list[Row] = []
    first: EvaluationResult | None = None
    for method in METHODS if part != "hidden" else METHODS[:1]:
        gate_facts: Row = {}
        if method == "l0":
            scores, gate_facts = l0_for(study, seed, part, fraction)
        else:
            scores = importances(study, seed, method)
        decision = without(job, scores, part, fraction)
        name = f"{part}-{fraction:g}-{method}-seed{seed}"
        judge = partial(scored, compact(job.dense, decision), study.held, study.questions)
        result = study.result(name, judge)
        row = {"kind": "curve", "on": part, "fraction": fraction, "method": method, "seed": seed}
        row |= {"removed": removed(job, decision.shape(job.budget.dense))[part], **gate_facts}
        row |= numbers(result, dense) | _compensated(study, seed, name, decision, dense)
        first = first or result
        rows.append(row | behind(first, result) | {"questions": len(study.questions)})
    return {"rows": rows}


def _compensated(study: Study, seed: int, name: str, decision: Decision, dense: EvaluationResult) -> Row:
    """What the same choice reaches once the narrow model was compensated for it, and in which way."""
    ways: dict[str, str] = {}

    def work() -> EvaluationResult:
        job = study.job_for(seed, compensate="auto")
        narrow, compensated_decision = compensated(job, job.dense, decision)
        ways.update(compensated_decision.compensation)
        return scored(narrow, study.held, study.questions)

    result = study.result(f"{name}-compensated", work)
    record = study.once(f"compensation-{name}", lambda: {"kind": "compensation", "ways": ways})
    scores = numbers(result, dense, "_compensated")
    return scores | {"compensation": ", ".join(f"{part} {way}" for part, way in record["ways"].items())}


def behind(first: EvaluationResult, other: EvaluationResult) -> Row:
    """The points that `first` is better by in both scores, with 95% intervals."""
    row: Row = {"f1_behind_l0": first.f1 - other.f1}
    row["f1_behind_l0_low"], row["f1_behind_l0_high"] = bootstrap_interval(
        first.question_f1, other.question_f1
    )
    if first.f1_span is not None and other.f1_span is not None:
        row["f1_span_behind_l0"] = first.f1_span - other.f1_span
        ends = bootstrap_interval(first.question_span_f1, other.question_span_f1)
        row["f1_span_behind_l0_low"], row["f1_span_behind_l0_high"] = ends
    return row


def removed(job: Job, left: ModelShape) -> dict[str, float]:
    """The fraction of each part that a model of this shape lacks."""
    full = job.budget.dense
    return {
        "heads": 1 - sum(x.num_heads for x in left.layers) / sum(x.num_heads for x in full.layers),
        "ffn": 1 - sum(x.ffn_width for x in left.layers) / sum(x.ffn_width for x in full.layers),
        "hidden": 1 - left.hidden_size / full.hidden_size,
    }


def table_row(study: Study, seed: int, letter: str, retraining: str) -> Row:
    """A row of the paper's table, or one beside it: a dense or narrow model, trained on in one of RETRAININGS
    (row a: as it came)."""
    row: Row = {"kind": "row", "row": letter, "seed": seed, "retraining": retraining}
    if letter == "a":
        dense = dense_scores(study, False)
        return {"rows": [row | facts(study, study.job.dense) | numbers(dense, dense)]}
    name, changes = row_name(letter, retraining, seed), dict[str, Any](RETRAININGS[retraining])
    decision: Decision | None = None
    if letter == "half":
        narrow = half(study.job.dense)
        if retraining == "distilled":
            changes["distillation"] = every_second_layer(study.job.dense)
    else:
        decision = everything(study.job)
        if letter != "control":
            decision, row["gate_seconds"] = by_shares(study, seed, letter)
        narrow = compact(study.job.dense, decision)
    trained = _train_on(study, study.job_for(seed, **changes), name, narrow, decision)
    return {"rows": [row | trained | _against_control(study, name, letter, retraining, seed)]}


def by_shares(study: Study, seed: int, letter: str) -> tuple[Decision, float | None]:
    """The decision that removes a letter's shares of each part, by gates that were held to them; and the
    seconds that their training took."""
    letters = HIDDEN_SHARES if letter == HIDDEN_ROW else TABLE[letter]
    shares = {part: share for part, share in zip(PARTS, letters, strict=False) if share}
    trained = {part: gates(study, seed, part, share) for part, share in shares.items()}
    seconds = [part_seconds for _, part_seconds in trained.values()]
    took_all = None if None in seconds else sum(s for s in seconds if s is not None)
    return at_shares(study.job, {part: scores for part, (scores, _) in trained.items()}, shares), took_all


def at_shares(job: Job, scores: Mapping[str, Scores], shares: Mapping[str, float]) -> Decision:
    """The decision that removes these shares of each part, the lowest-ranking first, by scores of its own."""
    rank, values = (PerGate.full(job.budget.dense, value) for value in (float("inf"), 1.0))
    for part, share in shares.items():
        places = scores[part].rank.places().map(partial(_above, share))
        rank, values = rank.replace(part, places), values.replace(part, scores[part].values)
    return decide_at(Scores(rank, values), job.budget, 0.0, job.align)


def _above(share: float, places: Tensor) -> Tensor:
    return places - share


def everything(job: Job) -> Decision:
    """The decision that keeps all of the dense model."""
    rank, values = (PerGate.full(job.budget.dense, value) for value in (float("inf"), 1.0))
    return decide_at(Scores(rank, values), job.budget, 0.0, align=1)


def half(dense: PreTrainedModel) -> PreTrainedModel:
    """A model of every second layer of the dense one, the last of each pair."""
    shorter = copy.deepcopy(dense)
    encoder: Any = find_encoder(shorter).encoder
    encoder.layer = nn.ModuleList(list(encoder.layer)[1::2])
    shorter.config.num_hidden_layers = len(encoder.layer)
    if isinstance(shorter.config, PrunedConfig):
        shorter.config.layer_shapes = shorter.config.layer_shapes[1::2]
    return shorter


def every_second_layer(dense: PreTrainedModel) -> Distillation:
    """Distillation in which each layer of `half` learns from the layer that it came from."""
    layers = range(dense.config.num_hidden_layers // 2)
    return Distillation(layers=tuple((i + 1, 2 * i + 2) for i in layers))


def _against_control(study: Study, name: str, letter: str, retraining: str, seed: int) -> Row:
    """The points that a row loses against the dense control of the same steps, with intervals."""
    control = row_name("control", retraining, seed)
    if letter in ("control", HIDDEN_ROW):
        return {}
    study.once(control, partial(table_row, study, seed, "control", retraining))
    both = [study.result(result_name, partial(missing, result_name)) for result_name in (name, control)]
    return {key: value for key, value in numbers(*both, "_control").items() if "loss" in key}


def _train_on(
    study: Study, job: Job, name: str, narrow: PreTrainedModel, decision: Decision | None,
    steps: int | None = None,
) -> Row:  # fmt: skip
    """The fields of a narrow model's row: its scores before and after the study's retraining. steps: of it;
    None: the profile's."""
    steps = study.profile.retrain_steps if steps is None else steps
    nn.Module.to(narrow, job.dense.device)
    dense, folder = dense_scores(study, curve=False), study.work / "training" / name
    before = study.result(f"{name}-before", lambda: scored(narrow, job.validation, job.evaluation))
    whole = decision if decision is not None else everything(job)
    _, seconds = timed_training(folder, steps, lambda: retrain(job, narrow, folder, steps, whole))
    after = study.result(name, lambda: scored(narrow, job.validation, job.evaluation))
    shutil.rmtree(folder, ignore_errors=True)
    first = numbers(before, dense, "_before")
    training = {"retrain_steps": steps, "retrain_seconds": seconds}
    return facts(study, narrow) | first | numbers(after, dense) | training


def facts(study: Study, model: PreTrainedModel) -> Row:
    """What is left of the dense model: a model's sizes, its shape, and the fractions that are removed."""
    job = study.job
    lengths = job.validation.arrival_lengths()
    narrow, dense = model_facts(model, lengths), model_facts(job.dense, lengths)
    shape = model_shape(model)
    return {
        **{f"{part}_removed": value for part, value in removed(job, shape).items()},
        "mib": narrow["bytes"] / 2**20,
        "macs_cut": dense["macs"] / narrow["macs"] if narrow["macs"] else None,  # None: nothing is left
        "macs_kept": narrow["macs"] / dense["macs"],
        "hidden_size": shape.hidden_size,
        "layers": " ".join(f"{layer.num_heads}/{layer.ffn_width}" for layer in shape.layers),
        "questions": len(job.evaluation),
    }


def joint_row(study: Study, seed: int, like: Row) -> Row:
    """The joint recipe at the size of `like`, a row of the paper's recipe, in as much time: the steps of both
    recipes are timed here, one after the other."""
    folder = study.work / "training" / f"joint-seed{seed}"
    sized: Row = {"targets": (Target(macs=like["macs_kept"]),), "max_minutes": ENDLESS}
    joint = study.job_for(seed, recipe="joint", **sized)
    # All seeds share the first seed's plan.
    plan = study.once("plan-joint", lambda: _equal_time(study, seed, joint, sized))
    folder.mkdir(exist_ok=True)
    job, steps = replace(joint, clock=Clock()), plan["gate_steps"]

    def gates_timed() -> Row:
        _, seconds = timed_training(folder / "gates", steps, lambda: choose(job, folder, steps))
        return {"kind": "gates", "seconds": seconds}

    seconds = study.once(f"gates-joint-seed{seed}", gates_timed)["seconds"]
    (chosen,) = choose(job, folder, steps).chosen  # made by now, perhaps before an interruption
    narrow = chosen.load(job.dense)
    name = f"joint-retrain-seed{seed}"
    trained = _train_on(study, joint, name, narrow, chosen.decision, plan["retrain_steps"])
    shutil.rmtree(folder, ignore_errors=True)
    row = {"kind": "recipe", "row": "joint", "seed": seed, "planned_seconds": plan["planned_seconds"]}
    row |= {"joint_pace": pace(steps)}
    row["joint_learning_rate"] = joint.settings.gate_learning_rate
    return {"rows": [row | {"gate_steps": steps, "gate_seconds": seconds} | trained]}


def pace(steps: int) -> float:
    """How many times as fast the gates of a joint training of so many steps move."""
    return min(max(1.0, SETTLING_STEPS / steps), MAX_PACE)


def _equal_time(study: Study, seed: int, joint: Job, sized: Row) -> Row:
    """The numbers of steps with which the joint recipe takes as long as the paper's at the same target."""
    profile = study.profile
    paper = study.job_for(seed, batch_size=profile.gate_batch, distil_in="none", **sized)
    gate_step = make_plan(paper).gate_step_seconds
    retrain_step = make_plan(study.job_for(seed, distil_in="retrain", **sized)).retrain_step_seconds
    seconds = profile.gate_steps * gate_step + profile.retrain_steps * retrain_step
    plan = make_plan(joint)
    share = plan.gate_steps * plan.gate_step_seconds + plan.retrain_steps * plan.retrain_step_seconds
    steps = {"gate_steps": plan.gate_steps, "retrain_steps": plan.retrain_steps}
    scaled = {name: max(round(number * seconds / share), 1) for name, number in steps.items()}
    return {"kind": "plan", **scaled, "planned_seconds": seconds}
