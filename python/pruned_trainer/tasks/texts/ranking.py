"""Metrics of rankings: what stands first among the texts of a query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruned_trainer.tasks.task import Score
from pruned_trainer.tasks.texts.metrics import FloatArray, Mean, Metric

TOP = 10


@dataclass(frozen=True)
class Ranking(Mean):
    """The mean over queries of a number for each ranking. gold: the relevance of a query's texts, (texts,).
    predicted: their scores, (texts,). Both are lists with an array for each query."""

    def of_query(self, relevance: FloatArray, scores: FloatArray) -> float:
        """The metric of one query, between 0 and 1."""
        raise NotImplementedError

    def each(self, gold: Any, predicted: Any) -> FloatArray:
        pairs = zip(gold, predicted, strict=True)
        return np.array([self.of_query(np.asarray(right), np.asarray(scores)) for right, scores in pairs])


@dataclass(frozen=True)
class ReciprocalRank(Ranking):
    """1 over the place of the first relevant text, 0 where none is among the first TOP. Of equal scores those
    of relevant texts come last, so that a model that says the same of all gains nothing by their order."""

    score: Score = Score("mrr", f"MRR@{TOP}")

    def of_query(self, relevance: FloatArray, scores: FloatArray) -> float:
        if not (relevance > 0).any():
            return 0.0
        best = scores[relevance > 0].max()
        place = int((scores[relevance <= 0] >= best).sum()) + 1
        return 1 / place if place <= TOP else 0.0


@dataclass(frozen=True)
class DiscountedGain(Ranking):
    """scikit-learn's nDCG of the first TOP texts."""

    score: Score = Score("ndcg", f"nDCG@{TOP}")

    def of_query(self, relevance: FloatArray, scores: FloatArray) -> float:
        from sklearn.metrics import ndcg_score

        if not (relevance > 0).any():
            return 0.0
        if len(scores) < 2:  # of which scikit-learn makes no ranking
            return 1.0
        return float(ndcg_score([relevance], [scores], k=TOP))


@dataclass(frozen=True)
class Recall(Ranking):
    """The share of the relevant texts that are among the first `top`."""

    score: Score = Score("recall", "recall@100", has_loss=False)
    top: int = 100

    def of_query(self, relevance: FloatArray, scores: FloatArray) -> float:
        first = np.argsort(-scores, kind="stable")[: self.top]
        relevant = relevance > 0
        return float(relevant[first].sum() / max(relevant.sum(), 1))


RANKING: tuple[Metric, ...] = (ReciprocalRank(), DiscountedGain())
RETRIEVAL: tuple[Metric, ...] = (DiscountedGain(), ReciprocalRank(), Recall())


def grouped(values: Sequence[Any], groups: Sequence[int]) -> list[FloatArray]:
    """The values of each group, in the order of their first members. groups: the number of each value's."""
    by_group: dict[int, list[Any]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    return [np.array(of_group, np.float64) for of_group in by_group.values()]
