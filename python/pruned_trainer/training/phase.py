"""A phase of training, whatever it trains: its arguments, the preparation of the model, and the run
itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from pruned_ops.models.stock import find_encoder, words_of
from pruned_trainer.distributed import on_any
from pruned_trainer.pruning.compact import without_autocast
from pruned_trainer.training.callbacks import stop_on_interrupt
from pruned_trainer.training.distillation_losses import HiddenProjection
from pruned_trainer.training.trainer import PruningTrainer, last_checkpoint

# Where Accelerate, and TrainingArguments that say nothing of it, read in what precision to train.
_AUTOCAST = "ACCELERATE_MIXED_PRECISION"
# The entries that the Trainer logged, in order.
Log = list[dict[str, Any]]


class InterruptedTraining(KeyboardInterrupt):
    """Training was stopped by the user; the text says where the checkpoint is."""


def run(trainer: PruningTrainer, name: str, resumable: bool = True) -> Log:
    """Train, from the last checkpoint on if the folder has one, and return the trainer's log.

    name: the phase, for messages. resumable: whether the command has a --resume that goes on from a
    checkpoint. Errors: InterruptedTraining after a Ctrl-C, with a checkpoint written.
    """
    folder = Path(str(trainer.args.output_dir))
    start = last_checkpoint(folder)
    with stop_on_interrupt() as stopper:
        trainer.add_callback(stopper)
        trainer.train_from(start)
    if on_any(stopper.requested):
        step = trainer.state.global_step
        checkpoint = folder / f"checkpoint-{step}"
        if not checkpoint.exists():  # the request came after the last step's end
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        remedy = "; the same command with --resume goes on from it" if resumable else ""
        raise InterruptedTraining(
            f"stopped in the {name} phase after step {step}; its checkpoint is {checkpoint}{remedy}"
        )
    assert trainer.model is not None
    HiddenProjection.detach(trainer.model)
    without_autocast(trainer.model)
    return trainer.state.log_history


def precision_of(arguments: TrainingArguments) -> str:
    """What these train in: fp32, bf16 or fp16. Where they say nothing, what a launcher set (`accelerate
    launch --mixed_precision`), which transformers 5 notes in them."""
    launched = getattr(arguments, "mixed_precision", "no")
    named = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else launched
    return "fp32" if named == "no" else named


@contextmanager
def autocast_in(precision: str) -> Iterator[None]:
    """Training arguments and trainers that are made inside the block are of this precision. TrainingArguments
    and Accelerate read it in the environment as well, where a launcher, or transformers 4 for an earlier
    training, has left another: that is there again after the block, for the caller's own trainings."""
    before = os.environ.get(_AUTOCAST)
    os.environ[_AUTOCAST] = precision if precision in ("bf16", "fp16") else "no"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_AUTOCAST]
        else:
            os.environ[_AUTOCAST] = before


def training_arguments(
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    precision: str = "fp32",
    **more: Any,
) -> TrainingArguments:
    """Warm-up and linear decay, batches of like lengths, progress bars. batch_size: of one process."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.01,
        "seed": seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": False,  # given, because the default follows transformers' log level
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Given, because several processes without a GPU would not find each other otherwise.
        "use_cpu": not torch.cuda.is_available(),
        # Every parameter takes part in every step, but the projection outside the model's forward, where a
        # search for unused ones would not see it.
        "ddp_find_unused_parameters": False,
    }
    with autocast_in(precision):
        return TrainingArguments(**{**values, **more})


@contextmanager
def trained_as(model: nn.Module, dropout: float, train_embeddings: bool) -> Iterator[None]:
    """Inside the block the model is as `prepare_student` makes it. After it, its dropout and what of it
    trains are as before, for whoever trains it next."""
    dropouts = [(module, field, getattr(module, field)) for module, field in _dropouts(model)]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    prepare_student(model, dropout, train_embeddings)
    try:
        yield
    finally:
        for module, field, before in dropouts:
            setattr(module, field, before)
        for parameter, did_train in trains:
            parameter.requires_grad_(did_train)


def prepare_student(model: nn.Module, dropout: float, train_embeddings: bool) -> None:
    """Set every dropout of `model`, and freeze its word embeddings unless they are to be trained, and the
    pooler of a bare encoder, which nothing reads.

    Dropout is off by default: the teacher's soft targets regularise already, and on a CPU dropout rules out
    the fused attention, which is 3 times as fast.
    """
    for module, field in _dropouts(model):
        setattr(module, field, dropout)
    encoder = find_encoder(model)
    words_of(encoder).weight.requires_grad_(train_embeddings)
    if encoder is model and getattr(encoder, "pooler", None) is not None:
        encoder.pooler.requires_grad_(False)


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each module with a dropout, and the name of the field that holds it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        elif isinstance(vars(module).get("attention_dropout"), (float, int)):  # as ModernBERT's attention has
            yield module, "attention_dropout"
