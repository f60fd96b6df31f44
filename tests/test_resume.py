"""Runs that are stopped, killed, resumed, or shared by two processes come to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_settings, variant
from matching import trained_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from pruned_trainer import Decision, Target, choice
from pruned_trainer.prune import prune
from pruned_trainer.settings import PruneSettings
from pruned_trainer.trainer import LengthGroupedSampler, PruningTrainer, last_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("resume"), trained_model())


@pytest.fixture(scope="module")
def whole(settings: PruneSettings) -> Path:
    """The output of a run that nobody interrupts."""
    one = variant(settings, "whole", save_steps=10)
    prune(one)
    return one.out


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


@pytest.mark.parametrize(("phase", "step"), [("gates", 3), ("gates", 25), ("retrain", 25), ("retrain", 40)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    phase: str, step: int, settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, f"{phase}-{step}", save_steps=10)
    killed(one, phase, step, monkeypatch)
    assert not one.out.exists()
    report = prune(replace(one, resume=True))
    same_end(one.out, whole)
    assert {path.name for path in one.out.iterdir()} == {path.name for path in whole.iterdir()}
    assert report["plan"]["gate_steps"] == 40 and not one.out.with_name(one.out.name + ".partial").exists()


def test_several_epochs_and_a_projection_resume(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the first epoch the order of the data is another; the projection is in the checkpoint."""
    projected = replace(settings.distillation, projection=True)
    base = variant(settings, "long", distillation=projected, gate_steps=5, retrain_steps=50, save_steps=7)
    prune(base)
    one = replace(base, out=base.out.with_name("long-killed"))
    killed(one, "retrain", 45, monkeypatch)  # 600 questions are 19 steps
    prune(replace(one, resume=True))
    same_end(one.out, base.out)


def test_a_kill_while_a_checkpoint_is_written(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of it has no checkpoint's name, and the one before is still there."""
    one = variant(settings, "mid-save", save_steps=10)
    original = PruningTrainer._save_optimizer_and_scheduler

    def dies(self: Any, output_dir: str) -> None:
        if self.state.global_step == 30:
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half of")
            raise Killed
        original(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "_save_optimizer_and_scheduler", dies)
        with pytest.raises(Killed):
            prune(one)
    gates = one.out.with_name("mid-save.partial") / "gates"
    assert last_checkpoint(gates) == gates / "checkpoint-20" and (gates / "saving").is_dir()
    prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_sigkill(settings: PruneSettings, whole: Path) -> None:
    """A real one, at a moment of its own choice."""
    one = variant(settings, "sigkill", save_steps=5)
    command = [
        sys.executable, "-m", "pruned_trainer.cli", "prune", "--model", one.model, "--train-file",
        str(one.train_file), "--validation-file", str(one.validation_file), "--eval-file", str(one.eval_file),
        "--out", str(one.out), "--macs", "0.5", "--gate-steps", "40", "--retrain-steps", "40",
        "--batch-size", "32", "--learning-rate", "5e-4", "--retrain-learning-rate", "2e-3",
        "--max-length", "24", "--stride", "4", "--save-steps", "5",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    gates = one.out.with_name("sigkill.partial") / "gates"
    while process.poll() is None and last_checkpoint(gates) is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last_checkpoint(gates) is not None and not one.out.exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    decisions = [json.loads((out / "decision.json").read_text()) for out in (one.out, whole)]
    assert decisions[0] == decisions[1]


def test_resuming_what_cannot_be_resumed(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    one = variant(settings, "other", save_steps=10)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        prune(replace(one, resume=True))
    killed(one, "gates", 15, monkeypatch)
    with pytest.raises(FileExistsError, match="--resume goes on with it, --overwrite replaces it"):
        prune(one)
    with pytest.raises(ValueError, match="started with other settings: gate_learning_rate, target"):
        prune(replace(one, resume=True, target=Target(macs=0.6), gate_learning_rate=0.2))
    partial = one.out.with_name("other.partial")
    (partial / "run.json").write_text("{")
    with pytest.raises(ValueError, match="holds no run that can be resumed"):
        prune(replace(one, resume=True))
    with pytest.raises(ValueError, match="overwrite and resume contradict"):
        replace(one, resume=True, overwrite=True)
    prune(replace(one, overwrite=True, gate_steps=2, retrain_steps=0))
    assert not partial.exists() and one.out.is_dir()


def test_what_was_decided_is_not_decided_again(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "decided", save_steps=10)
    killed(one, "retrain", 5, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_joint", None)
        prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_a_kill_between_training_and_decision(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint has every step: what is left is to decide."""
    one = variant(settings, "undecided", save_steps=10)

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(choice, "_capture", dies)
        with pytest.raises(Killed):
            prune(one)
    assert last_checkpoint(one.out.with_name("undecided.partial") / "gates").name == "checkpoint-40"
    prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_a_loss_that_is_no_number_names_the_last_checkpoint(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "nan", save_steps=4)
    original = PruningTrainer.compute_loss

    def breaks(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            next(model.parameters()).data.fill_(float("nan"))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PruningTrainer, "compute_loss", breaks)
    with pytest.raises(FloatingPointError, match=r"at step 6 with learning rate .*gates/checkpoint-4"):
        prune(one)


def test_the_sampler_s_order_is_its_seed_and_epoch() -> None:
    lengths = [5 + (7 * i) % 40 for i in range(103)]
    sampler = LengthGroupedSampler(lengths, 8, seed=1)
    first = list(sampler)
    assert first == list(sampler) and len(set(first)) == len(first) == len(sampler) == 96
    assert max(lengths) in [lengths[i] for i in first[:8]] and set(first) <= set(range(103))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert first != list(LengthGroupedSampler(lengths, 8, seed=2))
    groups = [[lengths[j] for j in first[i : i + 8]] for i in range(0, 96, 8)]
    spread = [max(group) - min(group) for group in groups]
    assert sum(spread) / len(spread) < 20  # of 40
    assert sorted(LengthGroupedSampler([3, 1], 8, seed=0)) == [0, 1]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_two_processes_equal_one(settings: PruneSettings, whole: Path) -> None:
    """Half of each batch on each of two gloo processes: the same loss curve within rounding, the same
    decision; one writes."""
    out = settings.out.with_name("two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "pruned_trainer.cli", "prune", "--model", settings.model, "--train-file",
        str(settings.train_file), "--validation-file", str(settings.validation_file), "--eval-file",
        str(settings.eval_file), "--out", str(out), "--macs", "0.5", "--gate-steps", "40",
        "--retrain-steps", "40", "--batch-size", "32", "--learning-rate", "5e-4",
        "--retrain-learning-rate", "2e-3", "--max-length", "24", "--stride", "4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    path = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("decided, heads/FFN width") == 1  # one speaks
    reports = [json.loads((place / "report.json").read_text()) for place in (out, whole)]
    for phase in ("gates", "retrain"):
        curves = [losses(report["training"][phase]) for report in reports]
        assert len(curves[0]) == len(curves[1]) > 5
        assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-4), phase
    kept = [
        [(layer.heads.indices, layer.ffn.indices) for layer in Decision.load(place / "decision.json").layers]
        for place in (out, whole)
    ]
    assert kept[0] == kept[1]
    assert reports[0]["dense"]["f1"] == reports[1]["dense"]["f1"]  # gathered from both
    assert reports[0]["pruned"]["f1_span"] == pytest.approx(reports[1]["pruned"]["f1_span"], abs=3)
    assert not out.with_name("two.partial").exists()
    shutil.rmtree(out)
