"""Scores as probabilities: what is ranked first, and how a calibration is fitted and kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pruned_ops
from inputs import pruned_model, randn
from pruned_ops.models.configuration import ScoreCalibration
from pruned_ops.qa.decoding import Answer, Candidates, Decoded
from pruned_ops.qa.windows import Window
from pruned_trainer.tasks.squad.examples import Example, GoldAnswer
from pruned_trainer.tasks.squad.metrics import fit_calibration


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(-50, 50), min_size=0, max_size=6),
    null=st.floats(-50, 50),
    threshold=st.floats(-60, 60),
    temperature=st.floats(0.01, 50),
    other=st.floats(0, 50),
)
def test_the_likeliest_is_what_the_threshold_says(
    scores: list[float], null: float, threshold: float, temperature: float, other: float
) -> None:
    spans = [Answer("x" * (i + 1), score, 0, i + 1) for i, score in enumerate(sorted(scores, reverse=True))]
    decoded = Decoded(tuple(spans), null)
    ranked = decoded.ranked(threshold, ScoreCalibration(temperature, other))
    assert ranked[0].answer == decoded.answer(threshold).answer
    assert len(ranked) == len(spans) + 1 and sum(a.score for a in ranked) <= 1 + 1e-9
    assert all(before.score >= after.score - 1e-12 for before, after in zip(ranked, ranked[1:], strict=False))
    plain = decoded.ranked(threshold, ScoreCalibration())
    assert sum(a.score for a in plain) == pytest.approx(1)


def example(name: str, answer: str) -> Example:
    """A question with this answer, or with none."""
    answers = (GoldAnswer(answer, 0),) if answer else ()
    return Example(name, "", "", "", answers, is_impossible=not answer)


def questions(count: int, temperature: float, other: float) -> tuple[list[Example], list[Decoded]]:
    """Questions whose likeliest answer is right as often as this calibration says."""
    random = np.random.default_rng(0)
    examples, decoded = [], []
    for i in range(count):
        scores = np.sort(random.normal(0, 6, 5))[::-1]
        spans = tuple(Answer(f"s{j}", float(score), j, j + 2) for j, score in enumerate(scores))
        one = Decoded(spans, float(random.normal(4, 6)))
        said = one.ranked(0.5, ScoreCalibration(temperature, other))[0]
        right = random.random() < said.score
        text = said.answer if right else "something else"
        examples.append(example(str(i), text))
        decoded.append(one)
    return examples, decoded


@pytest.mark.parametrize(("temperature", "other"), [(1.0, 0.5), (4.0, 0.01), (2.0, 1.0)])
def test_fitting_finds_the_calibration_that_made_the_answers(temperature: float, other: float) -> None:
    found = fit_calibration(*questions(6000, temperature, other), 0.5)
    assert found.temperature == pytest.approx(temperature, rel=0.25)
    assert found.other == pytest.approx(other, rel=0.25, abs=0.02)


def test_fitting_on_little_or_nothing() -> None:
    assert fit_calibration([], [], 0.0) == ScoreCalibration()
    examples, _ = questions(2, 1.0, 0.0)
    empty = [Decoded((), 1.0)] * 2
    assert fit_calibration(examples, empty, 0.0) == ScoreCalibration()
    sure = [Decoded((Answer("b", 40.0, 0, 1),), 0.0)] * 2
    right = [example(name, "b") for name in "12"]
    found = fit_calibration(right, sure, 0.0)
    # Two of two right: not certain.
    assert sure[0].ranked(0.0, found)[0].score == pytest.approx(0.75, abs=0.01)


def test_the_config_keeps_a_calibration_and_refuses_what_is_none(tmp_path: Any) -> None:
    model = pruned_model()
    assert model.config.score_calibration is None
    model.config.score_calibration = ScoreCalibration(0.5, 0.25).to_json()
    model.config.save_pretrained(tmp_path)
    again = pruned_ops.PrunedBertConfig.from_pretrained(tmp_path).score_calibration
    assert ScoreCalibration.parse(again) == ScoreCalibration(0.5, 0.25)
    for value in (
        {"temperature": 1.0},
        [1.0, 0.0],
        {"temperature": 0.0, "other": 0.0},
        {"temperature": 1.0, "other": -1.0},
        {"temperature": math.inf, "other": 0.0},
        {"temperature": True, "other": 0.0},
    ):
        with pytest.raises(ValueError, match="score_calibration"):
            pruned_ops.PrunedBertConfig(score_calibration=value)


def test_of_many_windows_only_the_best_spans_are_kept() -> None:
    context = "abcdefghij" * 100
    candidates = Candidates(context, n_best=3, max_answer_tokens=4)
    best: dict[tuple[int, int], float] = {}
    for number in range(200):
        first = (37 * number) % 900
        offsets = np.array([[-1, -1], *([i, i + 1] for i in range(first, first + 20))], np.int32)
        ids = np.zeros(21, np.int32)
        start, end = randn(number, 2, 21).numpy()
        candidates.add(Window(0, ids, ids, offsets, 0), (start, end), "a window")
        for i in range(1, 21):
            for j in range(i, min(21, i + 4)):
                span = (first + i - 1, first + j)
                score = float(np.float64(start[i]) + np.float64(end[j]))
                best[span] = max(score, best.get(span, score))
    decoded = candidates.decoded()
    assert decoded is not None
    expected = sorted(((-score, *span) for span, score in best.items()))[:3]
    assert [(-a.score, a.start, a.end) for a in decoded.n_best] == expected
    assert len(candidates._spans) <= 8 * 3
