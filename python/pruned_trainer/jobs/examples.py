"""A caller's examples to judge models on, and what a model reaches on them: the caller's own metrics, and how
far it agrees with the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import EvalPrediction

from pruned_ops.models.stock import config_of
from pruned_ops.qa.questions import arrival_lengths
from pruned_trainer.distributed import say, shared
from pruned_trainer.jobs.job import running
from pruned_trainer.jobs.row_checks import said
from pruned_trainer.jobs.rows import Rows
from pruned_trainer.tasks.faults import DataFaults
from pruned_trainer.tasks.output_kinds import IGNORED, OutputKind, comparable_outputs
from pruned_trainer.tasks.resampling import interval, samples
from pruned_trainer.tasks.task import Score, accepted, without_labels
from pruned_trainer.tasks.texts.metrics import Spearman
from pruned_trainer.training.batches import GROUP, NUMBER, Collate
from pruned_trainer.training.teaching import logits_config

Metrics = Callable[[EvalPrediction], Mapping[str, float]]
# What a model says of one example: arrays by name, without padding.
RowOutputs = dict[str, NDArray[Any]]
AGREEMENT = "agreement"
# What else the report says of a model, by names that no metric of the caller's can have.
_TAKEN = (AGREEMENT, "metrics", "params", "macs", "params_with_embeddings", "bytes", "workloads")
# Fewer samples than elsewhere, because the caller's metric may be slow. An interval needs nearly all of them,
# because those on which a metric gives a number are not drawn by chance.
RESAMPLES, NEARLY_ALL = 200, 190


@dataclass(frozen=True)
class DatasetTask:
    """The task of a call from Python: its data is the caller's, and has no file that could be at fault."""

    faults: DataFaults = field(default_factory=DataFaults)
    thresholds = ()


@dataclass(eq=False)
class DatasetExamples:
    """Rows to judge models on.

    label_names: the entries of a batch that are labels. compute_metrics: as for transformers' Trainer; None
    for accuracy or Spearman's correlation with the labels, where there are such. teacher: what models are
    compared with, once it is known. dense: the model before pruning, which stays as it is. kind: of the
    models' outputs. pooling: as for `comparable_outputs`.
    """

    rows: Rows
    collate: Collate
    label_names: Sequence[str]
    compute_metrics: Metrics | None
    batch_size: int
    pooling: str
    teacher: nn.Module | None = None
    dense: nn.Module | None = None
    kind: OutputKind = OutputKind.CLASSES
    _known: dict[int, list[RowOutputs]] = field(default_factory=dict)
    _names: tuple[str, ...] = ()

    noun, metric_digits = "examples", 4

    @property
    def windows(self) -> Sequence[Any]:
        return self.rows

    @property
    def score_lines(self) -> tuple[Score, ...]:
        """The lines of the result table: the caller's metrics, then the agreement with the teacher."""
        return tuple(Score(name, name.removeprefix("eval_")) for name in self._names)

    def __len__(self) -> int:
        return len(self.rows)

    def arrival_lengths(self) -> list[int]:
        """The rows' lengths in tokens, in arrival order."""
        return arrival_lengths([[length] for length in self.rows.lengths])

    def best_thresholds(self, model: Any) -> dict[str, float]:
        """Return no thresholds, because such a model has none."""
        return {}

    def best_fields(self, model: Any) -> dict[str, Any]:
        """Return no fields, because none of the config is chosen on these examples."""
        return {}

    def evaluate(self, model: Any, thresholds: Mapping[str, float]) -> DatasetResult:
        """The result of `model`, which runs packed meanwhile, on all processes."""
        outputs = self._outputs(model)
        result = DatasetResult(
            self, outputs, self._outputs(self.teacher) if self.teacher is not None else None
        )
        self._names = tuple(name for name in result.scores() if name != "metrics")
        return result

    def check_metrics(self) -> None:
        """Compute the caller's metrics once, of the model before pruning. Errors: ValueError where they fail
        on these rows."""
        if self.compute_metrics is None:
            return
        if self.gold is None:
            say(f"the {self.rows.name} has no labels: compute_metrics has nothing to measure")
            return
        result = DatasetResult(self, self._outputs(self.dense), None)
        with said(f"compute_metrics fails on the {self.rows.name}"):
            result.scores()

    def _outputs(self, model: Any) -> list[RowOutputs]:
        """What the model says of each row; the teacher, and the model before pruning, are asked once."""
        if id(model) in self._known:
            return self._known[id(model)]
        order = sorted(range(len(self.rows)), key=self.rows.lengths.__getitem__)
        groups = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        with running(model) as fast, torch.no_grad():
            by_group = shared(partial(self._outputs_of_groups, fast), groups)
        outputs: list[RowOutputs] = [{} for _ in order]
        for group, values in zip(groups, by_group, strict=True):
            for number, value in zip(group, values, strict=True):
                outputs[number] = value
        if model is self.teacher or model is self.dense:
            self._known[id(model)] = outputs
        return outputs

    def _outputs_of_groups(self, model: Any, groups: Sequence[list[int]]) -> list[list[RowOutputs]]:
        return [self._outputs_of_group(model, [self.rows[number] for number in group]) for group in groups]

    def _outputs_of_group(self, model: Any, rows: list[Any]) -> list[RowOutputs]:
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.collate(rows).items()}
        mask = batch["attention_mask"]
        beside = (*self.label_names, NUMBER, GROUP)
        asked = {k: v for k, v in without_labels(batch).items() if k not in beside}
        config = config_of(model) if self.dense is None else logits_config(model, self.dense)
        outputs = comparable_outputs(model(**accepted(model, asked)), config, mask, self.pooling)
        self.kind = outputs.kind
        of_tokens = outputs.kind in (OutputKind.TOKENS, OutputKind.SPANS)
        return [
            {
                name: (value[i][mask[i].bool()] if of_tokens and name != "answer_type_logits" else value[i])
                .float()
                .cpu()
                .numpy()
                for name, value in outputs.values.items()
            }
            for i in range(len(rows))
        ]

    @cached_property
    def gold(self) -> Any:
        """The labels of all rows as transformers' Trainer gives them to a metric: as the collator makes them,
        of tokens without padding; None where there are none."""
        columns: dict[str, list[NDArray[Any]]] = {}
        for start in range(0, len(self.rows), self.batch_size):
            batch = self.collate(self.rows[start : start + self.batch_size])
            mask = batch["attention_mask"].bool()
            for name in self.label_names:
                labels = batch.get(name)
                if labels is None:
                    continue
                of_tokens = self.kind is OutputKind.TOKENS and labels.shape == mask.shape
                label_rows = (row[real] if of_tokens else row for row, real in zip(labels, mask, strict=True))
                columns.setdefault(name, []).extend(row.cpu().numpy() for row in label_rows)
        stacked = [_stacked(column) for column in columns.values()]
        return None if not stacked else stacked[0] if len(stacked) == 1 else tuple(stacked)


class DatasetResult:
    """What a model says of the examples, and what its teacher does (None without one)."""

    def __init__(
        self, examples: DatasetExamples, outputs: list[RowOutputs], taught: list[RowOutputs] | None
    ) -> None:
        self.examples, self.outputs, self.taught = examples, outputs, taught
        # Made once, because every sample takes its rows of them.
        self._stacked_outputs = tuple(_stacked([row[name] for row in outputs]) for name in outputs[0])
        self._gold = examples.gold
        if taught is not None:
            pairs = zip(outputs, taught, strict=True)
            self._agreed = np.stack([_agreed(examples.kind, *pair) for pair in pairs])

    @property
    def predictions(self) -> Any:
        """The classes, labels of tokens, or scores, of each example; of other kinds none."""
        kind = self.examples.kind
        if kind in (OutputKind.CLASSES, OutputKind.TOKENS):
            return [_classes(next(iter(row.values()))).tolist() for row in self.outputs]
        if kind in (OutputKind.SCORES, OutputKind.LABELS):
            return [next(iter(row.values())).tolist() for row in self.outputs]
        return None

    def scores(self) -> dict[str, Any]:
        """The metrics on all examples, as the caller's function gives them, and the agreement with the
        teacher, in percent; without those that are no number."""
        every = np.arange(len(self.outputs))
        return {**self._measured(every), "metrics": {"total": len(self.outputs)}}

    def losses(self, pruned: DatasetResult) -> dict[str, Any]:
        """What is lost from this to the pruned model, by metric, with 95% bootstrap intervals over the
        examples, which are paired; None for an interval of a metric that gives fewer than NEARLY_ALL of its
        samples a number. A line says for how many it gives none."""
        every = np.arange(len(self.outputs))
        resampled, faults = self._resampled(pruned)
        why = f" (compute_metrics fails on {len(faults)} of them: {faults[0]})" if faults else ""
        losses: dict[str, Any] = {}
        for name, lost in _differences(self._measured(every), pruned._measured(every)).items():
            values = [sample[name] for sample in resampled if name in sample]
            ends = interval(values, least=NEARLY_ALL)
            losses |= {f"{name}_loss": lost, f"{name}_loss_interval": ends}
            if len(values) < RESAMPLES:
                missing = (
                    f"{RESAMPLES - len(values)} of the {RESAMPLES} samples of the {self.examples.rows.name}"
                )
                say(f"{name} is no number on {missing}{why}{'' if ends else ': its loss has no interval'}")
        return losses

    def _resampled(self, pruned: DatasetResult) -> tuple[list[dict[str, float]], list[str]]:
        """(the losses on each of RESAMPLES samples of the examples, the errors of the caller's metric): where
        it fails, as one may that needs every class in the sample, there is the agreement alone."""
        losses, faults = [], list[str]()
        for rows in itertools.chain.from_iterable(samples(len(self.outputs), RESAMPLES)):
            try:
                lost = _differences(self._metrics(rows), pruned._metrics(rows))
            except Exception as error:
                lost = {}
                faults.append(f"{type(error).__name__}: {error}")
            losses.append(lost | _differences(self._agreement(rows), pruned._agreement(rows)))
        return losses, faults

    def _measured(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """The metrics and the agreement on these examples."""
        return self._metrics(rows) | self._agreement(rows)

    def _metrics(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """The caller's metrics, or those of labels, on these examples, where they are finite."""
        examples, metrics = self.examples, dict[str, float]()
        gold = self._gold
        if examples.compute_metrics is not None and gold is not None:
            labels = tuple(g[rows] for g in gold) if isinstance(gold, tuple) else gold[rows]
            outputs = tuple(values[rows] for values in self._stacked_outputs)
            predictions: Any = outputs[0] if len(outputs) == 1 else outputs
            computed = examples.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
            if not isinstance(computed, Mapping):
                kind = type(computed).__name__
                raise TypeError(f"it gives a {kind}, and a dictionary of numbers is needed")
            taken = [name for name in _TAKEN if name in computed]
            if taken:
                raise ValueError(f"it gives {', '.join(taken)}, by which the report calls something else")
            metrics = {name: float(value) for name, value in computed.items() if _is_number(value)}
        elif isinstance(gold, np.ndarray):
            metrics = self._against_labels(gold, rows)
        return {name: value for name, value in metrics.items() if np.isfinite(value)}

    def _agreement(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """The agreement with the teacher on these examples, where there is one and it is finite."""
        if self.taught is None:
            return {}
        agreed = self._agreed[rows]
        by_rank = self.examples.kind is OutputKind.SCORES and agreed.shape[1] == 2
        agreement = Spearman().value(*agreed.T) if by_rank else 100 * float(agreed.mean())
        return {AGREEMENT: agreement} if np.isfinite(agreement) else {}

    def _against_labels(self, gold: NDArray[Any], rows: NDArray[np.int64]) -> dict[str, float]:
        """Accuracy of classes and Spearman's correlation of scores, in percent, where no metric was given."""
        values = self._stacked_outputs[0]
        if self.examples.kind is OutputKind.CLASSES and gold.ndim == 1:
            return {"accuracy": 100 * float((values[rows].argmax(-1) == gold[rows]).mean())}
        if self.examples.kind is OutputKind.SCORES and values.shape[1] == 1:
            return {"spearman": Spearman().value(gold[rows].reshape(-1), values[rows, 0])}
        return {}


def _differences(scores: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """What is lost from these scores to the others, in the order of these, of those that both have."""
    return {name: score - others[name] for name, score in scores.items() if name in others}


def _agreed(kind: OutputKind, outputs: RowOutputs, taught: RowOutputs) -> NDArray[np.float64]:
    """How far two models agree on one example, from 0 to 1: (1,). Of one score, both of them: (2,)."""
    values = [(outputs[name], taught[name]) for name in taught]
    first, second = values[0]
    if kind is OutputKind.SCORES:
        pair = np.array([first[0], second[0]]) if len(first) == 1 else np.array([_cosine(first, second)])
        return pair.astype(np.float64)
    if kind in (OutputKind.EMBEDDINGS, OutputKind.SPARSE):
        return np.array([_cosine(first, second)])
    if kind is OutputKind.LABELS:
        return np.array([float(((first > 0) == (second > 0)).mean())])
    return np.array([float(np.mean([np.mean(_classes(a) == _classes(b)) for a, b in values]))])


def _classes(logits: NDArray[Any]) -> NDArray[Any]:
    """The class of the largest logit, without the last axis; of one logit, whether it is above 0."""
    return (logits[..., 0] > 0).astype(np.int64) if logits.shape[-1] == 1 else logits.argmax(-1)


def _cosine(first: NDArray[Any], second: NDArray[Any]) -> float:
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _stacked(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of unequal length as one, padded with IGNORED as transformers' Trainer does."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    if all(array.shape == shape for array in arrays):
        return np.stack(arrays)
    whole = np.full((len(arrays), *shape), IGNORED, dtype=np.result_type(*arrays))
    for row, array in zip(whole, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return whole
