"""Fine-tuning an encoder for a task, which makes the dense model that pruning starts from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from pruned_ops.checkpoints.loading import check_source, load_tokenizer
from pruned_ops.models.inputs import longest_sequence, padding_id
from pruned_ops.models.stock import find_encoder
from pruned_trainer.distributed import is_main, once, per_process, say
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.jobs.job import check_length
from pruned_trainer.jobs.output import OutputFolder, explained_when_full, save_checkpoint
from pruned_trainer.jobs.precision import (
    COMPARED,
    faster,
    is_worth_comparing,
    step_seconds,
    timing_batches,
)
from pruned_trainer.jobs.settings_checks import places_of
from pruned_trainer.jobs.trainers import TIMING
from pruned_trainer.tasks.task import Task
from pruned_trainer.tasks.windows import Features
from pruned_trainer.training.batches import BF16_LENGTHS, pad_batch
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.phase import autocast_in, precision_of, run, training_arguments
from pruned_trainer.training.trainer import PruningTrainer


def fine_tune(settings: FineTuneSettings) -> None:
    """Train an encoder for the task, and write the checkpoint to settings.out.

    All weights train, with the config's dropout; heads that the encoder lacks start new. Errors: ValueError
    and OSError, before any training, for settings that cannot work.
    """
    inputs: tuple[str | Path, ...] = (
        settings.model,
        *places_of(settings.train_file, settings.corpus, settings.queries),
    )
    once(lambda: OutputFolder.check(settings.out, settings.overwrite, inputs))
    check_source(settings.model)
    task = settings.make_task()
    with explained_when_full(settings.out):  # which the windows that are kept on disk may find full, too
        _fine_tune(settings, task, inputs)


def _fine_tune(settings: FineTuneSettings, task: Task, inputs: Sequence[str | Path]) -> None:
    """Read, train and write, once the settings are found to work."""
    set_seed(settings.seed)
    examples, _ = task.read_training(settings.train_file, has_validation=True)
    tokenizer = load_tokenizer(settings.model)
    model = task.start_model(settings.model, examples)
    find_encoder(model)  # refuses a model that could not be pruned afterwards
    check_length(settings.max_length, model.config)
    say(f"tokenising {task.describe(examples)}")
    trained, features = task.to_fine_tune(examples, tokenizer, model)
    with once(lambda: OutputFolder(settings.out, settings.overwrite, inputs)) as folder:
        train(
            trained,
            features,
            folder.partial,
            steps=max(1, round(settings.epochs * len(features) / settings.batch_size)),
            batch_size=settings.batch_size,
            rate=settings.learning_rate,
            seed=settings.seed,
            precision=settings.precision,
        )
        if is_main():
            save_checkpoint(model, folder.partial, settings.model, tokenizer)
        once(folder.publish)


def train(
    model: nn.Module,
    features: Features,
    folder: Path,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    precision: str = "fp32",
) -> None:
    """Train a model with a config on the task's own loss, in place. precision: as in `FineTuneSettings`."""
    logging.set_verbosity_error()
    if precision == "auto":
        precision = _fastest(model, features, steps, batch_size, seed)
    say(f"fine-tuning: {steps} steps of {batch_size} windows")
    arguments = _arguments(folder, steps, batch_size, rate, seed, precision)
    run(_trainer(model, features, arguments), "teacher", resumable=False)


def _fastest(model: nn.Module, features: Features, steps: int, batch_size: int, seed: int) -> str:
    """The precision in which these steps take the least time, measured on copies of the model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not is_worth_comparing(steps, device):
        return "fp32"
    seconds = {
        precision: _step_seconds(model, features, batch_size, seed, precision) for precision in COMPARED
    }
    ratio = once(lambda: seconds["bf16"] / seconds["fp32"])  # the main process's times are everyone's
    return faster(ratio)


def _step_seconds(model: nn.Module, features: Features, batch_size: int, seed: int, precision: str) -> float:
    def build(folder: Path, steps: int) -> PruningTrainer:
        arguments = _arguments(folder, steps, batch_size, 0.0, seed, precision, **TIMING)
        return _trainer(copy.deepcopy(model), timing_batches(features, batch_size, precision), arguments)

    return step_seconds(precision, build)


def _arguments(
    folder: Path, steps: int, batch_size: int, rate: float, seed: int, precision: str, **more: Any
) -> TrainingArguments:
    return training_arguments(folder, steps, per_process(batch_size), rate, seed, precision, **more)


def _trainer(model: nn.Module, features: Features, arguments: TrainingArguments) -> PruningTrainer:
    config: Any = model.config
    rounds = arguments.bf16 and not torch.cuda.is_available()
    with autocast_in(precision_of(arguments)):
        return PruningTrainer(
            model,
            arguments,
            Distillation.none(),
            train_dataset=features,
            data_collator=partial(
                pad_batch,
                pad_token_id=padding_id(config),
                multiple=BF16_LENGTHS if rounds else 1,
                limit=longest_sequence(config),
            ),
        )
