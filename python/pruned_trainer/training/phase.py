"""What every training here has in common: arguments, batches, the student's preparation, the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from pruned_ops.models.stock import find_encoder
from pruned_trainer.distributed import on_any
from pruned_trainer.training.callbacks import stop_on_interrupt
from pruned_trainer.training.distillation import Projection
from pruned_trainer.training.trainer import PruningTrainer, last_checkpoint


class InterruptedTraining(KeyboardInterrupt):
    """Training was stopped by the user; the text says where the checkpoint is."""


def run(trainer: PruningTrainer, name: str) -> list[dict[str, Any]]:
    """Train (on from the last checkpoint, if the folder has one), and return the trainer's log.

    After a Ctrl-C: InterruptedTraining, with a checkpoint written.
    """
    folder = Path(str(trainer.args.output_dir))
    start = last_checkpoint(folder)
    with stop_on_interrupt() as stopper:
        trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if on_any(stopper.requested):
        step = trainer.state.global_step
        where = folder / f"checkpoint-{step}"
        if not where.exists():  # the request came after the last step's end
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        how = "" if name == "teacher" else "; the same command with --resume goes on from it"
        raise InterruptedTraining(
            f"stopped in the {name} phase after step {step}; its checkpoint is {where}{how}"
        )
    assert trainer.model is not None
    Projection.detach(trainer.model)
    without_autocast(trainer.model)
    return trainer.state.log_history


def without_autocast(model: nn.Module) -> None:
    """Take off the forward that Accelerate put on the model to train it under autocast: what it is scored and
    timed in afterwards is its own dtype."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def training_arguments(
    folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int, **more: Any
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
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": False,  # said, because the default follows transformers' log level
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Said, because several processes without a GPU would not find each other else.
        "use_cpu": not torch.cuda.is_available(),
        # Every parameter takes part in every step, but some (multipliers, projection) outside the model's
        # forward, where a search for unused ones would not see them.
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**{**values, **more})


def prepare_student(model: nn.Module, dropout: float, train_embeddings: bool) -> None:
    """Set every dropout of `model`, and freeze its word embeddings unless they are to be trained.

    Dropout is off by default: the teacher's soft targets regularise, and on CPU it costs the fused attention
    (3x).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    find_encoder(model).embeddings.word_embeddings.weight.requires_grad_(train_embeddings)
