"""How far a model's own scores can be believed: fitted on validation questions, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pruned_ops.models.configuration import SCORED, ScoreCalibration
from pruned_ops.qa.decoding import Decoded
from pruned_trainer.tasks.squad.scoring import question_scores

if TYPE_CHECKING:
    from pruned_trainer.tasks.squad.examples import Example

FloatArray = NDArray[np.float64]

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
