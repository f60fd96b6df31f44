"""The settings of a fine-tuning: every option with its default, checked before anything is loaded.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pruned_trainer.jobs.settings import make_task
from pruned_trainer.jobs.settings_checks import check_finite, check_precision
from pruned_trainer.tasks.options import NULL_RATE, STRIDE, TaskOptions

if TYPE_CHECKING:
    from pruned_trainer.tasks.task import Task


@dataclass(frozen=True)
class FineTuneSettings:
    """Everything that decides what a fine-tuning does.

    model: an encoder or a checkpoint with a head, a folder or a hub name. batch_size: counts the
    examples of all processes together. The other fields are as in `PruneSettings`.
    """

    model: str
    train_file: Path
    out: Path
    task: str = "squad"
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 5e-5
    max_length: int = 384
    stride: int = STRIDE
    seed: int = 0
    precision: str = "auto"
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    scores: str | None = None
    corpus: Path | None = None
    queries: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_finite(self)
        if not (self.epochs > 0 and self.learning_rate > 0 and self.batch_size > 0):
            raise ValueError(
                f"epochs ({self.epochs}), learning_rate ({self.learning_rate}) and batch_size "
                f"({self.batch_size}) must be positive"
            )
        check_precision(self.precision)
        TaskOptions.of(self)  # which checks them

    def make_task(self) -> Task:
        """The task, with the options that these settings have for it."""
        return make_task(TaskOptions.of(self))
