"""Metrics of what models say: the libraries' values, and resampled ones that agree with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts import metrics
from pruned_trainer.tasks.texts.encoding import model_outputs
from pruned_trainer.tasks.texts.metrics import Metric, loss_interval
from pruned_trainer.tasks.texts.ranking import DiscountedGain, ReciprocalRank
from pruned_trainer.tasks.texts.tasks import text_task
from text_files import checkpoint, classified, tagged, write_rows

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


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_model_that_says_one_thing_is_said_to_be_no_measure(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost against it, whatever is pruned."""
    made = text_task(TaskOptions(task=task, max_length=24))
    rows = tagged(6, 1) if task == "token-classification" else classified(6, 1)
    examples = made.read(write_rows(tmp_path / "train.jsonl", rows), "train")
    start = checkpoint(tmp_path / "start", BertModel)
    model = made.start_model(str(start), examples)
    prepared = made.prepare(examples, load_tokenizer(str(start)), model)
    logits = model_outputs(model, prepared.windows, prepared.read)
    medians = np.median(np.concatenate([of.reshape(-1, model.config.num_labels) for of in logits]), axis=0)
    label = model.config.id2label[model.config.num_labels - 1]
    model.classifier.bias.data -= torch.from_numpy(medians)  # no class is the likeliest everywhere
    for more, warns in ((0.0, False), (1e4, True)):
        model.classifier.bias.data[-1] += more
        dense = prepared.evaluate(model, {})
        assert 0.0 in dense.losses(dense).values()
        sentence = f"the dense model gives the class {label!r} to whatever it reads"
        assert (sentence in capsys.readouterr().out) == warns
