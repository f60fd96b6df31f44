"""Fine-tuning an encoder for a task, which makes the dense model that pruning starts from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from pruned_ops.checkpoints.loading import check_source
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import find_encoder
from pruned_trainer.distributed import is_main, once, per_process, say
from pruned_trainer.jobs.job import check_length
from pruned_trainer.jobs.output import OutputFolder, explained_when_full, load_tokenizer, save_checkpoint
from pruned_trainer.jobs.settings import FineTuneSettings
from pruned_trainer.training.batches import BF16_LENGTHS, Features, pad_batch
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.phase import run, training_arguments
from pruned_trainer.training.trainer import PruningTrainer


def fine_tune(settings: FineTuneSettings) -> None:
    """Train an encoder for the task, and write the checkpoint to settings.out.

    All weights train, with the config's dropout; heads that the encoder lacks start new. Errors: ValueError
    and OSError, before any training, for settings that cannot work.
    """
    inputs = (settings.model, settings.train_file, settings.corpus, settings.queries)
    once(lambda: OutputFolder.check(settings.out, settings.overwrite, inputs))
    check_source(settings.model)
    task = settings.make_task()
    set_seed(settings.seed)
    examples, _ = task.read_training(settings.train_file, has_validation=True)
    tokenizer = load_tokenizer(settings.model)
    model = task.start_model(settings.model, examples)
    find_encoder(model)  # refuses a model that could not be pruned afterwards
    check_length(settings.max_length, model.config)
    say(f"tokenising {task.describe(examples)}")
    trained, features = task.to_fine_tune(examples, tokenizer, model)
    with (
        explained_when_full(settings.out),
        once(lambda: OutputFolder(settings.out, settings.overwrite, inputs)) as folder,
    ):
        train(
            trained,
            features,
            folder.partial,
            steps=max(1, round(settings.epochs * len(features) / settings.batch_size)),
            batch_size=settings.batch_size,
            rate=settings.learning_rate,
            seed=settings.seed,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
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
    **more: Any,
) -> None:
    """Train a model with a config on the task's own loss, in place. more: fields of TrainingArguments."""
    config: Any = model.config
    logging.set_verbosity_error()
    rounds = more.get("bf16") and not torch.cuda.is_available()
    say(f"fine-tuning: {steps} steps of {batch_size} windows")
    trainer = PruningTrainer(
        model,
        training_arguments(folder, steps, per_process(batch_size), rate, seed, **more),
        Distillation.none(),
        train_dataset=features,
        data_collator=partial(
            pad_batch,
            pad_token_id=config.pad_token_id,
            multiple=BF16_LENGTHS if rounds else 1,
            limit=longest_sequence(config),
        ),
    )
    run(trainer, "teacher", resumable=False)
