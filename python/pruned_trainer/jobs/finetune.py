"""A dense model for a task, fine-tuned from an encoder: what pruning starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import find_encoder
from pruned_trainer.distributed import is_main, once, per_process, say
from pruned_trainer.jobs.output import OutputFolder, load_tokenizer, save_checkpoint
from pruned_trainer.jobs.settings import make_task
from pruned_trainer.tasks.natural_questions.task import NULL_RATE
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.phase import run, training_arguments
from pruned_trainer.training.trainer import PruningTrainer


@dataclass(frozen=True)
class FineTuneSettings:
    """Everything a fine-tuning is told. model: an encoder or a question-answering checkpoint, a folder or a
    hub name. batch_size: of all processes together. The others as in `PruneSettings`."""

    model: str
    train_file: Path
    out: Path
    task: str = "squad"
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 5e-5
    max_length: int = 384
    stride: int = 128
    seed: int = 0
    precision: str = "fp32"
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.learning_rate > 0 and self.batch_size > 0):
            raise ValueError(
                f"epochs ({self.epochs}), learning_rate ({self.learning_rate}) and batch_size "
                f"({self.batch_size}) must be positive"
            )


def fine_tune(settings: FineTuneSettings) -> None:
    """Train the encoder with the task's heads, those that are missing new, all weights and with the config's
    dropout; write the checkpoint to settings.out. Errors: ValueError and OSError, before any training."""
    inputs = (settings.model, settings.train_file)
    once(lambda: OutputFolder.check(settings.out, settings.overwrite, inputs))
    task = make_task(
        settings.task, settings.max_length, settings.stride, settings.seed, settings.null_rate,
        settings.num_proc, settings.skip_bad,
    )  # fmt: skip
    set_seed(settings.seed)
    examples, _ = task.read_training(settings.train_file, has_validation=True)
    tokenizer = load_tokenizer(settings.model)
    model = task.start_model(settings.model)
    find_encoder(model)  # refuses what could not be pruned afterwards
    longest = longest_sequence(model.config)
    if settings.max_length > longest:
        raise ValueError(
            f"max_length is {settings.max_length}; the model's position table allows {longest} tokens"
        )
    say(f"tokenising {task.describe(examples)}")
    features = task.features(examples, tokenizer)
    folder = once(lambda: OutputFolder(settings.out, settings.overwrite, inputs))
    steps = max(1, round(settings.epochs * len(features) / settings.batch_size))
    more = {name: True for name in ("bf16", "fp16") if name == settings.precision}
    train(
        model,
        features,
        folder.partial,
        steps,
        settings.batch_size,
        settings.learning_rate,
        settings.seed,
        **more,
    )
    if is_main():
        save_checkpoint(model, folder.partial, settings.model, tokenizer)
    once(folder.publish)


def train(
    model: PreTrainedModel,
    features: Sequence[dict[str, Any]],
    folder: Path,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    **more: Any,
) -> None:
    """Train a model on the task's own loss, in place. more: TrainingArguments."""
    logging.set_verbosity_error()
    say(f"fine-tuning: {steps} steps of {batch_size} windows")
    trainer = PruningTrainer(
        model,
        training_arguments(folder, steps, per_process(batch_size), rate, seed, **more),
        Distillation.none(),
        train_dataset=features,
        data_collator=partial(pad_batch, pad_token_id=model.config.pad_token_id),
    )
    run(trainer, "teacher")
