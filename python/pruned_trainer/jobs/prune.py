"""A pruning run, from settings to a folder: choose what stays, train the narrow model on, measure and write
it; for one target (`prune`) or for several (`sweep`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from pruned_ops.files import read_json, write_json
from pruned_ops.models.encoder import PrunedPreTrainedModel
from pruned_ops.models.model_card import REPORT, write_model_card
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, once, say, state
from pruned_trainer.jobs.choice import Choices, Chosen, choose, remove_choices
from pruned_trainer.jobs.evaluation import Judged, full_report, judge, validation_score
from pruned_trainer.jobs.job import Job, Narrow, check_signal, open_cache, running, start
from pruned_trainer.jobs.output import LOCK, RUN, OutputFolder, explained_when_full, locked, save_checkpoint
from pruned_trainer.jobs.plan import Plan, make_plan
from pruned_trainer.jobs.records import check_unchanged, digests_of, recorded_plan
from pruned_trainer.jobs.settings import OWN_TASK, PruneSettings
from pruned_trainer.jobs.trainers import build_trainer, seconds_taken
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.report import terminal
from pruned_trainer.tasks.task import own_thresholds
from pruned_trainer.training.averaging import WeightAverage
from pruned_trainer.training.phase import InterruptedTraining, Log, run, trained_as

_TABLE = "latency.json"
# The folders of a gradual sweep's choices, by the targets' numbers.
_STAGE = "stage-"


@dataclass(frozen=True)
class Run:
    """A job under way, with its plan and its folder."""

    job: Job
    plan: Plan
    folder: OutputFolder


@dataclass(frozen=True)
class Trained:
    """A narrow model after its training, and the folder that it is saved in. minutes: the time that the run
    had taken by its last step."""

    model: PreTrainedModel
    chosen: Chosen
    folder: Path
    log: Log
    minutes: float


@dataclass(frozen=True)
class PruneResult:
    """A pruned model, trained on; the decision that made it; and what report.json holds."""

    model: Any
    decision: Decision
    report: dict[str, Any]


# What makes the job of settings, given the latency table of the interrupted run that is resumed.
Begin = Callable[[PruneSettings, Path | None], Job]


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Run the whole job; the output folder holds the checkpoint, decision.json, report.json, predictions and
    report.html with its figures.

    Returns the report. Errors: ValueError and OSError, before any training, for settings that cannot work.
    """
    if _is_published(settings):
        return _finish(settings, REPORT)
    return run_for_one(settings, start).report


def run_for_one(
    settings: PruneSettings, begin: Begin, page: bool = True, digests: Mapping[str, str] | None = None
) -> PruneResult:
    """The whole job for the one target of the settings, whatever made it: files or a caller's datasets.

    page: whether report.html is written, too. digests: as for `open_run`."""
    if len(settings.targets) > 1:
        raise ValueError(
            f"prune makes one model; sweep makes one for each of {len(settings.targets)} targets"
        )
    with (
        explained_when_full(settings.out, settings.cache_teacher),
        open_run(settings, begin, digests) as opened,
    ):
        opened, choices = _choose(opened)
        trained = _train_on(opened, choices.chosen[0], opened.folder.partial)
        dense = judge(opened.job, opened.job.dense)
        report = _measure(opened, trained, dense, choices.log)
        publish(opened.folder, page)
    return PruneResult(trained.model, trained.chosen.decision, report)


def finished(settings: PruneSettings, dense: Any, digests: Mapping[str, str]) -> PruneResult | None:
    """What a run into this folder made that was killed once its output had its name; None where none was.
    digests: as for `open_run`."""
    if not _is_published(settings):
        return None
    report = _finish(settings, REPORT, digests)
    chosen = Chosen.published(settings.out)
    return PruneResult(chosen.load(dense), chosen.decision, report)


def sweep(settings: PruneSettings) -> dict[str, Any]:
    """Make a family of models, from one training of the gates or (gradual) each from the one before: a folder
    for each target, sweep.json, report.html and sweep.png.

    Each folder is as `prune` writes it. Returns what sweep.json holds. Errors: as for `prune`.
    """
    if not settings.targets:
        raise ValueError("a sweep needs one or more targets")
    if _is_published(settings):
        return _finish(settings, "sweep.json")
    with explained_when_full(settings.out, settings.cache_teacher), open_run(settings) as opened:
        opened, trained, log = (_gradually if settings.gradual else _each_from_the_gates)(opened)
        dense = judge(opened.job, opened.job.dense)
        points = [
            terminal.sweep_point(_measure(opened, model, dense, log), model.folder.name) for model in trained
        ]
        summary = {
            "task": settings.task,
            "score_lines": [line.to_json() for line in opened.job.evaluation.score_lines],
            "dense": dense.to_json(opened.job),
            "points": points,
            "command": settings.command,
        }
        if is_main():
            write_json(opened.folder.partial / "sweep.json", summary)
        publish(opened.folder)
    return summary


def _each_from_the_gates(opened: Run) -> tuple[Run, list[Trained], Log]:
    """The models of a sweep, each as the one training of the gates left it when it passed the target, and
    trained on from there."""
    opened, choices = _choose(opened)
    pairs = zip(choices.chosen, opened.job.settings.targets, strict=True)
    trained = [_train_on(opened, chosen, opened.folder.partial / target.name) for chosen, target in pairs]
    return opened, trained, choices.log


def _gradually(opened: Run) -> tuple[Run, list[Trained], Log]:
    """The models of a sweep, of which each begins as the one before it: the gates train anew for each target,
    on an equal share of the steps, or the model before it is scored."""
    job, trained, log = opened.job, list[Trained](), Log()
    targets, steps = job.settings.targets, opened.plan.gate_steps
    for number, target in enumerate(targets):
        earlier = Narrow(trained[-1].model, trained[-1].chosen.decision) if trained else None
        seed = job.settings.seed + 2 * number  # so that no training begins with windows of one before it
        settings = replace(job.settings, targets=(target,), gradual=False, seed=seed)
        folder = opened.folder.partial / f"{_STAGE}{number}"
        folder.mkdir(exist_ok=True)
        share = steps
        if job.settings.trains_gates:
            share = round(steps * (number + 1) / len(targets)) - round(steps * number / len(targets))
        stage = replace(
            opened,
            job=replace(job, settings=settings, earlier=earlier),
            plan=replace(opened.plan, gate_steps=share),
        )
        stage, choices = _choose(stage, folder)
        job = replace(job, clock=stage.job.clock)
        trained.append(_train_on(stage, choices.chosen[0], opened.folder.partial / target.name))
        log += choices.log
    return replace(opened, job=job), trained, log


@contextmanager
def open_run(
    settings: PruneSettings, begin: Begin = start, digests: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """Check, load, plan and only then make the folder, or take up what an interrupted run left; the folder is
    this run's alone until the end of the block.

    digests: those of what a caller gave that lies in no file, by its name in messages."""
    partial = OutputFolder.partial_of(settings.out)
    once(lambda: OutputFolder.check(settings.out, settings.overwrite, settings.inputs, settings.resume))
    if settings.decision is not None:
        Decision.load(settings.decision)  # refuses what is none
    recorded = once(lambda: recorded_plan(partial, settings)) if settings.resume else None
    inputs = once(lambda: {**digests_of(settings), **(digests or {})}) if settings.resumable else {}
    if recorded is not None:
        once(lambda: check_unchanged(partial, inputs))
    set_seed(settings.seed)
    table_file = partial / _TABLE if recorded and (partial / _TABLE).is_file() else None
    earlier = seconds_taken(partial) if recorded is not None else 0.0
    job = begin(settings, table_file)
    job = replace(job, clock=replace(job.clock, earlier=earlier))
    check_signal(job)
    plan = recorded or make_plan(job)
    if settings.precision == "auto":
        job = replace(job, settings=replace(job.settings, precision=plan.precision))
    if settings.cache_teacher is not None:  # which holds what the teacher says in this precision
        job = replace(job, cache=open_cache(settings.cache_teacher, job))
    set_seed(settings.seed)  # measuring a step drew random numbers; the run is the same without

    def make_folder() -> OutputFolder:
        return OutputFolder(settings.out, settings.overwrite, settings.inputs, settings.resume)

    with once(make_folder) as folder:
        if is_main():
            if settings.resumable:
                record = {"settings": settings.to_json(), "plan": plan.to_json(), "inputs": inputs}
                write_json(folder.partial / RUN, record)
            if job.table is not None:
                job.table.save(folder.partial / _TABLE)
        yield Run(job, plan, folder)


def _choose(opened: Run, folder: Path | None = None) -> tuple[Run, Choices]:
    """Choose for every target, in the run's folder or another; the run's clock then counts what an
    interrupted run took to choose."""
    job, steps = opened.job, opened.plan.gate_steps
    towards = ", ".join(str(target) for target in job.settings.targets) or "the paper's prices"
    if job.settings.decision is None:
        how = f"{steps} steps" if steps else "a choice by chance, without steps"
        say(f"{job.settings.recipe}: {how}, towards {towards}")
    choices = choose(job, folder or opened.folder.partial, steps)
    clock = replace(job.clock, earlier=max(job.clock.earlier, choices.earlier_seconds))
    return replace(opened, job=replace(job, clock=clock)), choices


def _train_on(opened: Run, chosen: Chosen, folder: Path) -> Trained:
    """Train one narrow model on, and write it into `folder`."""
    job, steps, decision = opened.job, opened.plan.retrain_steps, chosen.decision
    kept = ", ".join(f"{d.shape.num_heads}/{d.shape.ffn_width}" for d in decision.layers)
    say(f"decided, heads/FFN width a layer: {kept}; {_reached(job, decision)}")
    if not any(d.shape.num_heads or d.shape.ffn_width for d in decision.layers):
        say("warning: no head and no FFN unit is left, so that no token sees another; ask for less")
    narrow = chosen.load(job.dense)
    nn.Module.to(narrow, job.device)
    log, seconds = list[dict[str, Any]](), job.clock.seconds()
    if steps:
        say(f"retrain phase: {steps} steps of the narrow model")
        checkpoints = opened.folder.partial / "retrain"
        if folder != opened.folder.partial:  # one of several models
            checkpoints = checkpoints.with_name(f"retrain-{folder.name}")
        log = retrain(job, narrow, checkpoints, steps, decision)
        seconds = seconds_taken(checkpoints)  # also of a training that an interrupted run had ended
    if is_main():
        folder.mkdir(exist_ok=True)
        settings = job.settings
        own = settings.task == OWN_TASK  # whose collator has the caller's tokenizer
        save_checkpoint(narrow, folder, settings.model, job.tokenizer, not own)  # from here on it is not lost
        chosen.publish(folder)
    state().wait_for_everyone()
    return Trained(narrow, chosen, folder, log, seconds / 60)


def _measure(opened: Run, trained: Trained, dense: Judged, gate_log: Log) -> dict[str, Any]:
    """Choose on validation data what the pruned model's config keeps of it (thresholds, calibration) and
    write it; then evaluate, time, and report."""
    job, model, folder = opened.job, trained.model, trained.folder
    noun = job.evaluation.noun
    choosing = f"score thresholds, on the validation {noun}; then the " if job.task.thresholds else "the "
    say(f"{choosing}evaluation {noun}")
    try:
        dtype = job.settings.served_dtype
        with nullcontext() if dtype is None else optimized(model, dtype):
            fields = job.validation.best_fields(model)
        for name, value in fields.items():
            setattr(model.config, name, value)
        if fields and is_main():
            model.config.save_pretrained(folder)
        pruned = judge(job, model, own_thresholds(model, job.task), dtype)
        say("timing dense against pruned")
        report = full_report(job, trained.chosen, dense, pruned)
    except KeyboardInterrupt:
        raise InterruptedTraining(f"stopped while measuring; the trained model is {folder}") from None
    training = {"minutes": trained.minutes, "gates": gate_log, "retrain": trained.log}
    report.update({"plan": opened.plan.to_json(), "training": training})
    if is_main():
        for name, judged in (("dense", dense), ("pruned", pruned)):
            write_json(folder / f"predictions-{name}.json", judged.result.predictions)
        write_json(folder / REPORT, report)
        if isinstance(model, PrunedPreTrainedModel):
            write_model_card(folder, model)  # the card quotes the report
    return report


def retrain(job: Job, narrow: PreTrainedModel, folder: Path, steps: int, decision: Decision) -> Log:
    """Train the narrow model on, in place, distilled from the teacher; returns the log."""
    settings = job.settings
    set_seed(settings.seed)
    hidden = decision.hidden.indices if decision.hidden is not None else None
    if hidden is not None and job.teacher is not job.dense:
        hidden = None  # nothing is known about which of another teacher's dimensions they stand for
    average = WeightAverage(steps - round(steps * settings.average_steps))
    with (
        trained_as(narrow, settings.dropout, settings.train_embeddings),
        running(job.teacher, job.teacher_dtype) as teacher,
    ):
        trainer = build_trainer(
            job, narrow, teacher, folder, steps, None, kept_hidden=hidden, average=average
        )
        log = run(trainer, "retrain", settings.resumable)
    narrow.eval()
    if average.start < steps - 1:
        _keep_better(job, narrow, average)
    return log


def _keep_better(job: Job, narrow: PreTrainedModel, average: WeightAverage) -> None:
    """Give the model the mean of its last steps' weights where that scores better on validation data."""
    last = validation_score(job, narrow)
    with average.applied(narrow):
        mean = validation_score(job, narrow)
    better = mean > last
    if better:
        average.keep(narrow)
    noun = job.validation.noun
    say(
        f"the last weights score {last:.2f} on the validation {noun}, the mean of the last steps' "
        f"{mean:.2f}: "
        f"{'the mean stays' if better else 'the last stay'}"
    )


def publish(folder: OutputFolder, page: bool = True) -> None:
    """Give the folder its name, and only then remove what a resumed run would need."""

    def work() -> None:
        folder.publish()
        _clean_up(folder.path, page)

    once(work)


def _clean_up(folder: Path, page: bool = True) -> None:
    """Remove from a published folder what only a resumed run needs, and draw its report.

    The record of the run goes last: where it is there, a run was killed on the way."""
    remove_choices(folder)
    for kind in ("retrain*", f"{_STAGE}*"):
        for checkpoints in folder.glob(kind):
            shutil.rmtree(checkpoints)
    if page:
        _draw(folder)
    (folder / LOCK).unlink(missing_ok=True)
    (folder / RUN).unlink(missing_ok=True)


def _is_published(settings: PruneSettings) -> bool:
    """Whether the run that is to be resumed was killed after its output had got its name."""

    def work() -> bool:
        OutputFolder.end_publishing(settings.out)
        return (settings.out / RUN).is_file() and not OutputFolder.partial_of(settings.out).exists()

    return settings.resume and once(work)


def _finish(settings: PruneSettings, name: str, digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Clean up after a run that was killed once its output had its name; the report of this name from it.

    Errors: ValueError where that run had other settings, or what a caller gave had other digests."""

    def work() -> dict[str, Any]:
        with explained_when_full(settings.out), locked(settings.out):
            recorded_plan(settings.out, settings)
            check_unchanged(settings.out, digests or {})
            _clean_up(settings.out)
        return read_json(settings.out / name, "report")

    return once(work)


def _draw(folder: Path) -> None:
    """Write report.html, from what is on disk, so that nothing is lost if this fails."""
    try:
        from pruned_trainer.report.page import write_pages
    except ModuleNotFoundError as error:
        say(f"no report.html: {error.name} is not installed; where it is, pruned-trainer report makes it")
        return
    write_pages(folder)


def _reached(job: Job, decision: Decision) -> str:
    """The cost that the decision reached, with its target, as a text."""
    source = "the table says " if job.table is not None else ""
    return ", ".join(
        f"{source}{unit} {value:.4f}"
        + (f" (target {decision.target[unit]:g})" if unit in decision.target else "")
        for unit, value in decision.reached.items()
    )
