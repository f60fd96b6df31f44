"""The evaluation of a model, as the entries of report.json: scores on prepared questions, size, and speed
beside the dense model."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import pruned_ops
from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.timing import Timing, Workload, interleave, is_settled, machine, threads, versions
from pruned_ops.models.inputs import padding_id
from pruned_ops.models.stock import model_shape, running_encoder
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import once, say
from pruned_trainer.jobs.choice import Chosen
from pruned_trainer.jobs.examples import AGREEMENT, DatasetExamples
from pruned_trainer.jobs.job import TIMED_ROUNDS, Job, timed_part
from pruned_trainer.report.published import data_set_of
from pruned_trainer.tasks.task import Result

# The dense model as Hugging Face runs it, among the timings.
_STOCK = "Hugging Face"


def model_facts(model: PreTrainedModel, lengths: Sequence[int]) -> dict[str, Any]:
    """Encoder parameters, MACs per sequence over sequences of these lengths, and bytes of all weights."""
    shape = model_shape(model)
    return {
        "params": shape.parameters(),
        "macs": shape.macs(lengths) / len(lengths),
        "params_with_embeddings": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def time_models(
    models: Mapping[str, PreTrainedModel],
    workload: Workload,
    dtype: str | None = None,
    stock: Mapping[str, PreTrainedModel] | None = None,
    settle: tuple[str, str] | None = None,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time optimised models against each other on one workload; returns the timings, and the backends that
    ran each op, by the models' names. dtype: as for `optimize`. stock: models that are timed beside them as
    they are. settle: as for `interleave`."""
    first = next(iter(models.values()))
    encoder = running_encoder(first)
    inputs = workload.inputs(encoder.config.vocab_size, padding_id(encoder.config), encoder.device)
    backends: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(optimized(model, dtype))
            with pruned_ops.record() as ran:
                model(**inputs[0])
            backends[name] = {op: ", ".join(sorted(counts)) for op, counts in ran.items()}
        timed = {**models, **(stock or {})}
        runners = {name: (lambda batch, model=model: model(**batch)) for name, model in timed.items()}
        return interleave(runners, workload, inputs, TIMED_ROUNDS, settle=settle), backends


def timing_json(timing: Timing, backends: Mapping[str, str]) -> dict[str, Any]:
    """A workload's entry in report.json: milliseconds per batch."""
    return {
        "ms": {f"p{p}": round(timing.ms(p), 3) for p in (20, 50, 80)},
        "sequences_per_s": round(timing.sequences_per_s, 2),
        "backends": dict(backends),
    }


@dataclass(frozen=True)
class Judged:
    """A model's scores on the evaluation questions, at the thresholds best on the validation questions."""

    model: PreTrainedModel
    thresholds: dict[str, float]
    result: Result

    def to_json(self, job: Job) -> dict[str, Any]:
        """Scores and sizes, as report.json holds them for each model."""
        return {
            **self.result.scores(),
            **self.thresholds,
            **model_facts(self.model, job.lengths),
        }


def judge(
    job: Job, model: PreTrainedModel, thresholds: dict[str, float] | None = None, dtype: str | None = None
) -> Judged:
    """Choose the thresholds on validation data (unless they are given), then evaluate. dtype: what the model
    runs in, as for `optimize`."""
    nn.Module.to(model, job.device)
    with nullcontext() if dtype is None else optimized(model, dtype):
        if thresholds is None:
            thresholds = job.validation.best_thresholds(model)
        return Judged(model, thresholds, job.evaluation.evaluate(model, thresholds))


def validation_score(job: Job, model: PreTrainedModel) -> float:
    """One number by which to choose between models: the mean of the scores on the validation examples, at the
    thresholds that are best there; the agreement with the teacher alone where there is one, because of a
    caller's own metrics nobody knows whether more is better. 0 where none of them is defined."""
    prepared = job.validation
    scores = prepared.evaluate(model, prepared.best_thresholds(model)).scores()
    keys = [line.key for line in prepared.score_lines if line.has_loss]
    if AGREEMENT in scores or isinstance(prepared, DatasetExamples):  # which may be too few to have one
        keys = [AGREEMENT]
    values = [scores.get(key) for key in keys]
    return statistics.fmean([value for value in values if value is not None] or [0.0])


def full_report(job: Job, chosen: Chosen, dense: Judged, pruned: Judged) -> dict[str, Any]:
    """Time both models against each other; returns everything that report.json holds but the training."""
    models = {"dense": dense, "pruned": pruned}
    workload, target = job.workload, chosen.decision.target
    parts, dtype = {name: timed_part(judged.model) for name, judged in models.items()}, job.settings.dtype
    stock, ratio = {_STOCK: copy.deepcopy(parts["dense"]).eval()}, ("pruned", "dense")
    with threads(job.settings.threads):
        timings, backends = once(
            lambda: time_models(parts, workload, job.settings.served_dtype, stock, ratio)
        )
    report: dict[str, Any] = {}
    for name, judged in models.items():
        timed = {workload.name: timing_json(timings[name], backends[name])}
        report[name] = {**judged.to_json(job), "workloads": timed}
    ours = timings["pruned"]
    speedup, interval = ours.speedup_over(timings["dense"]), ours.speedup_interval(timings["dense"])
    report["speedup"] = {
        "asked": target.get("speedup"),
        "reached": speedup,
        "interval": list(interval),
        "against_hugging_face": ours.speedup_over(timings[_STOCK]),
        "workload": workload.name,
        "dtype": dtype,
    }
    _say_what_falls_short(target.get("speedup"), speedup, interval)
    report.update(dense.result.losses(pruned.result))
    report["target"] = {"asked": target, "reached": chosen.decision.reached}
    measured = {"speedup": speedup, "latency_ms": timings["pruned"].ms(50)}
    if job.settings.decision is not None:  # which may have been made on texts of other lengths
        measured |= {unit: report["pruned"][unit] / report["dense"][unit] for unit in ("params", "macs")}
    for unit in (unit for unit in measured if unit in target):  # the decision's own numbers are the table's
        report["target"]["reached"] = {unit: measured[unit]}
    if job.table is not None:
        report["latency_table"] = _prediction_errors(job.table, models, timings)
    report.update(_shapes(dense.model, pruned.model))
    report.update(_circumstances(job))
    report["evaluated_on"]["data_set"] = _data_set(job, dense)
    return report


def _say_what_falls_short(asked: float | None, reached: float, interval: tuple[float, float]) -> None:
    """Tell where the last timing contradicts the decision's own, or is too noisy to say."""
    low, high = interval
    within = f"{reached:.2f}x ({low:.2f} to {high:.2f})"
    if not is_settled(reached, interval):
        say(
            f"the last timing is noisy: {within}; pruned-ops bench times the model again on a quieter machine"
        )
    elif asked is not None and high < asked:
        say(
            f"the last timing falls short of the {asked:g}x that the decision was timed at: {within}; ask "
            "for a little more, or time it again with pruned-ops bench"
        )


def _prediction_errors(
    table: LatencyTable, models: Mapping[str, Judged], timings: Mapping[str, Timing]
) -> dict[str, Any]:
    """The table's prediction for each model beside the measured time, in milliseconds a batch; error:
    predicted over measured, minus 1."""
    errors: dict[str, Any] = {"workload": table.workload.name, "align": table.align}
    for name, judged in models.items():
        predicted = table.predict(model_shape(judged.model).layers)
        measured = timings[name].ms(50)
        errors[name] = {
            "predicted_ms": predicted,
            "measured_ms": measured,
            "error": predicted / measured - 1,
        }
    errors["predicted_speedup"] = errors["dense"]["predicted_ms"] / errors["pruned"]["predicted_ms"]
    return errors


def _shapes(dense: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Any]:
    """The pruned model's layers and hidden size; the dense model's, which may have been pruned before, and
    its widest layer."""
    shape, dense_shape = model_shape(pruned), model_shape(dense)
    return {
        "shape": shape.to_json(),
        "hidden_size": shape.hidden_size,
        "dense_shape": {
            "num_heads": max(layer.num_heads for layer in dense_shape.layers),
            "ffn_width": max(layer.ffn_width for layer in dense_shape.layers),
            "hidden_size": dense_shape.hidden_size,
            "layers": dense_shape.to_json(),
        },
    }


def _data_set(job: Job, dense: Judged) -> str | None:
    """The published data set that the evaluation questions are of, if they are of one."""
    metrics = dense.result.scores().get("metrics", {})
    return data_set_of(job.settings.task, dense.result.predictions, metrics)


def _circumstances(job: Job) -> dict[str, Any]:
    """The data, the machine, the versions and the command that the numbers come from."""
    settings = job.settings
    noun = job.evaluation.noun
    file = settings.eval_file or settings.validation_file
    judged_on = Path(file).name if file else f"held-out validation {noun}"
    return {
        "evaluated_on": {
            "file": judged_on,
            "noun": noun,
            noun: len(job.evaluation),
            "threshold_chosen_on_these": settings.eval_file is None and bool(job.task.thresholds),
        },
        "data_faults": job.task.faults.to_json(),
        "task": settings.task,
        "score_lines": [line.to_json() for line in job.evaluation.score_lines],
        "recipe": settings.recipe if settings.decision is None else "decision",
        "machine": {**machine(), **({"threads": settings.threads} if settings.threads else {})},
        "versions": versions(),
        "command": settings.command or repr(settings),
    }
