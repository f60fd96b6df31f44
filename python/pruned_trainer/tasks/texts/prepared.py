"""Examples made ready to judge models on, and what a model reaches on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from pruned_ops.qa.questions import arrival_lengths
from pruned_trainer.distributed import say
from pruned_trainer.tasks.task import Score
from pruned_trainer.tasks.texts.encoding import Read, model_outputs
from pruned_trainer.tasks.texts.metrics import Metric, loss_interval, score_lines


@dataclass(frozen=True, eq=False)
class TextResult:
    """What a model says of the examples, and the metrics of it. predictions: the same for people, as JSON.

    predicted, gold: as the metrics take them. classes: the class that the model gives to each text or word;
    None of a task without classes."""

    metrics: Sequence[Metric]
    gold: Any
    predicted: Any
    predictions: Any
    classes: Sequence[Any] | None = None

    def scores(self) -> dict[str, Any]:
        """Each metric's value, by its key; None where it is not defined. metrics: the number of
        examples."""
        values = {m.score.key: _defined(m.value(self.gold, self.predicted)) for m in self.metrics}
        return {**values, "metrics": {"total": len(self.gold)}}

    def losses(self, pruned: TextResult) -> dict[str, Any]:
        """Points lost from this to the pruned model, with 95% bootstrap intervals over the examples."""
        if self.classes is not None and len(self.classes) > 1 and len(set(self.classes)) == 1:
            say(
                f"the dense model gives the class {self.classes[0]!r} to whatever it reads: a loss against "
                "it says little"
            )
        losses: dict[str, Any] = {}
        scores, pruned_scores = self.scores(), pruned.scores()
        for metric in self.metrics:
            key = metric.score.key
            if not metric.score.has_loss:
                continue
            loss, interval = None, None
            if scores[key] is not None and pruned_scores[key] is not None:
                loss = scores[key] - pruned_scores[key]
                interval = loss_interval(metric, self.gold, self.predicted, pruned.predicted)
            losses[f"{key}_loss"], losses[f"{key}_loss_interval"] = loss, interval
        return losses


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class PreparedTexts:
    """Examples with their windows, which are cut once and used for every model.

    count, noun: the number of examples, and what they are called. gold: their labels, as the metrics take
    them. read: takes from a model's outputs for a window what is judged. assemble: joins what was read of all
    windows to a prediction for each example. show: turns the predictions into JSON for people. classes_of:
    takes from the predictions the class of each text or word; None for a task without classes.
    """

    noun: str
    count: int
    windows: Sequence[Any]
    gold: Any
    metrics: Sequence[Metric]
    read: Read
    assemble: Callable[[list[Any]], Any]
    show: Callable[[Any], Any]
    classes_of: Callable[[Any], Sequence[Any]] | None = None

    metric_digits = 2

    def __len__(self) -> int:
        return self.count

    @property
    def score_lines(self) -> tuple[Score, ...]:
        """The lines of the result table."""
        return score_lines(self.metrics)

    def arrival_lengths(self) -> list[int]:
        """The windows' lengths in tokens, in arrival order."""
        return arrival_lengths([[len(window)] for window in self.windows])

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        """Nothing: these tasks have no thresholds."""
        return {}

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """Nothing: no field of the config is chosen on these examples."""
        return {}

    def predictions_of(self, model: PreTrainedModel) -> Any:
        """What the model says of each example."""
        return self.assemble(model_outputs(model, self.windows, self.read))

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> TextResult:
        """The result of `model`, which runs packed meanwhile, on all processes."""
        predicted = self.predictions_of(model)
        classes = None if self.classes_of is None else self.classes_of(predicted)
        return TextResult(self.metrics, self.gold, predicted, self.show(predicted), classes)

    def taught_by(
        self, teacher: PreTrainedModel | None, gold_of: Callable[[Any], Any], metrics: Sequence[Metric]
    ) -> PreparedTexts:
        """The same examples, judged by whether a model says what the teacher says. Errors: ValueError where
        there is no teacher to compare with."""
        if teacher is None:
            raise ValueError("texts without labels are judged beside a teacher, and there is none")
        return replace(self, gold=gold_of(self.predictions_of(teacher)), metrics=metrics)
