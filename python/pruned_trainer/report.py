"""What came out: scores and speed of the dense and the pruned model, as report.json and on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pruned_ops
from pruned_ops.measure import Timing, Workload, arrival_lengths, interleave
from pruned_ops.optimize import optimized
from pruned_ops.packed_encoder import model_shape
from pruned_ops.question_answering import Decoded, Window, decode, windows
from pruned_trainer.attach import find_encoder
from pruned_trainer.tasks.extractive import predict_logits
from pruned_trainer.tasks.scoring import EvaluationResult, best_null_threshold, bootstrap_interval, evaluate
from pruned_trainer.tasks.squad import Example

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
        return cls(examples, windows(tokenizer, questions, contexts, max_length, stride, progress=True))

    def arrival_lengths(self) -> list[int]:
        """Window lengths in arrival order, in tokens."""
        by_question: list[list[int]] = [[] for _ in self.examples]
        for window in self.windows:
            by_question[window.question_index].append(len(window))
        return arrival_lengths(by_question)

    def decoded(self, model: PreTrainedModel, batch_size: int = 32) -> list[Decoded]:
        """Every question's best spans and null score by `model`, which runs packed meanwhile."""
        with optimized(model):
            logits = predict_logits(model, self.windows, batch_size, model.config.pad_token_id, progress=True)
        return decode(self.windows, logits, [e.context for e in self.examples])


def choose_threshold(model: PreTrainedModel, validation: Prepared) -> float:
    """The null score threshold that is best for `model` on validation data."""
    return best_null_threshold(validation.examples, validation.decoded(model))


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


def write_json(path: Path, value: Any) -> None:
    """JSON for people and programs alike; the file is there whole, or as it was before."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The result table, and what is left of each layer."""
    console = console or Console()
    console.print(_table(report))
    console.print(_chart(report))
    speed = report["speedup"]
    changes = [_change(report, "F1", "f1_loss")]
    if report["f1_span_loss"] is not None:
        changes.append(_change(report, "span F1", "f1_span_loss"))
    console.print(
        f"[bold]{speed['reached']:.2f}x[/] as fast as our own dense runtime on {speed['workload']}; "
        f"{', '.join(changes)}."
    )


def _change(report: Mapping[str, Any], name: str, loss: str) -> str:
    low, high = report[f"{loss}_interval"]
    return f"{name} [bold]{-report[loss]:+.2f}[/] points (95% interval {-high:+.2f} to {-low:+.2f})"


def _table(report: Mapping[str, Any]) -> Table:
    dense, pruned, workload = report["dense"], report["pruned"], report["speedup"]["workload"]
    table = Table(title=f"{report['evaluated_on']['questions']} questions; timing: {workload}")
    for column, side in (("", "left"), ("dense", "right"), ("pruned", "right"), ("pruned / dense", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]

    def row(name: str, get: Any, form: str, ratio: bool = True) -> None:
        a, b = get(dense), get(pruned)
        if a is not None and b is not None:
            table.add_row(
                name, form.format(a), form.format(b), f"{b / a:.3f}" if ratio and a else f"{b - a:+.2f}"
            )

    row("F1", lambda m: m["f1"], "{:.2f}", ratio=False)
    row("exact", lambda m: m["exact"], "{:.2f}", ratio=False)
    row("span F1 (answerable, no null)", lambda m: m["f1_span"], "{:.2f}", ratio=False)
    row("encoder parameters", lambda m: m["params"], "{:,}")
    row("encoder MACs per sequence", lambda m: m["macs"] / 1e6, "{:,.0f} M")
    row("size on disk (fp32)", lambda m: m["bytes"] / 2**20, "{:.1f} MiB")
    row("ms per batch (p50)", lambda m: m["workloads"][workload]["ms"]["p50"], "{:.1f}")
    row("sequences/s", lambda m: m["workloads"][workload]["sequences_per_s"], "{:.1f}")
    table.add_row("speed-up (median of rounds)", "1.00", f"{report['speedup']['reached']:.2f}", "")
    return table


def _chart(report: Mapping[str, Any], width: int = 16) -> Table:
    """Bars of what is left of each layer; `width` characters are the dense model, so that 80 columns do."""
    dense = report["dense_shape"]
    table = Table(title="left in each layer")
    for column in ("layer", f"heads of {dense['num_heads']}", "", f"FFN width of {dense['ffn_width']}", ""):
        table.add_column(column, no_wrap=True)

    def bar(left: int, full: int) -> str:
        return "█" * round(width * left / max(full, 1))

    for i, layer in enumerate(report["shape"]):
        heads, ffn = layer["num_heads"], layer["ffn_width"]
        head_bar, ffn_bar = bar(heads, dense["num_heads"]), bar(ffn, dense["ffn_width"])
        table.add_row(str(i), str(heads), f"[cyan]{head_bar}[/]", str(ffn), f"[magenta]{ffn_bar}[/]")
    return table
