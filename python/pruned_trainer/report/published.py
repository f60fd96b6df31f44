"""Speed and F1 that others published, shown as theirs beside a report of ours.

Their models and machines are others: the points show what has been reached, not what our models would reach
there. They stand beside results on the same data set alone (`beside`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAPER = "McCarley et al., arXiv 1910.06360"
BLOCK_PRUNING = "nn_pruning, its model cards (Lagunas et al., arXiv 2109.04838)"


@dataclass(frozen=True)
class Published:
    """A published series.

    data: begins with the name of a data set, as `data_set_of` gives it. score: the key of our score that it
    is compared with. dense: the score of its own dense model, in percent; None where we do not know it.
    points: (times as fast as that model, score in percent).
    """

    source: str
    model: str
    data: str
    hardware: str
    score: str
    dense: float | None
    points: tuple[tuple[float, float], ...]

    @property
    def changes(self) -> list[tuple[float, float]]:
        """(speed-up, points gained over its own dense model); empty where that model's score is unknown."""
        return [] if self.dense is None else [(speed, score - self.dense) for speed, score in self.points]


# The paper's rows a and d to g. The F1 of its rows b and c is uncertain, so they are left out.
_SQUAD = (
    Published(
        PAPER, "BERT-large", "SQuAD 2.0 dev", "K80, batch 1", "f1", 84.6,
        ((1.63, 83.7), (1.95, 83.2), (2.24, 82.4), (2.40, 81.5)),
    ),
    Published(
        BLOCK_PRUNING, "BERT-large-wwm", "SQuAD 2.0", "RTX 3090", "f1", 85.85,
        ((2.15, 83.22), (2.63, 82.57)),
    ),
    Published(
        BLOCK_PRUNING, "BERT-base", "SQuAD 1.1", "RTX 3090", "f1", 88.5,
        ((1.84, 88.72), (1.98, 88.25), (2.44, 87.71), (2.80, 86.69)),
    ),
    Published(
        "CoFi (Xia et al., ACL 2022)", "BERT-base", "SQuAD 1.1", "V100, batch 128", "f1", None,
        ((2.0, 89.1), (8.7, 82.6)),
    ),
)  # fmt: skip
_NQ_SPEEDS = (1.49, 1.83, 2.46)


def _natural_questions(score: str, dense: float, *reached: float) -> Published:
    """The paper's series of a score, which the official evaluator takes at its best threshold."""
    points = tuple(zip(_NQ_SPEEDS, reached, strict=True))
    hardware = "V100, fp16, batch 64"
    data = "Natural Questions, distilled"
    return Published(PAPER, "RoBERTa-large", data, hardware, score, dense, points)


PUBLISHED = {
    "squad": _SQUAD,
    "natural_questions": (
        _natural_questions("long_best_f1", 70.3, 69.8, 69.3, 67.6),
        _natural_questions("short_best_f1", 58.8, 58.4, 58.4, 55.4),
    ),
}

# The ids of SQuAD's own questions; of Natural Questions' own examples, numbers of 64 bits.
_SQUAD_ID, _NQ_ID = re.compile("[0-9a-f]{24}"), re.compile("-?[0-9]{15,20}")


def data_set_of(task: str, predictions: Any, metrics: Mapping[str, Any]) -> str | None:
    """The published data set whose questions a model answered, by their ids; None for any other questions.

    predictions: in the official evaluator's format. metrics: the official evaluator's keys.
    """
    if task == "squad" and predictions and all(_SQUAD_ID.fullmatch(id) for id in predictions):
        return "SQuAD 2.0" if metrics.get("NoAns_total") else "SQuAD 1.1"
    if task == "natural_questions":
        ids = [str(answered["example_id"]) for answered in predictions["predictions"]]
        return "Natural Questions" if ids and all(_NQ_ID.fullmatch(id) for id in ids) else None
    return None


def beside(task: str, data_set: str | None) -> Sequence[Published]:
    """The series that may stand beside results on this data set; none for an unknown one."""
    series = PUBLISHED.get(task, ())
    return [published for published in series if data_set and published.data.startswith(data_set)]
