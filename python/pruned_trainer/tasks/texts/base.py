"""What the tasks on rows of texts have in common: their options, how they read texts, and what they do about
bad rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import head_of, load_any_head
from pruned_trainer.tasks.faults import DataFaults, Skipped
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts.examples import Examples, read_unlabelled


@dataclass(frozen=True)
class TextTask:
    """A task whose data are rows with texts. A subclass says what a row is (`read`, `prepare`, `features`),
    and which head the task needs: the end of the model's class."""

    options: TaskOptions
    faults: DataFaults = field(default_factory=DataFaults, init=False, compare=False, repr=False)

    head: ClassVar[str]
    thresholds: ClassVar[tuple[str, ...]] = ()
    # Whether the model reads the texts of a row together.
    reads_pairs: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the texts where there are no labels."""
        raise NotImplementedError

    def read(self, source: Path | str, split: str) -> Any:
        raise NotImplementedError

    def features(
        self, examples: Any, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        raise NotImplementedError

    # -- models ------------------------------------------------------------------------------------------

    def load_model(self, source: str, takes_int8: bool = False) -> PreTrainedModel:
        """The model, with the task's head; ValueError, with what makes the right one, for any other."""
        model = load_any_head(source, takes_int8)
        if head_of(model.config) != self.head:
            class_name, task = type(model).__name__, self.options.task
            raise ValueError(
                f"the model is a {class_name}, and {task} needs one whose class ends in {self.head}: "
                f"pruned-trainer finetune --task {task} makes one"
            )
        self.check_model(model, source)
        return model

    def check_model(self, model: PreTrainedModel, source: str) -> None:
        """ValueError for a model with the right head that the task cannot use."""

    # -- data --------------------------------------------------------------------------------------------

    @contextmanager
    def skipping_bad(self) -> Iterator[Skipped | None]:
        """What collects the faults of bad rows inside the block, which are then counted; None, so that the
        first one is raised, where they are not to be left out."""
        skipped = Skipped() if self.options.skip_bad else None
        yield skipped
        self.faults.add(skipped)

    def read_training(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        """The training examples; without a validation file, 5% of them (or of their units) are held out."""
        train = self.read(source, "train")
        return (train, None) if has_validation else train.split(self.options.seed)

    def read_texts(self, source: Path, has_validation: bool) -> tuple[Examples, Examples | None]:
        """As `read_training`, of texts without labels."""
        with self.skipping_bad() as skipped:
            unlabelled = read_unlabelled(source, "train", self.columns, skipped, self.reads_pairs)
            texts = self.of_texts(unlabelled)
        return (texts, None) if has_validation else texts.split(self.options.seed)

    def to_choose_on(self, examples: Any) -> Any:
        """All of them."""
        return examples

    def of_texts(self, texts: Examples) -> Examples:
        """The task's examples of texts without labels."""
        return texts

    def to_fine_tune(
        self, examples: Any, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The model itself on its `features`."""
        return model, self.features(examples, tokenizer, model)
