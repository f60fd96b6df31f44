"""The main job: gates and weights trained together, one decision, the narrow model trained on, measured and
written."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from pruned_ops.measure import Workload, machine, versions
from pruned_ops.packed_encoder import model_shape
from pruned_trainer import report as reporting
from pruned_trainer.attach import find_encoder
from pruned_trainer.decision import Decision
from pruned_trainer.job import Job, PruneSettings, say, start
from pruned_trainer.loading import OutputFolder, save_checkpoint
from pruned_trainer.phases import make_plan, retrain, train_gates
from pruned_trainer.tasks.scoring import EvaluationResult
from pruned_trainer.trainer import InterruptedTraining


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Run the whole job; the output folder holds the checkpoint, decision.json, report.json and predictions.

    Returns the report. Errors: ValueError and OSError, before any training, for what cannot work.
    """
    set_seed(settings.seed)
    job = start(settings)
    plan = make_plan(job)
    set_seed(settings.seed)  # measuring a step drew random numbers; the run is the same without
    say(
        f"gate phase: {plan.gate_steps} steps towards {settings.target.fraction:g} of the "
        f"{settings.target.unit}"
    )
    folder = OutputFolder(settings.out, settings.overwrite, settings.inputs)
    decision, narrow, gate_log = train_gates(job, folder.partial, plan.gate_steps)
    decision.save(folder.partial / "decision.json")
    kept = ", ".join(f"{d.shape.num_heads}/{d.shape.ffn_width}" for d in decision.layers)
    say(f"decided, heads/FFN width a layer: {kept}; {_reached(decision)}")
    say(f"retrain phase: {plan.retrain_steps} steps of the narrow model")
    retrain_log = retrain(job, narrow, folder.partial, plan.retrain_steps)
    minutes = (time.perf_counter() - job.started) / 60
    save_checkpoint(narrow, folder.partial, settings.model, job.tokenizer)  # from here on it cannot be lost
    training = {"minutes": minutes, "gates": gate_log, "retrain": retrain_log}
    try:
        report = finish(job, folder.partial, decision, narrow)
    except KeyboardInterrupt:
        raise InterruptedTraining(f"stopped while measuring; the trained model is {folder.partial}") from None
    report.update({"plan": plan.to_json(), "training": training})
    reporting.write_json(folder.partial / "report.json", report)
    folder.publish()
    return report


def _reached(decision: Decision) -> str:
    return ", ".join(
        f"{value:.4f} of the {unit} (target {decision.target[unit]:g})"
        for unit, value in decision.reached.items()
    )


def finish(job: Job, partial: Path, decision: Decision, narrow: PreTrainedModel) -> dict[str, Any]:
    """Choose thresholds on validation data, write the pruned one's, then evaluate and time both models."""
    for name in ("gates", "retrain"):  # the phases' own folders, empty unless they were interrupted
        shutil.rmtree(partial / name, ignore_errors=True)
    say("null score thresholds, on the validation questions")
    thresholds = {name: reporting.choose_threshold(m, job.validation) for name, m in _both(job, narrow)}
    narrow.config.null_score_threshold = thresholds["pruned"]
    narrow.config.save_pretrained(partial)
    say("evaluating dense and pruned")
    results = {
        name: reporting.evaluate_on(m, job.evaluation, thresholds[name]) for name, m in _both(job, narrow)
    }
    say("timing dense against pruned")
    report = _report(job, decision, narrow, results, thresholds)
    for name, result in results.items():
        reporting.write_json(partial / f"predictions-{name}.json", result.predictions)
    return report


def _both(job: Job, narrow: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    return [("dense", job.teacher), ("pruned", narrow)]


def _report(
    job: Job,
    decision: Decision,
    narrow: PreTrainedModel,
    results: dict[str, EvaluationResult],
    thresholds: dict[str, float],
) -> dict[str, Any]:
    lengths = job.validation.arrival_lengths()
    workload = Workload.arrival_order(
        lengths, min(reporting.BATCH_SIZE, len(lengths)), reporting.TIMED_BATCHES
    )
    models = dict(_both(job, narrow))
    timings, backends = reporting.time_models(models, workload)
    dense_shape = model_shape(find_encoder(job.teacher))
    report: dict[str, Any] = {}
    for name, model in models.items():
        report[name] = {
            **reporting.scores_json(results[name], thresholds[name]),
            **reporting.model_facts(model, lengths),
            "workloads": {workload.name: reporting.timing_json(timings[name], backends[name])},
        }
    report["speedup"] = {
        "asked": None,  # this target is a size; measured-time targets fill it
        "reached": timings["pruned"].speedup_over(timings["dense"]),
        "workload": workload.name,
    }
    report.update(reporting.losses_json(results["dense"], results["pruned"]))
    report["target"] = {"asked": decision.target, "reached": decision.reached}
    report["shape"] = model_shape(find_encoder(narrow)).to_json()
    report["dense_shape"] = {
        "num_heads": max(layer.num_heads for layer in dense_shape.layers),
        "ffn_width": max(layer.ffn_width for layer in dense_shape.layers),
    }
    report["evaluated_on"] = {
        "file": Path(job.settings.eval_file).name
        if job.settings.eval_file
        else "held-out validation questions",
        "questions": len(job.evaluation.examples),
        "threshold_chosen_on_these": job.settings.eval_file is None,
    }
    report.update(
        {
            "machine": machine(),
            "versions": versions(),
            "command": job.settings.command or repr(job.settings),
        }
    )
    return report
