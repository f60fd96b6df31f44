"""A small trained model and files on disk, settings that prune it in seconds, and runs that are killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForQuestionAnswering, TrainerCallback

from matching import save_checkpoint, squad_file
from pruned_trainer import Target
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.jobs.settings_checks import has_batches
from pruned_trainer.training.trainer import PruningTrainer


def job_settings(folder: Path, model: BertForQuestionAnswering) -> PruneSettings:
    """A job on the matching task: 40 steps a phase, half of the MACs."""
    return PruneSettings(
        model=str(save_checkpoint(model, folder / "model")),
        train_file=squad_file(folder / "train.json", 600, 1),
        validation_file=squad_file(folder / "validation.json", 60, 2, unanswerable=0.3),
        eval_file=squad_file(folder / "eval.json", 100, 3, unanswerable=0.3),
        out=folder / "out",
        command="pruned-trainer prune --as-a-test",
        targets=(Target(macs=0.5),),
        gate_steps=40,
        retrain_steps=40,
        batch_size=32,
        learning_rate=5e-4,
        retrain_learning_rate=2e-3,
        max_length=24,
        stride=4,
    )


def changed(settings: PruneSettings, **changes: Any) -> PruneSettings:
    """The same job with other settings, without the rates of trainings that it has no more, nor a batch size
    where it has no batches."""
    names = ("learning_rate", "retrain_learning_rate", "batch_size")
    rates = {name: getattr(PruneSettings, name) for name in names}
    plain = replace(settings, **{**rates, **changes})
    has_use = {
        "learning_rate": plain.trains_weights_with_gates, "retrain_learning_rate": plain.retrains,
        "batch_size": has_batches(plain),
    }  # fmt: skip
    kept = {name: getattr(settings, name) for name in has_use if has_use[name] and name not in changes}
    return replace(plain, **kept)


def variant(settings: PruneSettings, name: str, **changes: Any) -> PruneSettings:
    """The same job with other settings, into a folder of its own."""
    return changed(settings, out=settings.out.with_name(name), **changes)


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def command(one: PruneSettings, *more: str) -> list[str]:
    """The command line of a job."""
    gates = [] if one.gate_steps is None else ["--gate-steps", str(one.gate_steps)]
    return [
        "-m", "pruned_trainer.cli", "prune", "--model", one.model, "--train-file", str(one.train_file),
        "--validation-file", str(one.validation_file), "--eval-file", str(one.eval_file), "--out",
        str(one.out), "--macs", "0.5", *gates, "--retrain-steps", str(one.retrain_steps),
        "--batch-size", "32", "--learning-rate", str(one.learning_rate),
        "--retrain-learning-rate", str(one.retrain_learning_rate), "--max-length", "24", "--stride", "4",
        "--save-steps", str(one.save_steps), *more,
    ]  # fmt: skip


def same_end(one: Path, other: Path) -> None:
    """The same decision and the same weights, bit for bit."""
    assert (one / "decision.json").read_text() == (other / "decision.json").read_text()
    mine, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name


class Killed(Exception):
    """Stands for a process that is gone."""


class _KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def killed(one: PruneSettings, phase: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until this step of this phase."""
    original = PruningTrainer.__init__

    def with_end(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (self.gate_phase is not None) == (phase == "gates"):
            self.add_callback(_KillAt(step))

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "__init__", with_end)
        with pytest.raises(Killed):
            prune(one)
