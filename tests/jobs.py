"""A small trained model and files on disk, and settings that prune it in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from matching import save_checkpoint, squad_file
from transformers import BertForQuestionAnswering

from pruned_trainer import Target
from pruned_trainer.settings import PruneSettings


def job_settings(folder: Path, model: BertForQuestionAnswering) -> PruneSettings:
    """A job on the matching task: 40 steps a phase, half of the MACs."""
    return PruneSettings(
        model=str(save_checkpoint(model, folder / "model")),
        train_file=squad_file(folder / "train.json", 600, 1),
        validation_file=squad_file(folder / "validation.json", 60, 2, unanswerable=0.3),
        eval_file=squad_file(folder / "eval.json", 100, 3, unanswerable=0.3),
        out=folder / "out",
        command="pruned-trainer prune --as-a-test",
        target=Target(macs=0.5),
        gate_steps=40,
        retrain_steps=40,
        batch_size=32,
        learning_rate=5e-4,
        retrain_learning_rate=2e-3,
        max_length=24,
        stride=4,
    )


def variant(settings: PruneSettings, name: str, **changes: Any) -> PruneSettings:
    """The same job with other settings, into a folder of its own."""
    return replace(settings, out=settings.out.with_name(name), **changes)
