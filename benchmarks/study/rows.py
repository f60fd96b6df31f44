"""The study's pieces of work, each of which makes one record: a point of the curves, a row of the paper's
table, gates on hidden dimensions, the joint recipe beside the paper's."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness import Row
from pruned_ops.models.stock import model_shape
from pruned_trainer.jobs.choice import PAPER_THRESHOLD, choose, paper_gates, score_batches, together
from pruned_trainer.jobs.evaluation import model_facts
from pruned_trainer.jobs.job import Clock, Job
from pruned_trainer.jobs.plan import make_plan
from pruned_trainer.jobs.prune import retrain
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide_at
from pruned_trainer.pruning.gates import PerGate, Scores
from pruned_trainer.pruning.options import PARTS, Target
from pruned_trainer.tasks.squad.scoring import EvaluationResult, bootstrap_interval
from pruned_trainer.tasks.squad.task import Questions
from pruned_trainer.training.trainer import last_checkpoint
from study.records import Study

# The four ways to choose. The first is ours, and the others are compared with it.
METHODS = ("l0", "leave-one-out", "gain", "random")
# Multiples of the paper's lambda (heads, FFN), by the paper's letters, in the order in which they are made.
TABLE = {"a": (0, 0), "e": (2, 2), "d": (1, 1), "g": (4, 4), "f": (3, 3), "b": (1, 0), "c": (0, 1)}
# Version 1 of the paper prunes the hidden dimension, too; all its gates have the same multiple.
HIDDEN_ROW, HIDDEN_MULTIPLES = "h", (1, 1, 1)
# More minutes than any row takes: of the plan, only the time of a step is used.
ENDLESS = 1e6


def timed_training(folder: Path, steps: int, work: Callable[[], Any]) -> tuple[Any, float | None]:
    """The result of `work`, and the seconds that its `steps` training steps take: processor time of this
    process, which other processes do not lengthen, or the clock's on a GPU. A training that goes on from a
    checkpoint is timed over the steps that are left; the seconds are None where none are."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    before = last_checkpoint(folder)
    left = steps - (int(before.name.rpartition("-")[2]) if before else 0)
    start = clock()
    result = work()
    return result, (clock() - start) * steps / left if left else None


def gates(study: Study, seed: int, part: str, multiple: float) -> tuple[Scores, float | None]:
    """The part's gates at this multiple of the paper's lambda, trained once on frozen weights; and the
    seconds that it took."""
    name = f"gates-{part}-{multiple}-seed{seed}"
    profile = study.profile
    folder = study.work / "training" / name
    seconds: list[float | None] = []

    def work() -> Scores:
        prices = {"lambda_attention": multiple, "lambda_ffn": multiple, "lambda_hidden": multiple}
        rate = {"gate_learning_rate": profile.gate_learning_rate}
        job = study.job_for(seed, batch_size=profile.gate_batch, **prices, **rate)
        ((scores,), _), took = timed_training(
            folder, profile.gate_steps, lambda: paper_gates(job, folder, part, profile.gate_steps)
        )
        seconds.append(took)
        return scores

    scores = study.scores(name, work)
    record = study.once(name, lambda: {"kind": "gates", "seconds": seconds[0] if seconds else None})
    shutil.rmtree(folder, ignore_errors=True)
    return scores, record["seconds"]


def importances(study: Study, seed: int, method: str) -> Scores:
    """The scores of every head and FFN unit by a method that trains nothing."""
    profile = study.profile

    def work() -> Scores:
        job = study.job_for(seed)
        batches = score_batches(job, profile.score_steps.get(method, 0))
        return importance.score(method, job.dense, batches, job.budget, ("heads", "ffn"), seed)

    return study.scores(f"{method}-seed{seed}", work)


def l0_for(study: Study, seed: int, part: str, fraction: float) -> tuple[Scores, Row]:
    """The trained gates whose own threshold removes the share nearest to `fraction`; and fields of a row:
    their multiple, and that share."""
    multiples = study.profile.multiples if part != "hidden" else (HIDDEN_MULTIPLES[2],)
    trained = {multiple: gates(study, seed, part, multiple)[0] for multiple in multiples}
    closed = {
        multiple: float((torch.cat(scores.rank.of(part)) < PAPER_THRESHOLD).float().mean())
        for multiple, scores in trained.items()
    }
    best = min(trained, key=lambda multiple: abs(closed[multiple] - fraction))
    return trained[best], {"multiple": best, "closed": closed[best]}


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


def numbers(result: EvaluationResult, dense: EvaluationResult) -> Row:
    """F1 and span F1, and the points lost against the dense model, with 95% intervals over the questions."""
    row: Row = {"f1": result.f1, "f1_span": result.f1_span}
    for name, value in dense.losses(result).items():
        if name.endswith("_interval"):
            loss = name.removesuffix("_interval")
            row[f"{loss}_low"], row[f"{loss}_high"] = value or (None, None)
        else:
            row[name] = value
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
        judged = partial(scored, compact(job.dense, decision), study.held, study.questions)
        result = study.result(f"{part}-{fraction:g}-{method}-seed{seed}", judged)
        row = {"kind": "curve", "on": part, "fraction": fraction, "method": method, "seed": seed}
        row |= {"removed": removed(job, decision)[part], **gate_facts, **numbers(result, dense)}
        first = first or result
        rows.append(row | behind(first, result) | {"questions": len(study.questions)})
    return {"rows": rows}


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


def removed(job: Job, decision: Decision) -> dict[str, float]:
    """The fraction of each part that the decision removes."""
    full, left = job.budget.dense, decision.shape(job.budget.dense)
    return {
        "heads": 1 - sum(x.num_heads for x in left.layers) / sum(x.num_heads for x in full.layers),
        "ffn": 1 - sum(x.ffn_width for x in left.layers) / sum(x.ffn_width for x in full.layers),
        "hidden": 1 - left.hidden_size / full.hidden_size,
    }


def table_row(study: Study, seed: int, letter: str, multiples: Sequence[float]) -> Row:
    """A row of the paper's table: gates trained at these multiples (of heads, FFN, hidden; 0: no gates),
    decided at the paper's threshold, compacted, and trained on."""
    each, seconds = {}, []
    for part, multiple in zip(PARTS, multiples, strict=False):
        if multiple:
            each[part], took = gates(study, seed, part, multiple)
            seconds.append(took)
    job = study.job_for(seed)
    names = ("lambda_heads", "lambda_ffn", "lambda_hidden")
    row: Row = {"kind": "row", "row": letter, "seed": seed, **dict(zip(names, multiples, strict=False))}
    if not each:
        return {"rows": [row | facts(study, job.dense, None) | numbers(*[dense_scores(study, False)] * 2)]}
    decision = decide_at(together(job, each), job.budget, PAPER_THRESHOLD, job.align)
    trained = train_on(study, seed, f"row-{letter}", compact(job.dense, decision), decision)
    gate_seconds = None if None in seconds else sum(s for s in seconds if s is not None)
    return {"rows": [row | {"gate_seconds": gate_seconds} | trained]}


def train_on(study: Study, seed: int, name: str, narrow: PreTrainedModel, decision: Decision) -> Row:
    """The fields of a narrow model's row: its scores before and after the study's retraining."""
    job, steps = study.job_for(seed), study.profile.retrain_steps
    return _train_on(study, job, steps, f"{name}-seed{seed}", narrow, decision)


def _train_on(
    study: Study, job: Job, steps: int, name: str, narrow: PreTrainedModel, decision: Decision
) -> Row:
    nn.Module.to(narrow, job.dense.device)
    dense, folder = dense_scores(study, curve=False), study.work / "training" / name
    before = study.result(f"{name}-before", lambda: scored(narrow, job.validation, job.evaluation))
    _, seconds = timed_training(folder, steps, lambda: retrain(job, narrow, folder, steps, decision))
    after = study.result(name, lambda: scored(narrow, job.validation, job.evaluation))
    shutil.rmtree(folder, ignore_errors=True)
    first = {f"{key}_before": value for key, value in numbers(before, dense).items()}
    training = {"retrain_steps": steps, "retrain_seconds": seconds}
    return facts(study, narrow, decision) | first | numbers(after, dense) | training


def facts(study: Study, model: PreTrainedModel, decision: Decision | None) -> Row:
    """What the decision leaves of a model: its sizes, its shape, and the fractions that are removed."""
    job = study.job
    lengths = job.validation.arrival_lengths()
    left, dense = model_facts(model, lengths), model_facts(job.dense, lengths)
    shape = model_shape(model)
    shares = removed(job, decision) if decision is not None else dict.fromkeys(PARTS, 0.0)
    return {
        **{f"{part}_removed": value for part, value in shares.items()},
        "mib": left["bytes"] / 2**20,
        "macs_cut": dense["macs"] / left["macs"] if left["macs"] else None,  # None: nothing is left
        "macs_kept": left["macs"] / dense["macs"],
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
    job = replace(joint, clock=Clock())
    choices, seconds = timed_training(
        folder / "gates", plan["gate_steps"], lambda: choose(job, folder, plan["gate_steps"])
    )
    (chosen,) = choices.chosen
    narrow = chosen.load()
    name = f"joint-retrain-seed{seed}"
    trained = _train_on(study, joint, plan["retrain_steps"], name, narrow, chosen.decision)
    shutil.rmtree(folder, ignore_errors=True)
    row = {"kind": "recipe", "row": "joint", "seed": seed, "planned_seconds": plan["planned_seconds"]}
    return {"rows": [row | {"gate_steps": plan["gate_steps"], "gate_seconds": seconds} | trained]}


def _equal_time(study: Study, seed: int, joint: Job, sized: Row) -> Row:
    """The numbers of steps with which the joint recipe takes as long as the paper's at the same target."""
    profile = study.profile
    paper = study.job_for(seed, batch_size=profile.gate_batch, **sized)
    gate_step = make_plan(paper).gate_step_seconds
    retrain_step = make_plan(study.job_for(seed, **sized)).retrain_step_seconds
    seconds = profile.gate_steps * gate_step + profile.retrain_steps * retrain_step
    plan = make_plan(joint)
    share = plan.gate_steps * plan.gate_step_seconds + plan.retrain_steps * plan.retrain_step_seconds
    steps = {"gate_steps": plan.gate_steps, "retrain_steps": plan.retrain_steps}
    scaled = {name: max(round(number * seconds / share), 1) for name, number in steps.items()}
    return {"kind": "plan", **scaled, "planned_seconds": seconds}
