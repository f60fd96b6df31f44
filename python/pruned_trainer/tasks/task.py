"""What a pruning job asks of its task: models, data, thresholds, scores. Everything else is the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pruned_ops.qa.logits import predict_logits
from pruned_trainer.distributed import is_main

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TASKS = ("squad", "natural_questions")
# What a batch holds for the loss alone, by the names of the models' arguments.
LABELS = ("start_positions", "end_positions", "answer_types")


class Score(NamedTuple):
    """A line of the result table. key: in a model's entry of report.json; `KEY_loss` and `KEY_loss_interval`
    in the report itself, where has_loss says so."""

    key: str
    label: str
    has_loss: bool = True


SCORES = {
    "squad": (
        Score("f1", "F1"),
        Score("exact", "exact", has_loss=False),
        Score("f1_span", "span F1"),
    ),
    "natural_questions": (Score("long_f1", "long F1"), Score("short_f1", "short F1")),
}


# Decimals of the official metric's numbers: percent in SQuAD, fractions in Natural Questions.
METRIC_DIGITS = {"squad": 2, "natural_questions": 4}


class Result(Protocol):
    """What a model reaches on a file at given thresholds.

    predictions: as the official evaluator reads them.
    """

    @property
    def predictions(self) -> Any: ...

    def scores(self) -> dict[str, Any]:
        """As report.json has them for each model: each Score's key, in percent or None, and more."""

    def losses(self, pruned: Any) -> dict[str, Any]:
        """Points lost from this result to the pruned model's on the same file, with 95% intervals."""


class Prepared(Protocol):
    """A file cut into windows once, for every model."""

    def __len__(self) -> int:
        """Questions."""

    def arrival_lengths(self) -> list[int]:
        """Window lengths in arrival order, in tokens."""

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        """The thresholds that are best for `model` here, by the config's field that keeps each."""

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The same thresholds, with what else the config keeps that is chosen here."""

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> Result:
        """Scores of `model`, which runs packed meanwhile, on all processes."""


class Task(Protocol):
    """A task with what its options say. The examples that `read` gives are its own affair."""

    @property
    def thresholds(self) -> tuple[str, ...]:
        """Fields of a model's config; 0.0 where it lacks one."""

    def start_model(self, source: str) -> PreTrainedModel:
        """A model to fine-tune from an encoder: heads that it lacks are new."""

    def check_model(self, model: PreTrainedModel) -> None:
        """ValueError where the model is not for this task."""

    def read(self, source: Path | str, split: str) -> Any:
        """The examples of a file to judge models on."""

    def read_training(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        """(training examples, held-out ones): the latter in place of a validation file, else None."""

    def describe(self, examples: Any) -> str:
        """How many, of what."""

    def prepare(self, examples: Any, tokenizer: PreTrainedTokenizerFast) -> Prepared:
        """The examples' windows, to judge models on."""

    def features(self, examples: Any, tokenizer: PreTrainedTokenizerFast) -> Sequence[dict[str, Any]]:
        """The examples' windows, to train on: dictionaries that `pad_batch` takes, with LABELS."""


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model that is not to compute a loss is given."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def own_thresholds(model: PreTrainedModel, task: Task) -> dict[str, float]:
    """The thresholds in the model's config."""
    return {name: float(getattr(model.config, name, 0.0)) for name in task.thresholds}


def model_logits(model: PreTrainedModel, batch_size: int, some: Sequence[Any]) -> list[Any]:
    """`predict_logits` with the model's padding, and a bar on the main process."""
    return predict_logits(model, some, batch_size, model.config.pad_token_id, progress=is_main())
