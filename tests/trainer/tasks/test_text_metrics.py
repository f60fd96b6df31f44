"""Metrics of what models say: the libraries' values, and resampled ones that agree with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pruned_trainer.tasks.texts import metrics
from pruned_trainer.tasks.texts.metrics import Metric, loss_interval
from pruned_trainer.tasks.texts.prepared import TextResult
from pruned_trainer.tasks.texts.ranking import DiscountedGain, ReciprocalRank

RNG = np.random.default_rng(0)
GOLD = RNG.integers(3, size=60)
LOGITS = RNG.normal(size=(60, 3)) + 0.8 * np.eye(3)[GOLD]
TRUE, GUESSED = 1000 + RNG.normal(size=(2, 60)).round(1)  # with ties
CASES: dict[str, tuple[Metric, Any, Any]] = {
    **{m.score.key: (m, GOLD, LOGITS) for m in metrics.CLASSES},
    **{m.score.key: (m, TRUE, TRUE + GUESSED) for m in metrics.SCORES},
}


@pytest.mark.parametrize("name", CASES)
def test_resampled_values_are_the_library_s_on_those_examples(name: str) -> None:
    metric, gold, said = CASES[name]
    draws = np.concatenate([np.arange(60)[None], RNG.integers(60, size=(5, 60))])
    resampled = metric.resampled(metric.statistics(gold, said), draws)
    expected = [metric.value(gold[rows], said[rows]) for rows in draws]
    np.testing.assert_allclose(resampled, expected, rtol=1e-9)


def test_a_class_that_a_sample_lacks_counts_as_the_library_counts_it() -> None:
    draws = np.flatnonzero(GOLD == 0)[None].repeat(2, 0)
    for metric in metrics.CLASSES:
        value = metric.value(GOLD[draws[0]], LOGITS[draws[0]])
        resampled = metric.resampled(metric.statistics(GOLD, LOGITS), draws)
        np.testing.assert_allclose(resampled, [value] * 2)


def test_constant_scores_have_no_correlation() -> None:
    constant, draws = np.full(60, 3.0), np.arange(60)[None]
    for metric in metrics.SCORES:
        assert np.isnan(metric.value(TRUE, constant))
        assert np.isnan(metric.resampled(metric.statistics(TRUE, constant), draws))
        assert loss_interval(metric, TRUE, TRUE, constant) is None


def test_the_interval_is_paired() -> None:
    """A model that says the same loses nothing, surely; independent ones would differ by several points."""
    for metric, gold, said in CASES.values():
        assert loss_interval(metric, gold, said, said) == (0.0, 0.0)
    worse = LOGITS.copy()
    worse[:6] = -worse[:6]
    interval = loss_interval(metrics.Accuracy(), GOLD, LOGITS, worse)
    loss = metrics.Accuracy().value(GOLD, LOGITS) - metrics.Accuracy().value(GOLD, worse)
    assert interval is not None and interval[0] <= loss <= interval[1] and interval[1] - interval[0] < 20


def test_ranking_measures_are_scikit_learn_s_and_know_ties() -> None:
    relevance, scores = np.array([0.0, 1, 0, 0]), np.array([3.0, 2, 2, 1])
    assert ReciprocalRank().of_query(relevance, scores) == 1 / 3  # of two equals the worse place
    assert ReciprocalRank().of_query(relevance, np.zeros(4)) == 1 / 4
    # Of two relevant equals, as one document that is there twice, one is first.
    assert ReciprocalRank().of_query(np.array([1.0, 0, 1]), np.array([3.0, 2, 3])) == 1
    assert ReciprocalRank().of_query(np.array([1.0, *[0] * 10]), np.arange(11.0)) == 0
    assert DiscountedGain().of_query(np.array([0.0, 1]), np.array([2.0, 1])) == pytest.approx(1 / np.log2(3))


def test_a_model_that_says_one_thing_is_said_to_be_no_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost against it, whatever is pruned."""
    gold, varied = np.array([0, 1, 1]), np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    constant = np.array([[0.0, 1.0]] * 3)
    for predicted, warns in ((constant, True), (varied, False)):
        dense = TextResult(metrics.CLASSES, gold, predicted, None)
        assert dense.losses(dense)["accuracy_loss"] == 0
        printed = capsys.readouterr().out
        assert ("the dense model gives all 3 texts one class: a loss against it says" in printed) == warns
