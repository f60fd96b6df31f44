"""Scores by the rule of the official SQuAD 2.0 evaluator, and what is fitted to them: the null threshold, the
calibration of a model's own scores, bootstrap intervals. Every score is in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruned_ops.models.configuration import SCORED, ScoreCalibration
from pruned_ops.qa.decoding import Decoded
from pruned_ops.qa.questions import answer_scores
from pruned_trainer.tasks.resampling import interval, samples
from pruned_trainer.tasks.squad.examples import Example, parse_squad
from pruned_trainer.tasks.task import Score

FloatArray = NDArray[np.float64]

SCORES = (Score("f1", "F1"), Score("exact", "exact", has_loss=False), Score("f1_span", "span F1"))
# Where the calibration's two numbers are sought. temperature: from a model that ought to be much surer to one
# that ought to be much less sure. other: from a model that may be certain to one that is right once in 50
# times at its surest.
_TEMPERATURES, _OTHERS = (0.05, 50.0), (1e-4, 50.0)
# Points of the grid along each range, and how often the grid is refined.
_POINTS, _ROUNDS = 25, 4


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
    question_f1: (questions,), question_span_f1: (answerable questions,), in the order of the examples; both
    are what `bootstrap_interval` compares between two models.
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
        """The scores as report.json has them for each model."""
        return {"f1": self.f1, "exact": self.exact, "f1_span": self.f1_span, "metrics": self.metrics}

    def losses(self, pruned: EvaluationResult) -> dict[str, Any]:
        """Points lost from this to the pruned model, with 95% bootstrap intervals over the questions."""
        losses: dict[str, Any] = {
            "f1_loss": self.f1 - pruned.f1,
            "f1_loss_interval": bootstrap_interval(self.question_f1, pruned.question_f1),
            "f1_span_loss": None,
            "f1_span_loss_interval": None,
        }
        if self.f1_span is not None and pruned.f1_span is not None:
            losses["f1_span_loss"] = self.f1_span - pruned.f1_span
            interval = bootstrap_interval(self.question_span_f1, pruned.question_span_f1)
            losses["f1_span_loss_interval"] = interval
        return losses


def squad_metrics(gold: dict[str, Any], predictions: Mapping[str, str]) -> dict[str, float]:
    """The official SQuAD 2.0 evaluator's numbers: exact, f1 and total, also for answerable ("HasAns_") and
    unanswerable ("NoAns_") questions where there are any; scores in percent.

    gold: the parsed file. predictions: id -> text, "" for no answer. Raises ValueError where predictions are
    missing (the official evaluator skips such questions), SquadFormatError where gold is not SQuAD.
    """
    examples = parse_squad(gold, on_bad_answer="keep")
    return official_metrics(examples, question_scores(examples, predictions))


def question_scores(examples: Sequence[Example], predictions: Mapping[str, str]) -> QuestionScores:
    """The scores of the examples' predictions, in the order of the examples; other ids are ignored.

    Raises ValueError, naming them, where predictions are missing.
    """
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{len(missing)} questions have no prediction: {', '.join(missing[:5])}{more}")
    pairs = [
        answer_scores(predictions[example.id], [answer.text for answer in example.answers])
        for example in examples
    ]
    exact, f1 = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return QuestionScores(exact, f1)


def official_metrics(examples: Sequence[Example], scores: QuestionScores) -> dict[str, float]:
    """`squad_metrics` of examples whose predictions are scored."""
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


def evaluate(examples: Sequence[Example], decoded: Sequence[Decoded], threshold: float) -> EvaluationResult:
    """Score what was decoded for each example: "" where null score - best span's score > threshold."""
    _check_pairs(examples, decoded)
    pairs = list(zip(examples, decoded, strict=True))
    predictions = {example.id: candidates.answer(threshold).answer for example, candidates in pairs}
    scores = question_scores(examples, predictions)
    answerable = [example for example in examples if example.answers]
    best_spans = {example.id: candidates.best.answer for example, candidates in pairs if example.answers}
    span_f1 = question_scores(answerable, best_spans).f1
    mean_span_f1 = float(span_f1.mean()) if len(span_f1) else None
    metrics = official_metrics(examples, scores)
    return EvaluationResult(metrics, mean_span_f1, predictions, scores.f1, span_f1)


def _check_pairs(examples: Sequence[Example], decoded: Sequence[Decoded]) -> None:
    if len(examples) != len(decoded):
        raise ValueError(f"{len(examples)} examples, but {len(decoded)} decoded")


def best_null_threshold(examples: Sequence[Example], decoded: Sequence[Decoded]) -> float:
    """The threshold on (null score - best span's score) with the best mean F1 on these (validation) examples.

    Of equally good thresholds it is the largest, which answers most; it lies midway between the margins on
    its two sides, or 1 beyond the outermost. Always finite: 0 where no question has a span. O(n log n).
    """
    _check_pairs(examples, decoded)
    pairs = zip(examples, decoded, strict=True)
    best_spans = {example.id: candidates.best.answer for example, candidates in pairs}
    no_answers = dict.fromkeys(best_spans, "")
    gain = question_scores(examples, best_spans).f1 - question_scores(examples, no_answers).f1
    margins = np.array([candidates.null_margin for candidates in decoded])
    # A question without a span is answered "" at every threshold, and so does not matter.
    matters = np.isfinite(margins)
    return _best_threshold(margins[matters], gain[matters])


def _best_threshold(margins: FloatArray, gain: FloatArray) -> float:
    """`best_null_threshold` from numbers.

    margins: (questions,), a question is answered where its margin is at most the threshold.
    gain: (questions,), what answering it adds to the sum of F1.
    """
    if not margins.size:
        return 0.0
    order = np.argsort(margins, kind="stable")
    margins, total = margins[order], np.concatenate([[0.0], np.cumsum(gain[order])])
    # Answering the first k is possible where the k-th margin differs from the next one. Sums are rounded, so
    # that those which differ by their order of addition only count as equal.
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


def fit_calibration(
    examples: Sequence[Example], decoded: Sequence[Decoded], null_score_threshold: float
) -> ScoreCalibration:
    """The calibration under which it is likeliest which of the model's answers are right.

    An answer is right where it matches a gold answer exactly, after the official evaluator's normalisation
    ("" where the question has none). Questions without a context token can only be answered "" and do not
    count; where no others are left, the calibration is the default one.
    """
    pairs = [pair for pair in zip(examples, decoded, strict=True) if pair[1].n_best]
    if not pairs:
        return ScoreCalibration()
    predictions = {
        example.id: candidates.answer(null_score_threshold).answer for example, candidates in pairs
    }
    right = question_scores([example for example, _ in pairs], predictions).exact > 0
    behind = np.full((len(pairs), SCORED + 1), np.inf)
    for row, (_, candidates) in zip(behind, pairs, strict=True):
        span_scores = [answer.score for answer in candidates.n_best[:SCORED]]
        scores = np.array([*span_scores, candidates.null_score - null_score_threshold])
        row[: len(scores)] = scores.max() - scores
    return _likeliest(behind, right)


def _likeliest(behind: FloatArray, right: NDArray[np.bool_]) -> ScoreCalibration:
    """behind: (questions, candidates), by how much each scores less than the best one; infinite for none.

    The search is a grid over both numbers' logarithms, refined around its best point: there is nothing to
    converge, and the result is never worse than a point of the first grid. The targets are Platt's, a little
    short of 0 and 1, so that a model that is always right on a few questions is not thought infallible.
    """
    count = int(right.sum())
    targets = np.where(right, (count + 1) / (count + 2), 1 / (len(right) - count + 2))
    bounds = [tuple(np.log(_TEMPERATURES)), tuple(np.log(_OTHERS))]
    centre = [(low + high) / 2 for low, high in bounds]
    reach = [(high - low) / 2 for low, high in bounds]
    for _ in range(_ROUNDS):
        temperatures, others = (
            np.linspace(max(low, middle - width), min(high, middle + width), _POINTS)
            for (low, high), middle, width in zip(bounds, centre, reach, strict=True)
        )
        losses = np.array(
            [
                _losses(behind, targets, np.exp(log_temperature), np.exp(others))
                for log_temperature in temperatures
            ]
        )
        best = np.unravel_index(losses.argmin(), losses.shape)
        centre = [float(temperatures[best[0]]), float(others[best[1]])]
        reach = [float(axis[1] - axis[0]) for axis in (temperatures, others)]
    temperature, other = np.exp(centre)
    return ScoreCalibration(float(temperature), float(other))


def _losses(behind: FloatArray, targets: FloatArray, temperature: float, others: FloatArray) -> FloatArray:
    """The mean cross-entropy at this temperature, for each of `others`."""
    total = np.exp(-behind / temperature).sum(1)[:, None] + others  # the likeliest weighs 1
    wrong = np.log(np.maximum(total - 1, 1e-300))
    return (np.log(total) - (1 - targets)[:, None] * wrong).mean(0)


def bootstrap_interval(first: ArrayLike, second: ArrayLike) -> tuple[float, float]:
    """The 95% percentile interval of mean(first - second).

    first, second: (questions,), scores of the same questions in the same order, in any unit; the interval is
    in it. Questions are resampled with replacement, as pairs, and the same ones each time.
    """
    if np.shape(first) != np.shape(second) or np.ndim(first) != 1 or not np.size(first):
        raise ValueError(f"scores of shapes {np.shape(first)} and {np.shape(second)} are no pairs")
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    means = [difference[rows].mean(axis=1) for rows in samples(difference.size)]
    ends = interval(np.concatenate(means))
    if ends is None:
        raise ValueError("the scores are no finite numbers")
    return ends
