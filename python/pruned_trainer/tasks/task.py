"""What a pruning job asks of its task: models, data, thresholds and scores.

The rest of a job is the same code for every task.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from pruned_ops.models.inputs import padding_id
from pruned_ops.qa.logits import predict_logits
from pruned_trainer.distributed import is_main
from pruned_trainer.tasks.faults import DataFaults

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The share of the training examples that is held out where there is no validation file.
HELD_OUT = 0.05
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

    def to_json(self) -> dict[str, Any]:
        """The line as report.json lists it."""
        return self._asdict()


class Result(Protocol):
    """What a model reaches on a file at given thresholds. predictions: in the official evaluator's format."""

    @property
    def predictions(self) -> Any: ...

    def scores(self) -> dict[str, Any]:
        """The model's scores as report.json has them: each Score's key, in percent or None, and more."""

    def losses(self, pruned: Self) -> dict[str, Any]:
        """Points lost from this result to the pruned model's on the same file, with 95% intervals."""


class Prepared(Protocol):
    """A file's examples, cut into windows once and then used for every model. `len` gives their number.

    windows: each has a length, input_ids and token_type_ids. noun: what the examples are called, in the
    plural. score_lines: the lines of the result table, the main one first. metric_digits: decimals of the
    official metric's numbers (SQuAD's are percentages, Natural Questions' are fractions).
    """

    @property
    def noun(self) -> str: ...

    @property
    def score_lines(self) -> tuple[Score, ...]: ...

    @property
    def metric_digits(self) -> int: ...

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

    def start_model(self, source: str, examples: Any) -> PreTrainedModel:
        """A model to fine-tune on these examples from an encoder, with a new head where the encoder has none
        that fits them."""

    def load_model(self, source: str, takes_int8: bool = False) -> PreTrainedModel:
        """The model of a folder or a hub name, in evaluation mode; ValueError where it is not for this
        task. takes_int8: int8 weights are taken, for what only runs the model."""

    def read(self, source: Path | str, split: str) -> Any:
        """The examples of a file, to judge models on."""

    def read_training(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        """(training examples, held-out examples or None): examples are held out if there is no validation
        file."""

    def read_texts(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        """As `read_training`, of a file of texts without labels. ValueError where the task has no such
        form."""

    def to_choose_on(self, examples: Any) -> Any:
        """The part of validation examples that a run chooses between models on, where all of them would take
        too long."""

    def describe(self, examples: Any) -> str:
        """How many examples there are, and of what."""

    def prepare(
        self,
        examples: Any,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
    ) -> Prepared:
        """The examples with their windows, to judge models on.

        model: has the labels that the examples' are to be among. teacher: its outputs stand in for the labels
        of examples that have none. Errors: FormatError for a label that the model does not have.
        """

    def features(
        self, examples: Any, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> Sequence[dict[str, Any]]:
        """The examples' windows with LABELS, to train on, as dictionaries that `pad_batch` takes. model,
        errors: as for `prepare`."""

    def to_fine_tune(
        self, examples: Any, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> tuple[nn.Module, Sequence[dict[str, Any]]]:
        """(what is trained, its windows): the model itself on its `features`, or a module around it that
        makes a loss of what the model gives."""


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch for a model that is not to compute a loss."""
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that the model's forward has an argument for."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(inputs)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in inputs.items() if name in names}


def is_labelled(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has what a loss on labels needs: labels, or the start and the end of answers."""
    return "labels" in batch or ("start_positions" in batch and "end_positions" in batch)


def own_thresholds(model: PreTrainedModel, task: Task) -> dict[str, float]:
    """The thresholds in the model's config."""
    return {name: float(getattr(model.config, name, 0.0)) for name in task.thresholds}


def model_logits(model: PreTrainedModel, batch_size: int, windows: Sequence[Any]) -> list[Any]:
    """`predict_logits` with the model's padding token, and with a progress bar on the main process."""
    return predict_logits(model, windows, batch_size, padding_id(model.config), progress=is_main())
