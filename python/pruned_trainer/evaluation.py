"""What a model is worth: scores on prepared questions, size, and speed beside the dense model; as the entries
of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pruned_ops
from pruned_ops.answers import ScoreCalibration
from pruned_ops.measure import Timing, Workload, arrival_lengths, interleave, machine, versions
from pruned_ops.optimize import optimized
from pruned_ops.packed_encoder import model_shape
from pruned_ops.question_answering import Decoded, Window, decode, windows
from pruned_trainer.attach import find_encoder
from pruned_trainer.decision import Decision
from pruned_trainer.distributed import is_main, once, shared
from pruned_trainer.tasks.calibration import fit_calibration
from pruned_trainer.tasks.extractive import predict_logits
from pruned_trainer.tasks.scoring import EvaluationResult, best_null_threshold, bootstrap_interval, evaluate
from pruned_trainer.tasks.squad import Example

if TYPE_CHECKING:
    from pruned_trainer.job import Job

# Batches per round and rounds of the timing: about a minute for a small encoder on two cores.
TIMED_BATCHES, TIMED_ROUNDS = 16, 7
BATCH_SIZE = 8


@dataclass(frozen=True)
class Prepared:
    """Examples with their windows: cut once, used for every model."""

    examples: Sequence[Example]
    windows: Sequence[Window]

    @classmethod
    def cut(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
    ) -> Prepared:
        questions, contexts = [e.question for e in examples], [e.context for e in examples]
        cut = windows(tokenizer, questions, contexts, max_length, stride, progress=is_main())
        return cls(examples, cut)

    def arrival_lengths(self) -> list[int]:
        """Window lengths in arrival order, in tokens."""
        by_question: list[list[int]] = [[] for _ in self.examples]
        for window in self.windows:
            by_question[window.question_index].append(len(window))
        return arrival_lengths(by_question)

    def decoded(self, model: PreTrainedModel, batch_size: int = 32) -> list[Decoded]:
        """Every question's best spans and null score by `model`, which runs packed meanwhile, on all
        processes."""
        with optimized(model):
            work = partial(_logits, model, batch_size)
            logits = shared(work, self.windows)
        return decode(self.windows, logits, [e.context for e in self.examples])


def _logits(model: PreTrainedModel, batch_size: int, some: Sequence[Window]) -> list[Any]:
    return predict_logits(model, some, batch_size, model.config.pad_token_id, progress=is_main())


def choose_threshold(model: PreTrainedModel, validation: Prepared) -> float:
    """The null score threshold that is best for `model` on validation data."""
    return choose_answering(model, validation)[0]


def choose_answering(model: PreTrainedModel, validation: Prepared) -> tuple[float, ScoreCalibration]:
    """The null score threshold that is best for `model` on validation data, and how far its scores can be
    believed then."""
    decoded = validation.decoded(model)
    threshold = best_null_threshold(validation.examples, decoded)
    return threshold, fit_calibration(validation.examples, decoded, threshold)


def evaluate_on(model: PreTrainedModel, prepared: Prepared, threshold: float) -> EvaluationResult:
    """Scores of `model` at this null score threshold."""
    return evaluate(prepared.examples, prepared.decoded(model), threshold)


def model_facts(model: PreTrainedModel, lengths: Sequence[int]) -> dict[str, Any]:
    """Encoder parameters, MACs per sequence of this length mix, and bytes of all weights."""
    shape = model_shape(find_encoder(model))
    return {
        "params": shape.parameters(),
        "macs": shape.macs(lengths) / len(lengths),
        "params_with_embeddings": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def time_models(
    models: Mapping[str, PreTrainedModel], workload: Workload
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time optimised models against each other on one workload; also which backend ran each op."""
    first = next(iter(models.values()))
    inputs = workload.inputs(first.config.vocab_size, first.config.pad_token_id, first.device)
    backends: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(optimized(model))
            with pruned_ops.record() as ran:
                model(**inputs[0])
            backends[name] = {op: ", ".join(sorted(counts)) for op, counts in ran.items()}
        runners = {name: (lambda batch, model=model: model(**batch)) for name, model in models.items()}
        return interleave(runners, workload, inputs, TIMED_ROUNDS), backends


def timing_json(timing: Timing, backends: Mapping[str, str]) -> dict[str, Any]:
    """A workload's entry in report.json: milliseconds per batch."""
    return {
        "ms": {f"p{p}": round(timing.ms(p), 3) for p in (20, 50, 80)},
        "sequences_per_s": round(timing.sequences_per_s, 2),
        "backends": dict(backends),
    }


def losses_json(dense: EvaluationResult, pruned: EvaluationResult) -> dict[str, Any]:
    """Points lost from dense to pruned, with 95% bootstrap intervals over the questions."""
    found: dict[str, Any] = {
        "f1_loss": dense.f1 - pruned.f1,
        "f1_loss_interval": bootstrap_interval(dense.question_f1, pruned.question_f1),
        "f1_span_loss": None,
        "f1_span_loss_interval": None,
    }
    if dense.f1_span is not None and pruned.f1_span is not None:
        found["f1_span_loss"] = dense.f1_span - pruned.f1_span
        found["f1_span_loss_interval"] = bootstrap_interval(dense.question_span_f1, pruned.question_span_f1)
    return found


def scores_json(result: EvaluationResult, threshold: float) -> dict[str, Any]:
    """A model's scores in report.json, in percent."""
    return {
        "f1": result.f1,
        "exact": result.exact,
        "f1_span": result.f1_span,
        "metrics": result.metrics,
        "null_score_threshold": threshold,
    }


@dataclass(frozen=True)
class Judged:
    """A model's scores on the evaluation questions, at the threshold that is best on the validation ones."""

    model: PreTrainedModel
    threshold: float
    result: EvaluationResult

    def to_json(self, job: Job) -> dict[str, Any]:
        """Scores and sizes, as report.json has them for each model."""
        return {
            **scores_json(self.result, self.threshold),
            **model_facts(self.model, job.validation.arrival_lengths()),
        }


def judge(job: Job, model: PreTrainedModel, threshold: float | None = None) -> Judged:
    """Choose the null score threshold on validation data (unless it is given), then evaluate."""
    nn.Module.to(model, job.dense.device)
    if threshold is None:
        threshold = choose_threshold(model, job.validation)
    return Judged(model, threshold, evaluate_on(model, job.evaluation, threshold))


def full_report(job: Job, decision: Decision, dense: Judged, pruned: Judged) -> dict[str, Any]:
    """Time both models against each other; everything that report.json holds but the training."""
    models = {"dense": dense, "pruned": pruned}
    workload = job.workload
    timings, backends = once(lambda: time_models({name: one.model for name, one in models.items()}, workload))
    report: dict[str, Any] = {}
    for name, one in models.items():
        timed = {workload.name: timing_json(timings[name], backends[name])}
        report[name] = {**one.to_json(job), "workloads": timed}
    speedup = timings["pruned"].speedup_over(timings["dense"])
    asked = decision.target.get("speedup")
    report["speedup"] = {"asked": asked, "reached": speedup, "workload": workload.name}
    report.update(losses_json(dense.result, pruned.result))
    report["target"] = {"asked": decision.target, "reached": decision.reached}
    measured = {"speedup": speedup, "latency_ms": timings["pruned"].ms(50)}
    for unit in set(measured) & set(decision.target):  # the decision's own numbers are the table's
        report["target"]["reached"] = {unit: measured[unit]}
    if job.table is not None:
        report["latency_table"] = _prediction_errors(job, models, timings)
    shapes = {name: model_shape(find_encoder(one.model)) for name, one in models.items()}
    report["shape"] = shapes["pruned"].to_json()
    report["hidden_size"] = shapes["pruned"].hidden_size
    report["dense_shape"] = {
        "num_heads": max(layer.num_heads for layer in shapes["dense"].layers),
        "ffn_width": max(layer.ffn_width for layer in shapes["dense"].layers),
        "hidden_size": shapes["dense"].hidden_size,
    }
    report.update(_circumstances(job))
    return report


def _prediction_errors(
    job: Job, models: Mapping[str, Judged], timings: Mapping[str, Timing]
) -> dict[str, Any]:
    """What the table said of each model beside what was measured, in milliseconds a batch; error: predicted
    over measured, minus 1."""
    assert job.table is not None
    found: dict[str, Any] = {"workload": job.table.workload.name, "align": job.table.align}
    for name, one in models.items():
        predicted = job.table.predict(model_shape(find_encoder(one.model)).layers)
        measured = timings[name].ms(50)
        found[name] = {
            "predicted_ms": predicted,
            "measured_ms": measured,
            "error": predicted / measured - 1,
        }
    found["predicted_speedup"] = found["dense"]["predicted_ms"] / found["pruned"]["predicted_ms"]
    return found


def _circumstances(job: Job) -> dict[str, Any]:
    settings = job.settings
    judged_on = Path(settings.eval_file).name if settings.eval_file else "held-out validation questions"
    return {
        "evaluated_on": {
            "file": judged_on,
            "questions": len(job.evaluation.examples),
            "threshold_chosen_on_these": settings.eval_file is None,
        },
        "recipe": settings.recipe,
        "machine": machine(),
        "versions": versions(),
        "command": settings.command or repr(settings),
    }
