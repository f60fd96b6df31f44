"""The trainer of one phase of a run, by the run's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from pruned_ops.files import read_json, write_json
from pruned_trainer.distributed import is_main, per_process
from pruned_trainer.jobs.job import Clock, Job
from pruned_trainer.jobs.output import OutputFolder
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.training.averaging import WeightAverage
from pruned_trainer.training.batches import BF16_LENGTHS
from pruned_trainer.training.callbacks import tensorboard_writer
from pruned_trainer.training.phase import autocast_in, training_arguments
from pruned_trainer.training.trainer import PruningTrainer, check_arguments

# The training arguments of a trainer whose steps are only timed.
TIMING: dict[str, Any] = {
    "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [],
}  # fmt: skip
# What a run decides itself, whatever the caller's training arguments say: it evaluates at its end, trains on
# batches that have their columns, and keeps the last checkpoint of a phase, whole, until its output is whole.
OWN_ARGUMENTS: dict[str, Any] = {
    "eval_strategy": "no", "do_eval": False, "eval_on_start": False, "load_best_model_at_end": False,
    "push_to_hub": False, "remove_unused_columns": False, "resume_from_checkpoint": None,
    "save_total_limit": None, "save_only_model": False, "ignore_data_skip": False,
}  # fmt: skip
# Beside a phase's checkpoints: the seconds that the run had taken at the last of them.
_SECONDS = "seconds.json"


def check_callers_arguments(args: TrainingArguments, model: nn.Module) -> None:
    """ValueError for a caller's training arguments that ask for what a run, or the model, does not do."""
    check_arguments(args)
    if args.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"gradient_checkpointing: a {type(model).__name__} has no gradient_checkpointing_enable, which "
            "models of transformers have: leave it out"
        )
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end chooses by evaluations on the way, and models are judged at the end "
            "alone: leave it out"
        )
    if args.push_to_hub:
        raise ValueError("push_to_hub: nothing is uploaded here; leave it out, and push the result's model")


def steps_asked(args: TrainingArguments, rows: int, batch_size: int) -> int:
    """The steps that training arguments ask for, of so many rows in batches of so many."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * rows / batch_size)


def build_trainer(
    job: Job,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    steps: int,
    phase: GatePhase | None,
    kept_hidden: Sequence[int] | None = None,
    timing: bool = False,
    average: WeightAverage | None = None,
) -> PruningTrainer:
    """A trainer with this run's settings for `steps` steps, with gates or (`phase` None) without.

    kept_hidden, average: as for `PruningTrainer`. timing: the trainer only serves to time its steps, so it
    takes the features in their order and writes nothing.
    """
    settings = job.settings
    rate = settings.learning_rate if phase else settings.retrain_learning_rate
    distillation = settings.distillation_in("gates" if phase else "retrain")
    distillation = replace(distillation, pooling=job.pooling)
    rounds = settings.precision == "bf16" and job.device.type == "cpu"
    with autocast_in(settings.precision):
        trainer = PruningTrainer(
            model,
            _arguments(job, folder, steps, rate, phase, timing),
            distillation,
            teacher=teacher if distillation.needs_teacher else None,
            gate_phase=phase,
            cache=job.cache,
            kept_hidden=kept_hidden,
            task_loss=job.task_loss,
            average=average,
            train_dataset=job.gate_train if phase else job.retrain_data,
            data_collator=partial(job.collate, multiple=BF16_LENGTHS) if rounds else job.collate,
        )
    if not timing:
        trainer.add_callback(_KeepTime(job.clock, folder / _SECONDS))
    if settings.tensorboard and not timing and is_main():
        partial_folder = OutputFolder.partial_of(settings.out)
        place = folder.relative_to(partial_folder)  # of a gradual sweep's gates: in their stage's folder
        trainer.add_callback(tensorboard_writer(partial_folder / "tensorboard" / place))
    return trainer


class _KeepTime(TrainerCallback):
    """Writes the seconds that the run has taken, with each checkpoint."""

    def __init__(self, clock: Clock, file: Path) -> None:
        self.clock, self.file = clock, file

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.file, {"seconds": self.clock.seconds()})


def seconds_taken(partial: Path) -> float:
    """The seconds that an interrupted run had taken at its last checkpoint, by what is in its folder; 0 where
    there is none. Errors: ValueError for a file that says something else."""
    latest = 0.0
    for file in partial.rglob(_SECONDS):
        recorded = read_json(file, "record of a run's time")
        seconds = recorded.get("seconds") if isinstance(recorded, dict) else None
        if not isinstance(seconds, (int, float)):
            raise ValueError(f"{file} is no record of a run's time; --resume goes on without it")
        latest = max(latest, float(seconds))
    return latest


def _arguments(
    job: Job, folder: Path, steps: int, rate: float, phase: GatePhase | None, timing: bool
) -> TrainingArguments:
    """The training arguments of a phase: those of the settings, or the caller's with the run's own steps,
    rate and folder."""
    settings = job.settings
    more: dict[str, Any] = TIMING if timing else {"save_strategy": "steps", "save_steps": settings.save_steps}
    # With the gates' seed the retraining would begin with the windows that they have had, in the same order.
    seed = settings.seed if phase else settings.seed + 1
    if job.arguments is not None:
        warm = job.arguments.warmup_steps
        if warm >= 1:  # the same part of this phase as of the steps of all; below 1 it is a part already
            every = steps_asked(job.arguments, len(job.train), settings.train_batch)
            warm = min(round(warm * steps / max(every, 1)), steps)
        overrides: dict[str, Any] = {
            "max_steps": steps, "learning_rate": rate, "seed": seed, "output_dir": str(folder),
            "warmup_steps": warm, "bf16": settings.precision == "bf16", "fp16": settings.precision == "fp16",
            **OWN_ARGUMENTS, **more,
        }  # fmt: skip
        return replace(job.arguments, **overrides)
    return training_arguments(
        folder,
        steps,
        per_process(settings.train_batch),
        rate,
        seed,
        settings.precision,
        torch_compile=settings.compile and phase is None,
        **more,
    )
