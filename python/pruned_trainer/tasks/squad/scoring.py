"""Scores of answers by the rule of the official SQuAD 2.0 evaluator, the null threshold, and intervals.

Every score is in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruned_ops.models.configuration import SCORED, ScoreCalibration
from pruned_ops.qa.decoding import Decoded
from pruned_ops.qa.questions import answer_scores
from pruned_trainer.tasks.squad.examples import parse_squad

if TYPE_CHECKING:
    from pruned_trainer.tasks.squad.examples import Example

FloatArray = NDArray[np.float64]

# Resamples drawn at once: their indices for 10,000 questions take 4 MB.
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True, eq=False)
class QuestionScores:
    """Exact match and F1 of every question, in percent: (questions,) each."""

    exact: FloatArray
    f1: FloatArray


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What a model reaches on a file, in percent.

    metrics: the official evaluator's keys. f1_span: mean F1 of the best span, with the null option off, on
    the answerable questions; None where there are none. predictions: id -> text, "" for no answer.
    question_f1: (questions,), question_span_f1: (answerable questions,), in the order of the examples: what
    `bootstrap_interval` compares between two models.
    """

    metrics: dict[str, float]
    f1_span: float | None
    predictions: dict[str, str]
    question_f1: FloatArray
    question_span_f1: FloatArray

    @property
    def f1(self) -> float:
        return self.metrics["f1"]

    @property
    def exact(self) -> float:
        return self.metrics["exact"]

    def scores(self) -> dict[str, Any]:
        """As report.json has them for each model."""
        return {"f1": self.f1, "exact": self.exact, "f1_span": self.f1_span, "metrics": self.metrics}

    def losses(self, pruned: EvaluationResult) -> dict[str, Any]:
        """Points lost from this to the pruned model, with 95% bootstrap intervals over the questions."""
        found: dict[str, Any] = {
            "f1_loss": self.f1 - pruned.f1,
            "f1_loss_interval": bootstrap_interval(self.question_f1, pruned.question_f1),
            "f1_span_loss": None,
            "f1_span_loss_interval": None,
        }
        if self.f1_span is not None and pruned.f1_span is not None:
            found["f1_span_loss"] = self.f1_span - pruned.f1_span
            interval = bootstrap_interval(self.question_span_f1, pruned.question_span_f1)
            found["f1_span_loss_interval"] = interval
        return found


def question_scores(examples: Sequence[Example], predictions: Mapping[str, str]) -> QuestionScores:
    """Score each example's prediction, in the order of the examples; other ids are not looked at.

    Raises ValueError, naming them, where predictions are missing.
    """
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{len(missing)} questions have no prediction: {', '.join(missing[:5])}{more}")
    texts = [[answer.text for answer in example.answers] for example in examples]
    pairs = [answer_scores(predictions[e.id], gold) for e, gold in zip(examples, texts, strict=True)]
    exact, f1 = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return QuestionScores(exact, f1)


def official_metrics(examples: Sequence[Example], scores: QuestionScores) -> dict[str, float]:
    """The official evaluator's keys; those of answerable or unanswerable questions where there are such."""
    if not examples:
        raise ValueError("there are no questions to score")
    answerable = np.array([bool(example.answers) for example in examples])
    metrics: dict[str, float] = {}
    for prefix, chosen in (("", answerable | True), ("HasAns_", answerable), ("NoAns_", ~answerable)):
        if chosen.any():
            metrics[f"{prefix}exact"] = float(scores.exact[chosen].mean())
            metrics[f"{prefix}f1"] = float(scores.f1[chosen].mean())
            metrics[f"{prefix}total"] = int(chosen.sum())
    return metrics


def best_null_threshold(examples: Sequence[Example], decoded: Sequence[Decoded]) -> float:
    """The threshold on (null score - best span's score) with the best mean F1 on these (validation) examples.

    Of equally good ones the largest, which answers most; midway between the margins on its two sides, or 1
    beyond the outermost. Finite always: 0 where no question has a span. O(n log n).
    """
    _check_pairs(examples, decoded)
    spans = {example.id: one.best.answer for example, one in zip(examples, decoded, strict=True)}
    nothing = dict.fromkeys(spans, "")
    gain = question_scores(examples, spans).f1 - question_scores(examples, nothing).f1
    margins = np.array([one.null_margin for one in decoded])
    # A question without a span says "nothing" at every threshold, and so does not matter.
    matters = np.isfinite(margins)
    return _best_threshold(margins[matters], gain[matters])


def _best_threshold(margins: FloatArray, gain: FloatArray) -> float:
    """margins: (questions,), a question is answered where its margin is at most the threshold; gain: what
    answering it adds to the sum of F1."""
    if not margins.size:
        return 0.0
    order = np.argsort(margins, kind="stable")
    margins, total = margins[order], np.concatenate([[0.0], np.cumsum(gain[order])])
    # Answering the first k is possible where the k-th margin differs from the next one. Rounded, so that
    # sums that are equal but for their order of addition count as equal.
    possible = np.concatenate([[True], margins[1:] != margins[:-1], [True]])
    value = np.where(possible, np.round(total, 6), -np.inf)
    answered = len(value) - 1 - int(np.argmax(value[::-1]))
    if answered == 0:
        return float(margins[0]) - 1.0
    if answered == len(margins):
        return float(margins[-1]) + 1.0
    low, high = float(margins[answered - 1]), float(margins[answered])
    middle = low + (high - low) / 2
    return middle if middle < high else low  # between neighbouring floats there is no middle


def evaluate(examples: Sequence[Example], decoded: Sequence[Decoded], threshold: float) -> EvaluationResult:
    """Score what was decoded, one per example: no answer where null score - span's score > threshold."""
    _check_pairs(examples, decoded)
    predictions = {e.id: one.answer(threshold).answer for e, one in zip(examples, decoded, strict=True)}
    scores = question_scores(examples, predictions)
    answerable = [(e, one) for e, one in zip(examples, decoded, strict=True) if e.answers]
    spans = question_scores([e for e, _ in answerable], {e.id: one.best.answer for e, one in answerable}).f1
    f1_span = float(spans.mean()) if len(spans) else None
    return EvaluationResult(official_metrics(examples, scores), f1_span, predictions, scores.f1, spans)


def _check_pairs(examples: Sequence[Example], decoded: Sequence[Decoded]) -> None:
    if len(examples) != len(decoded):
        raise ValueError(f"{len(examples)} examples, but {len(decoded)} decoded")


def bootstrap_interval(
    first: ArrayLike, second: ArrayLike, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(first - second), both scored on the same questions in the same order.

    first, second: (questions,), any unit; the interval is in that unit. Questions are resampled with
    replacement, as pairs. The same seed gives the same interval.
    """
    if np.shape(first) != np.shape(second) or np.ndim(first) != 1 or not np.size(first):
        raise ValueError(f"scores of shapes {np.shape(first)} and {np.shape(second)} are no pairs")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 1, level ({level}) between 0 and 1")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    random = np.random.default_rng(seed)
    means = []
    for done in range(0, resamples, _RESAMPLES_AT_ONCE):
        shape = (min(_RESAMPLES_AT_ONCE, resamples - done), difference.size)
        means.append(difference[random.integers(difference.size, size=shape)].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def squad_metrics(gold: dict[str, Any], predictions: Mapping[str, str]) -> dict[str, float]:
    """What the official SQuAD 2.0 evaluator prints: exact, f1 and total, also for answerable ("HasAns_") and
    unanswerable ("NoAns_") questions where there are such; scores in percent.

    gold: the parsed file. predictions: id -> text, "" for no answer. Raises ValueError where predictions are
    missing (the official evaluator skips such questions), SquadFormatError where gold is not SQuAD.
    """
    examples = parse_squad(gold, on_bad_answer="keep")
    return official_metrics(examples, question_scores(examples, predictions))


if TYPE_CHECKING:
    from pruned_trainer.tasks.squad.examples import Example


# Where the two numbers are looked for: from a model that ought to be much surer to one that ought to be much
# less sure; and from one that may be certain to one that is right once in 50 times at its surest.
_TEMPERATURES, _OTHERS = (0.05, 50.0), (1e-4, 50.0)
_POINTS, _ROUNDS = 25, 4


def fit_calibration(
    examples: Sequence[Example], decoded: Sequence[Decoded], null_score_threshold: float
) -> ScoreCalibration:
    """The calibration under which it is likeliest which of the chosen answers are right: those that match a
    gold answer exactly, after the official evaluator's normalisation ("" where there is none).

    Questions without a context token, which can only be answered "", do not count; as it is where none do.
    """
    counted = [(example, one) for example, one in zip(examples, decoded, strict=True) if one.n_best]
    if not counted:
        return ScoreCalibration()
    predictions = {e.id: one.answer(null_score_threshold).answer for e, one in counted}
    right = question_scores([e for e, _ in counted], predictions).exact > 0
    behind = np.full((len(counted), SCORED + 1), np.inf)
    for row, (_, one) in zip(behind, counted, strict=True):
        scores = np.array([*(a.score for a in one.n_best[:SCORED]), one.null_score - null_score_threshold])
        row[: len(scores)] = scores.max() - scores
    return _likeliest(behind, right)


def _likeliest(behind: FloatArray, right: NDArray[np.bool_]) -> ScoreCalibration:
    """behind: (questions, candidates), by how much each scores less than the likeliest; infinite for none.

    A grid over both numbers' logarithms, made finer around its best point: nothing to converge, and never
    worse than a point of the first grid. The targets are Platt's, a little short of 0 and 1, so that a model
    that is always right on a few questions is not thought infallible.
    """
    count = int(right.sum())
    targets = np.where(right, (count + 1) / (count + 2), 1 / (len(right) - count + 2))
    bounds = [tuple(np.log(_TEMPERATURES)), tuple(np.log(_OTHERS))]
    centre = [(low + high) / 2 for low, high in bounds]
    reach = [(high - low) / 2 for low, high in bounds]
    for _ in range(_ROUNDS):
        axes = [
            np.linspace(max(low, middle - width), min(high, middle + width), _POINTS)
            for (low, high), middle, width in zip(bounds, centre, reach, strict=True)
        ]
        losses = np.array([_losses(behind, targets, np.exp(one), np.exp(axes[1])) for one in axes[0]])
        best = np.unravel_index(losses.argmin(), losses.shape)
        centre = [float(axis[place]) for axis, place in zip(axes, best, strict=True)]
        reach = [float(axis[1] - axis[0]) for axis in axes]
    temperature, other = np.exp(centre)
    return ScoreCalibration(float(temperature), float(other))


def _losses(behind: FloatArray, targets: FloatArray, temperature: float, others: FloatArray) -> FloatArray:
    """The mean cross-entropy at this temperature, for each of `others`."""
    total = np.exp(-behind / temperature).sum(1)[:, None] + others  # the likeliest weighs 1
    wrong = np.log(np.maximum(total - 1, 1e-300))
    return (np.log(total) - (1 - targets)[:, None] * wrong).mean(0)
