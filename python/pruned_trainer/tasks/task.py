"""What a pruning job asks of its task: models, data, thresholds and scores.

The rest of a job is the same code for every task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from pruned_ops.qa.logits import predict_logits
from pruned_trainer.distributed import is_main
from pruned_trainer.tasks.faults import DataFaults

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The entries of a batch that only the loss reads, by the names of the models' arguments.
LABELS = ("start_positions", "end_positions", "answer_types", "labels")


class Score(NamedTuple):
    """A line of the result table.

    key: its name in a model's entry of report.json. has_loss: whether the report itself has `KEY_loss` and
    `KEY_loss_interval`.
    """

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
# Decimals of the official metric's numbers: SQuAD's are percentages, Natural Questions' are fractions.
METRIC_DIGITS = {"squad": 2, "natural_questions": 4}


class Result(Protocol):
    """What a model reaches on a file at given thresholds. predictions: in the official evaluator's format."""

    @property
    def predictions(self) -> Any: ...

    def scores(self) -> dict[str, Any]:
        """The model's scores as report.json has them: each Score's key, in percent or None, and more."""

    def losses(self, pruned: Self) -> dict[str, Any]:
        """Points lost from this result to the pruned model's on the same file, with 95% intervals."""


class Prepared(Protocol):
    """A file's examples, cut into windows once and then used for every model. Its length: of questions.

    windows: each has a length, input_ids and token_type_ids.
    """

    @property
    def windows(self) -> Sequence[Any]: ...

    def __len__(self) -> int: ...

    def arrival_lengths(self) -> list[int]:
        """The windows' lengths in tokens, in arrival order."""

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        """The thresholds under which `model` scores best here, by the config's field that keeps each."""

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The best thresholds, with every other field of the config that is chosen on these examples."""

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> Result:
        """The result of `model`, which runs packed meanwhile, on all processes."""


class Task(Protocol):
    """A task with its options. Only the task itself knows the type of its examples."""

    @property
    def faults(self) -> DataFaults:
        """What was left out of the files that were read, or put right in them."""

    @property
    def thresholds(self) -> tuple[str, ...]:
        """The config's fields that hold thresholds; a config that lacks one means 0.0."""

    def start_model(self, source: str) -> PreTrainedModel:
        """A model to fine-tune from an encoder, with new heads where the encoder has none."""

    def check_model(self, model: PreTrainedModel) -> None:
        """ValueError where the model is not for this task."""

    def read(self, source: Path | str, split: str) -> Any:
        """The examples of a file, to judge models on."""

    def read_training(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        """(training examples, held-out examples or None): examples are held out if there is no validation
        file."""

    def describe(self, examples: Any) -> str:
        """How many examples there are, and of what."""

    def prepare(self, examples: Any, tokenizer: PreTrainedTokenizerFast) -> Prepared:
        """The examples with their windows, to judge models on."""

    def features(self, examples: Any, tokenizer: PreTrainedTokenizerFast) -> Sequence[dict[str, Any]]:
        """The examples' windows with LABELS, to train on, as dictionaries that `pad_batch` takes."""


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch for a model that is not to compute a loss."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def is_labelled(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has what a loss on labels needs: labels, or the start and the end of answers."""
    return "labels" in batch or ("start_positions" in batch and "end_positions" in batch)


def own_thresholds(model: PreTrainedModel, task: Task) -> dict[str, float]:
    """The thresholds in the model's config."""
    return {name: float(getattr(model.config, name, 0.0)) for name in task.thresholds}


def model_logits(model: PreTrainedModel, batch_size: int, windows: Sequence[Any]) -> list[Any]:
    """`predict_logits` with the model's padding token, and with a progress bar on the main process."""
    return predict_logits(model, windows, batch_size, model.config.pad_token_id, progress=is_main())
