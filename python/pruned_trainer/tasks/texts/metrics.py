"""Metrics of what models say, each with what its value becomes on resampled examples, so that the loss from
one model to another has an interval in which the examples are paired.

The values are those of scikit-learn and scipy; resampled ones come from sums over the examples, which give
the same numbers (a test holds that), thousands of times as fast. All are in percent, or in hundredths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pruned_trainer.tasks.resampling import FloatArray, IntArray, counts, interval, samples
from pruned_trainer.tasks.task import Score


class Metric(Protocol):
    """A number for a model on examples. gold: their labels. predicted: the model's predictions."""

    @property
    def score(self) -> Score: ...

    def value(self, gold: Any, predicted: Any) -> float:
        """The metric on all examples; NaN where it is not defined."""

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        """(examples, k): all that its values on samples are made of."""

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        """Its values on samples of the examples: draws (samples, examples) holds their rows."""


def loss_interval(
    metric: Metric, gold: Any, first: Any, second: Any, seed: int = 0
) -> tuple[float, float] | None:
    """The 95% percentile interval of the metric of `first` less that of `second`, over RESAMPLES samples of
    the examples, drawn with replacement, the same ones for both. None where the metric is not defined on
    them. The same seed gives the same interval."""
    of_first, of_second = (metric.statistics(gold, predicted) for predicted in (first, second))
    differences = [
        metric.resampled(of_first, draws) - metric.resampled(of_second, draws)
        for draws in samples(len(gold), seed=seed)
    ]
    return interval(np.concatenate(differences))


def sums(statistics: FloatArray, draws: IntArray) -> FloatArray:
    """statistics (examples, k), draws (samples, examples) -> each sample's sums of them, (samples, k)."""
    return counts(draws, len(statistics)) @ statistics


@dataclass(frozen=True)
class Mean:
    """The mean of one number for each example, times 100."""

    score: Score

    def each(self, gold: Any, predicted: Any) -> FloatArray:
        """(examples,)."""
        raise NotImplementedError

    def value(self, gold: Any, predicted: Any) -> float:
        return 100 * float(self.each(gold, predicted).mean())

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return self.each(gold, predicted)[:, None]

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        return 100 * sums(statistics, draws)[:, 0] / draws.shape[1]


@dataclass(frozen=True)
class Accuracy(Mean):
    """The share of the examples whose likeliest class is the right one. gold: (examples,) numbers of classes;
    predicted: (examples, classes) logits."""

    score: Score = Score("accuracy", "accuracy")

    def value(self, gold: Any, predicted: Any) -> float:
        from sklearn.metrics import accuracy_score

        return 100 * float(accuracy_score(gold, _classes(predicted)))

    def each(self, gold: Any, predicted: Any) -> FloatArray:
        return (_classes(predicted) == np.asarray(gold)).astype(np.float64)


def _classes(predicted: Any) -> IntArray:
    return np.asarray(predicted).argmax(-1)


@dataclass(frozen=True)
class MacroF1:
    """The mean over the classes of their F1. gold, predicted: as for `Accuracy`."""

    score: Score = Score("f1", "F1 (mean over classes)")

    def value(self, gold: Any, predicted: Any) -> float:
        from sklearn.metrics import f1_score

        return 100 * float(f1_score(gold, _classes(predicted), average="macro", zero_division=0.0))

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return _class_counts(gold, predicted)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        right, chosen, true = np.split(sums(statistics, draws), 3, axis=1)
        counted = chosen + true
        f1 = np.divide(2 * right, counted, out=np.zeros_like(counted), where=counted > 0)
        return 100 * f1.sum(1) / (counted > 0).sum(1)


@dataclass(frozen=True)
class Matthews:
    """Matthews' correlation of the classes chosen and the right ones. gold, predicted: as for `Accuracy`."""

    score: Score = Score("mcc", "MCC")

    def value(self, gold: Any, predicted: Any) -> float:
        from sklearn.metrics import matthews_corrcoef

        return 100 * float(matthews_corrcoef(gold, _classes(predicted)))

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return _class_counts(gold, predicted)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        right, chosen, true = np.split(sums(statistics, draws), 3, axis=1)
        total = float(draws.shape[1])
        covariance = right.sum(1) * total - (chosen * true).sum(1)
        spread = (total**2 - (chosen**2).sum(1)) * (total**2 - (true**2).sum(1))
        defined = spread > 0
        return 100 * np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=defined)


def _class_counts(gold: Any, predicted: Any) -> FloatArray:
    """(examples, 3 * classes): of each class, whether it was rightly chosen, chosen, and right."""
    logits = np.asarray(predicted)
    every = np.eye(logits.shape[-1])
    chosen, true = every[_classes(logits)], every[np.asarray(gold)]
    return np.concatenate([chosen * true, chosen, true], 1)


@dataclass(frozen=True)
class Spearman:
    """The correlation of the ranks of scores. gold, predicted: (examples,)."""

    score: Score = Score("spearman", "Spearman")

    def value(self, gold: Any, predicted: Any) -> float:
        from scipy.stats import spearmanr

        return _correlation(spearmanr, gold, predicted)

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return np.stack([gold, predicted], 1).astype(np.float64)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        from scipy.stats import rankdata

        first, second = (rankdata(side[draws], axis=1) for side in statistics.T)
        first, second = (x - x.mean(1, keepdims=True) for x in (first, second))
        spread = np.sqrt((first**2).sum(1) * (second**2).sum(1))
        return 100 * np.divide(
            (first * second).sum(1), spread, out=np.full(len(draws), np.nan), where=spread > 0
        )


@dataclass(frozen=True)
class Pearson:
    """The correlation of scores. gold, predicted: (examples,)."""

    score: Score = Score("pearson", "Pearson")

    def value(self, gold: Any, predicted: Any) -> float:
        from scipy.stats import pearsonr

        return _correlation(pearsonr, gold, predicted)

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        # About their means, so that no digits are lost where the scores are far from 0.
        x, y = (np.asarray(side, np.float64) - np.mean(side) for side in (gold, predicted))
        return np.stack([x, y, x * y, x * x, y * y], 1)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        total, mean_squares = float(draws.shape[1]), statistics[:, 3:].mean(0)
        sx, sy, sxy, sxx, syy = sums(statistics, draws).T
        variances = (total * sxx - sx**2) * (total * syy - sy**2)
        return 100 * np.divide(
            total * sxy - sx * sy,
            np.sqrt(np.maximum(variances, 0)),
            out=np.full(len(draws), np.nan),
            where=variances > total**4 * max(1e-18 * float(mean_squares.prod()), 1e-300),
        )


def _correlation(of: Any, gold: Any, predicted: Any) -> float:
    """100 times scipy's correlation; NaN where one side is constant, or there are fewer than two."""
    if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return math.nan
    return 100 * float(of(gold, predicted).statistic)


CLASSES: tuple[Metric, ...] = (Accuracy(), MacroF1(), Matthews())
SCORES: tuple[Metric, ...] = (Spearman(), Pearson())
# Of texts without labels, beside the teacher.
CLASS_AGREEMENT: tuple[Metric, ...] = (Accuracy(Score("agreement", "same class as the teacher")),)
SCORE_AGREEMENT: tuple[Metric, ...] = (Spearman(Score("agreement", "Spearman with the teacher's scores")),)


def score_lines(metrics: Sequence[Metric]) -> tuple[Score, ...]:
    """The lines of the result table of these metrics."""
    return tuple(metric.score for metric in metrics)
