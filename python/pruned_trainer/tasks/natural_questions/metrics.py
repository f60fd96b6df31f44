"""The official Natural Questions metric, written from its rule.

For long and for short answers it gives precision, recall and F1 over thresholds on the predictions' scores. A
question has an answer of a kind (long, short) where at least two of its annotators give one. A predicted
answer is right where it equals one annotator's: the same span by bytes or by tokens, the same set of short
spans, the same yes or no. Every score is a fraction, as the official evaluator prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruned_ops.files import parse_json, shown
from pruned_trainer.tasks.faults import get_field
from pruned_trainer.tasks.natural_questions.documents import (
    Label,
    NqFormatError,
    Span,
    read_label,
    read_lines,
)
from pruned_trainer.tasks.resampling import RESAMPLES, FloatArray, counts, interval, samples

# How many annotators must give an answer before the question counts as having one.
MIN_ANNOTATORS = 2
# The precisions at which the official evaluator gives the recall.
PRECISIONS = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Prediction:
    """A model's label, with the scores that thresholds on its long and its short answer apply to."""

    label: Label
    long_score: float
    short_score: float


@dataclass(frozen=True, eq=False)
class AnswerStats:
    """The predictions of one kind of answer, long or short; every array is (documents,).

    has_gold, has_predicted: whether gold and prediction have an answer. correct: whether the predicted one is
    right. score: the prediction's.
    """

    has_gold: NDArray[np.bool_]
    has_predicted: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    score: FloatArray

    def f1_at(self, threshold: float) -> float:
        """F1 of the answers whose score is at least the threshold."""
        return float(_f1(*self.counts_at(threshold).sum(0).astype(np.float64)))

    def counts_at(self, threshold: float) -> NDArray[np.int64]:
        """(documents, 3): right, predicted, gold, as 0 or 1, at this threshold on the score."""
        kept = self.score >= threshold
        return np.stack([self.correct & kept, self.has_predicted & kept, self.has_gold], 1).astype(np.int64)


def nq_metrics(gold_path: str | Path, predictions_path: str | Path) -> dict[str, float]:
    """The official Natural Questions evaluator's numbers: `long-` and `short-` best-threshold-f1, -precision,
    -recall, the threshold, and recall at given precisions.

    gold_path: JSONL with example_id and annotations, gzip or not. predictions_path: the official prediction
    JSON. Raises NqFormatError (a ValueError) where either is something else, or the two are not of the same
    examples.
    """
    long, short = score_answers(read_gold(gold_path), read_predictions(predictions_path))
    return {**kind_metrics(long, "long-"), **kind_metrics(short, "short-")}


def read_gold(path: str | Path) -> dict[int, tuple[Label, ...]]:
    """example_id -> its annotators' labels; the document itself is not read."""
    labels: dict[int, tuple[Label, ...]] = {}
    for where, entry in read_lines(Path(path)):
        key = get_field(entry, "example_id", int, where)
        where = f"{where}, example {key}"
        if key in labels:
            raise NqFormatError(f"{where}: this id appears twice")
        annotations = get_field(entry, "annotations", list, where)
        labels[key] = tuple(read_label(annotation, where) for annotation in annotations)
    if not labels:
        raise NqFormatError(f"{path}: no examples at all")
    return labels


def read_predictions(path: str | Path) -> dict[int, Prediction]:
    """example_id -> its prediction, from an official prediction file."""
    try:
        parsed = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise NqFormatError(f"{path}: not JSON: {error}") from None
    return parse_predictions(parsed, str(path))


def parse_predictions(parsed: object, name: str = "predictions") -> dict[int, Prediction]:
    """`read_predictions` of the parsed file."""
    predictions: dict[int, Prediction] = {}
    for number, entry in enumerate(get_field(parsed, "predictions", list, name)):
        key = get_field(entry, "example_id", int, f"{name}: prediction {number}")
        where = f"{name}: example {key}"
        label = read_label(entry, where)
        if label.short and label.yes_no != "NONE":
            raise NqFormatError(f"{where}: both short answers and {label.yes_no}; one of them is possible")
        scores = (_number(entry, f"{kind}_score", where) for kind in ("long_answer", "short_answers"))
        if key in predictions:
            raise NqFormatError(f"{where}: this id appears twice")
        predictions[key] = Prediction(label, *scores)
    return predictions


def _number(entry: Mapping[str, Any], key: str, where: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NqFormatError(f"{where}: {key!r} is {shown(value)}; a number is needed")
    return float(value)


def _same(first: Span, second: Span) -> bool:
    """Whether two spans are equal by bytes or by tokens, whichever both have."""
    return any(first[at] >= 0 and first[at : at + 2] == second[at : at + 2] for at in (0, 2))


def _same_set(first: Sequence[Span], second: Sequence[Span]) -> bool:
    return all(any(_same(a, b) for b in second) for a in first) and all(
        any(_same(a, b) for a in first) for b in second
    )


def _right_long(gold: Sequence[Label], predicted: Label) -> bool:
    span = predicted.long
    return span is not None and any(label.long is not None and _same(label.long, span) for label in gold)


def _right_short(gold: Sequence[Label], predicted: Label) -> bool:
    if predicted.yes_no != "NONE":
        return any(label.yes_no == predicted.yes_no for label in gold)
    return bool(predicted.short) and any(_same_set(label.short, predicted.short) for label in gold)


def score_answers(
    gold: Mapping[int, Sequence[Label]],
    predictions: Mapping[int, Prediction],
    annotators: int = MIN_ANNOTATORS,
) -> tuple[AnswerStats, AnswerStats]:
    """(long, short) answers' statistics, in the gold's order; NqFormatError where the ids differ.

    annotators: how many must give an answer before a document counts as having one; 1 for training
    documents, which have one annotator only.
    """
    differing = sorted(gold.keys() ^ predictions.keys())
    if differing:
        raise NqFormatError(
            f"gold and predictions are not of the same examples: {len(differing)} are in one of them only "
            f"(example {differing[0]})"
        )
    long, short = [], []
    for key, labels in gold.items():
        prediction = predictions[key]
        predicted = prediction.label
        has_long = sum(label.long is not None for label in labels) >= annotators
        has_short = sum(label.has_short for label in labels) >= annotators
        right_long = has_long and _right_long(labels, predicted)
        right_short = has_short and _right_short(labels, predicted)
        long.append((has_long, predicted.long is not None, right_long, prediction.long_score))
        short.append((has_short, predicted.has_short, right_short, prediction.short_score))
    return _stats(long), _stats(short)


def _stats(rows: list[tuple[bool, bool, bool, float]]) -> AnswerStats:
    has_gold, has_predicted, correct, score = zip(*rows, strict=True)
    gold, predicted, right = (np.array(values, dtype=bool) for values in (has_gold, has_predicted, correct))
    return AnswerStats(gold, predicted, right, np.array(score, np.float64))


def curve(stats: AnswerStats) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Thresholds, falling, with the precision and recall of the answers that score at least as much."""
    order = np.argsort(-stats.score, kind="stable")
    score = stats.score[order]
    correct, predicted = np.cumsum(stats.correct[order]), np.cumsum(stats.has_predicted[order])
    last = np.append(score[1:] != score[:-1], True)  # ties count together
    precision = correct / np.maximum(predicted, 1)
    recall = correct / max(int(stats.has_gold.sum()), 1)
    return score[last], precision[last], recall[last]


def mean_threshold(stats: AnswerStats) -> float:
    """The mean, over 200 resamples of the documents, of the threshold that is best on each; 0 where every F1
    is 0. On other documents it does better than the one threshold that is best here."""
    best_thresholds: list[float] = []
    for rows in samples(len(stats.score), 200):
        thresholds, f1 = _bests(stats, counts(rows, len(stats.score)))
        best_thresholds += thresholds[f1 > 0].tolist()
    return float(np.mean(best_thresholds)) if best_thresholds else 0.0


def best_f1_loss_interval(
    first: AnswerStats, second: AnswerStats, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile interval, in percent, of the F1 of `first` at its best threshold less that of `second`
    at its own; both are chosen anew on every resample of the documents, which are the same for both."""
    differences = []
    for rows in samples(len(first.score), resamples):
        times = counts(rows, len(first.score))
        differences.append(100 * (_bests(first, times)[1] - _bests(second, times)[1]))
    return _interval(differences)


def _interval(differences: Sequence[FloatArray]) -> tuple[float, float]:
    ends = interval(np.concatenate(differences))
    assert ends is not None  # an F1 is always a number
    return ends


def _bests(stats: AnswerStats, times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(samples,) each: the threshold with the best F1 on each sample, and that F1. times: (samples,
    documents), how often each document is in each."""
    order = np.argsort(-stats.score, kind="stable")
    score, times = stats.score[order], times[:, order]
    last = np.append(score[1:] != score[:-1], True)  # ties count together
    correct = np.cumsum(times * stats.correct[order], 1)[:, last]
    predicted = np.cumsum(times * stats.has_predicted[order], 1)[:, last]
    f1 = _f1(correct, predicted, (times * stats.has_gold[order]).sum(1, keepdims=True))
    best = f1.argmax(1)
    return score[last][best], f1[np.arange(len(f1)), best]


def kind_metrics(stats: AnswerStats, prefix: str) -> dict[str, float]:
    """The official evaluator's numbers for one kind of answer. prefix: of their keys, "long-" or "short-"."""
    threshold, precision, recall = curve(stats)
    f1 = _harmonic(precision, recall)
    best = int(np.argmax(f1))
    any_right = bool(f1[best] > 0)
    metrics = {
        "best-threshold-f1": float(f1[best]),
        "best-threshold-precision": float(precision[best]) if any_right else 0.0,
        "best-threshold-recall": float(recall[best]) if any_right else 0.0,
        "best-threshold": float(threshold[best]) if any_right else 0.0,
    }
    for least in PRECISIONS:
        # The first of equal recalls has the highest threshold.
        at = int(np.argmax(np.where(precision >= least, recall, -1.0)))
        reached = bool(precision[at] >= least and recall[at] > 0)
        metrics[f"recall-at-precision>={least}"] = float(recall[at]) if reached else 0.0
        metrics[f"precision-at-precision>={least}"] = float(precision[at]) if reached else 0.0
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def _harmonic(precision: FloatArray, recall: FloatArray) -> FloatArray:
    total = precision + recall
    return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0.0)


def _f1(correct: FloatArray, predicted: FloatArray, gold: FloatArray) -> FloatArray:
    return 2 * correct / np.maximum(predicted + gold, 1)


def f1_loss_interval(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[float, float]:
    """95% percentile interval of F1(first) - F1(second), in percent.

    first, second: (documents, 3), what `AnswerStats.counts_at` returns for the same documents. These are
    resampled with replacement, as pairs, and the same ones each time.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"counts of shapes {first.shape} and {second.shape} are no pairs")
    both = np.stack([first, second], 1).astype(np.float64)
    differences: list[FloatArray] = []
    for rows in samples(len(both)):
        sums = np.einsum("sd,dmk->smk", counts(rows, len(both)), both)
        f1 = _f1(sums[..., 0], sums[..., 1], sums[..., 2])
        differences.append(100 * (f1[:, 0] - f1[:, 1]))
    return _interval(differences)
