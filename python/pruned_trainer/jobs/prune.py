"""The main job, from settings to a folder: what stays is chosen, the narrow model trained on, measured and
written; for one target (`prune`) or, from one training of the gates, for several (`sweep`)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from pruned_ops.files import write_json
from pruned_ops.models.model_card import write_model_card
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, once, say, state
from pruned_trainer.jobs.choice import Chosen, choose
from pruned_trainer.jobs.evaluation import Judged, full_report, judge
from pruned_trainer.jobs.job import Job, build_trainer, start
from pruned_trainer.jobs.output import OutputFolder, save_checkpoint
from pruned_trainer.jobs.plan import Plan, make_plan
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.budget import Target
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.report import terminal
from pruned_trainer.tasks.task import own_thresholds
from pruned_trainer.training.phase import InterruptedTraining, prepare_student, run

_RUN, _TABLE = "run.json", "latency.json"


@dataclass
class Run:
    """A job under way: its plan, its folder, and the targets in the order in which they are met."""

    job: Job
    plan: Plan
    folder: OutputFolder
    targets: list[Target]


@dataclass
class Trained:
    """A narrow model at its end. minutes: since the run began."""

    model: PreTrainedModel
    decision: Decision
    place: Path
    log: list[dict[str, Any]]
    minutes: float


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Run the whole job; the output folder holds the checkpoint, decision.json, report.json, predictions and
    report.html with its figures.

    Returns the report. Errors: ValueError and OSError, before any training, for what cannot work.
    """
    opened = open_run(settings, [settings.target] if settings.target else [])
    (chosen,), log = _choose(opened)
    trained = _train_on(opened, chosen, opened.folder.partial)
    dense = judge(opened.job, opened.job.dense)
    report = _measure(opened, trained, dense, log)
    publish(opened.folder)
    once(lambda: _draw(settings.out))
    return report


def sweep(settings: PruneSettings, targets: Sequence[Target]) -> dict[str, Any]:
    """A family of models from one training of the gates: a folder for each target, sweep.json, report.html,
    sweep.png.

    Each folder is as `prune` writes it. Returns what sweep.json holds. Errors: as `prune`'s, and ValueError
    for targets of different units.
    """
    if len({target.unit for target in targets}) != 1:
        raise ValueError("the targets of a sweep are all in one unit")
    falls = targets[0].unit != "speedup"
    ordered = sorted(targets, key=lambda target: target.value, reverse=falls)
    names = [f"{target.unit}-{target.value:g}" for target in ordered]
    if len(set(names)) != len(names):
        raise ValueError(f"a target is asked for twice: {', '.join(names)}")
    opened = open_run(settings, ordered)
    chosen, log = _choose(opened)
    trained = [
        _train_on(opened, one, opened.folder.partial / name) for one, name in zip(chosen, names, strict=True)
    ]
    dense = judge(opened.job, opened.job.dense)
    points = [terminal.sweep_point(_measure(opened, one, dense, log), one.place.name) for one in trained]
    found = {
        "task": settings.task,
        "dense": dense.to_json(opened.job),
        "points": points,
        "command": settings.command,
    }
    if is_main():
        write_json(opened.folder.partial / "sweep.json", found)
    publish(opened.folder)
    once(lambda: _draw(settings.out))
    return found


def open_run(settings: PruneSettings, targets: list[Target]) -> Run:
    """Check, load, plan and only then make the folder; or take up what an interrupted run left."""
    partial = OutputFolder.partial_of(settings.out)
    once(lambda: OutputFolder.check(settings.out, settings.overwrite, settings.inputs, settings.resume))
    asked = {"settings": settings.to_json(), "targets": [str(target) for target in targets]}
    recorded = once(lambda: _recorded(partial, settings, asked) if settings.resume else None)
    set_seed(settings.seed)
    table_file = partial / _TABLE if recorded and (partial / _TABLE).is_file() else None
    job = start(settings, targets, table_file)
    plan = Plan(**recorded["plan"]) if recorded else make_plan(job, targets)
    set_seed(settings.seed)  # measuring a step drew random numbers; the run is the same without

    def make() -> OutputFolder:
        folder = OutputFolder(settings.out, settings.overwrite, settings.inputs, settings.resume)
        if job.table is not None:
            job.table.save(folder.partial / _TABLE)
        write_json(folder.partial / _RUN, {**asked, "plan": plan.to_json()})
        return folder

    return Run(job, plan, once(make), targets)


def _recorded(partial: Path, settings: PruneSettings, asked: dict[str, Any]) -> dict[str, Any]:
    """What the interrupted run was told; ValueError where this one is told something else."""
    try:
        recorded = json.loads((partial / _RUN).read_text(encoding="utf-8"))
        known = dict(recorded["settings"]), Plan(**recorded["plan"]), recorded["targets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{partial} holds no run that can be resumed ({error!r}); --overwrite starts anew"
        ) from None
    differing = settings.differences(known[0]) or (["targets"] if known[2] != asked["targets"] else [])
    if differing:
        raise ValueError(
            f"{partial} was started with other settings: {', '.join(differing)}; give the same ones to "
            "--resume, or --overwrite to start anew"
        )
    return recorded


def _choose(opened: Run) -> tuple[list[Chosen], list[dict[str, Any]]]:
    plan, targets = opened.plan, opened.targets
    towards = ", ".join(str(target) for target in targets) or "the paper's prices"
    say(f"{opened.job.settings.recipe}: {plan.gate_steps} steps, towards {towards}")
    return choose(opened.job, opened.folder.partial, plan.gate_steps, targets)


def _train_on(opened: Run, chosen: Chosen, place: Path) -> Trained:
    """Train one narrow model on, and write it."""
    job, steps = opened.job, opened.plan.retrain_steps
    kept = ", ".join(f"{d.shape.num_heads}/{d.shape.ffn_width}" for d in chosen.decision.layers)
    say(f"decided, heads/FFN width a layer: {kept}; {_reached(job, chosen.decision)}")
    narrow = chosen.load()
    nn.Module.to(narrow, job.dense.device)
    log = []
    if steps:
        say(f"retrain phase: {steps} steps of the narrow model")
        work = opened.folder.partial / "retrain"
        if place != opened.folder.partial:  # one of several
            work = work.with_name(f"retrain-{place.name}")
        log = retrain(job, narrow, work, steps, chosen.decision)
    minutes = (time.perf_counter() - job.started) / 60
    if is_main():
        place.mkdir(exist_ok=True)
        save_checkpoint(narrow, place, job.settings.model, job.tokenizer)  # from here on it cannot be lost
        chosen.decision.save(place / "decision.json")
    state().wait_for_everyone()
    return Trained(narrow, chosen.decision, place, log, minutes)


def _measure(opened: Run, one: Trained, dense: Judged, gate_log: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose on validation data what the pruned model's config keeps of it (thresholds, calibration), write
    it, evaluate, time, report."""
    job = opened.job
    say("score thresholds, on the validation questions; then the evaluation questions")
    try:
        for name, value in job.validation.best_fields(one.model).items():
            setattr(one.model.config, name, value)
        if is_main():
            one.model.config.save_pretrained(one.place)
        pruned = judge(job, one.model, own_thresholds(one.model, job.task))
        say("timing dense against pruned")
        report = full_report(job, one.decision, dense, pruned)
    except KeyboardInterrupt:
        raise InterruptedTraining(f"stopped while measuring; the trained model is {one.place}") from None
    training = {"minutes": one.minutes, "gates": gate_log, "retrain": one.log}
    report.update({"plan": opened.plan.to_json(), "training": training})
    if is_main():
        for name, judged in (("dense", dense), ("pruned", pruned)):
            write_json(one.place / f"predictions-{name}.json", judged.result.predictions)
        write_json(one.place / "report.json", report)
        write_model_card(one.place, one.model)  # now that there is something to say
    return report


def retrain(
    job: Job, narrow: PreTrainedModel, folder: Path, steps: int, decision: Decision
) -> list[dict[str, Any]]:
    """Train the narrow model on, in place, distilled from the teacher; the log."""
    set_seed(job.settings.seed)
    prepare_student(narrow, job.settings.dropout, job.settings.train_embeddings)
    hidden = decision.hidden.indices if decision.hidden is not None else None
    if hidden is not None and job.teacher is not job.dense:
        hidden = None  # which of another teacher's dimensions these would be is not known
    with optimized(job.teacher) as teacher:
        trainer = build_trainer(job, narrow, teacher, folder, steps, None, kept_hidden=hidden)
        log = run(trainer, "retrain")
    narrow.eval()
    return log


def publish(folder: OutputFolder) -> None:
    """Drop what only resuming needs, and give the folder its name."""

    def work() -> None:
        for name in ("gates*", "retrain*", "narrow-*"):
            for path in folder.partial.glob(name):
                shutil.rmtree(path)
        for path in [
            *folder.partial.glob("decision-*.json"),
            folder.partial / _RUN,
            folder.partial / "choice.json",
        ]:
            path.unlink()
        folder.publish()

    once(work)


def _draw(folder: Path) -> None:
    """report.html, made last and of what is on disk: what fails here loses nothing."""
    try:
        from pruned_trainer.report.page import write_pages
    except ModuleNotFoundError as error:
        say(f"no report.html: {error.name} is not installed; where it is, pruned-trainer report makes it")
        return
    write_pages(folder)


def _reached(job: Job, decision: Decision) -> str:
    whose = "the table says " if job.table is not None else ""
    return ", ".join(
        f"{whose}{unit} {value:.4f}"
        + (f" (target {decision.target[unit]:g})" if unit in decision.target else "")
        for unit, value in decision.reached.items()
    )
