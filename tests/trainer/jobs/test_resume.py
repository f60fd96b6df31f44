"""Runs that are killed and resumed come to the same end as others, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import Killed, changed, command, job_settings, killed, losses, same_end, variant
from matching import trained_model
from pruned_trainer import Target
from pruned_trainer.cli import main
from pruned_trainer.jobs import choice
from pruned_trainer.jobs import prune as prune_module
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.trainer import PruningTrainer, last_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    base = job_settings(tmp_path_factory.mktemp("resume"), trained_model())
    return replace(base, gate_steps=24, retrain_steps=24)


@pytest.fixture(scope="module")
def whole(settings: PruneSettings) -> Path:
    """The output of a run that nobody interrupts."""
    one = variant(settings, "whole", save_steps=6)
    prune(one)
    return one.out


@pytest.mark.parametrize(("phase", "step"), [("gates", 3), ("gates", 15), ("retrain", 15), ("retrain", 24)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    phase: str, step: int, settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, f"{phase}-{step}", save_steps=6)
    killed(one, phase, step, monkeypatch)
    assert not one.out.exists()
    report = prune(replace(one, resume=True))
    same_end(one.out, whole)
    assert {path.name for path in one.out.iterdir()} == {path.name for path in whole.iterdir()}
    assert report["plan"]["gate_steps"] == 24 and not one.out.with_name(one.out.name + ".partial").exists()


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
    one = variant(settings, "mid-save", save_steps=6)
    original = PruningTrainer._save_optimizer_and_scheduler

    def dies(self: Any, output_dir: str) -> None:
        if self.state.global_step == 18:
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half of")
            raise Killed
        original(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "_save_optimizer_and_scheduler", dies)
        with pytest.raises(Killed):
            prune(one)
    gates = one.out.with_name("mid-save.partial") / "gates"
    assert last_checkpoint(gates) == gates / "checkpoint-12" and (gates / "saving").is_dir()
    prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_sigkill(settings: PruneSettings, whole: Path) -> None:
    """A real one, at a moment of its own choice."""
    one = variant(settings, "sigkill", save_steps=5)
    process = subprocess.Popen(
        [sys.executable, *command(one)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    gates = one.out.with_name("sigkill.partial") / "gates"
    while process.poll() is None and last_checkpoint(gates) is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last_checkpoint(gates) is not None and not one.out.exists()
    assert main(command(one, "--resume")[2:]) == 0
    decisions = [json.loads((out / "decision.json").read_text()) for out in (one.out, whole)]
    assert decisions[0] == decisions[1]


def test_resuming_what_cannot_be_resumed(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    one = variant(settings, "other", save_steps=6)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        prune(replace(one, resume=True))
    killed(one, "gates", 15, monkeypatch)
    with pytest.raises(FileExistsError, match="--resume goes on with it, --overwrite replaces it"):
        prune(one)
    with pytest.raises(ValueError, match="started with other settings: gate_learning_rate, target"):
        prune(replace(one, resume=True, targets=(Target(macs=0.6),), gate_learning_rate=0.2))
    partial = one.out.with_name("other.partial")
    for path in (Path(one.train_file), Path(one.model) / "model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        with pytest.raises(
            ValueError, match=rf"{path.parent.name}.* changed since .*: put back what was there"
        ):
            prune(replace(one, resume=True))
        path.write_bytes(content)
    (partial / "run.json").write_text("{")
    with pytest.raises(ValueError, match="holds no run that can be resumed"):
        prune(replace(one, resume=True))
    prune(changed(one, overwrite=True, gate_steps=2, retrain_steps=0))
    assert not partial.exists() and one.out.is_dir()


def test_what_was_decided_is_not_decided_again(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "decided", save_steps=6)
    killed(one, "retrain", 5, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "train_jointly", None)
        prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_a_kill_between_training_and_decision(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint has every step: what is left is to decide."""
    one = variant(settings, "undecided", save_steps=6)

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(choice, "decide_for", dies)
        with pytest.raises(Killed):
            prune(one)
    assert last_checkpoint(one.out.with_name("undecided.partial") / "gates").name == "checkpoint-24"
    prune(replace(one, resume=True))
    same_end(one.out, whole)


def test_an_output_that_is_to_be_replaced_can_be_resumed(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "replaced", save_steps=6, overwrite=True)
    one.out.mkdir()
    (one.out / "old").touch()
    killed(one, "gates", 15, monkeypatch)
    assert (one.out / "old").is_file()
    report = prune(replace(one, resume=True))
    same_end(one.out, whole)
    assert not (one.out / "old").exists() and report["training"]["gates"]


def test_what_an_interrupted_run_took_and_logged_is_reported(
    settings: PruneSettings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "logged", save_steps=6)
    killed(one, "retrain", 5, monkeypatch)
    record = one.out.with_name("logged.partial") / "choice.json"
    took = json.loads(record.read_text())
    record.write_text(json.dumps({**took, "seconds": took["seconds"] + 600}))
    training = prune(replace(one, resume=True))["training"]
    uninterrupted = json.loads((whole / "report.json").read_text())["training"]
    assert losses(training["gates"]) == losses(uninterrupted["gates"]) and training["minutes"] > 10


@pytest.mark.parametrize("phase", ["gates", "retrain"])
def test_the_time_until_the_last_checkpoint_is_counted(
    phase: str, settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either phase; what has another form is refused by name."""
    one = variant(settings, f"timed-{phase}", save_steps=2)
    killed(one, phase, 5, monkeypatch)
    record = one.out.with_name(f"{one.out.name}.partial") / phase / "seconds.json"
    seconds = json.loads(record.read_text())["seconds"]
    record.write_text("[]")
    with pytest.raises(ValueError, match="seconds.json is no record of a run's time"):
        prune(replace(one, resume=True))
    record.write_text(json.dumps({"seconds": seconds + 600}))
    assert 0 < seconds < 600 < 60 * prune(replace(one, resume=True))["training"]["minutes"]


def test_a_sweep_resumes(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second model trains: the first is not trained again, and the end is the same. Its
    minutes are those until its own end, and not those of what came later."""
    targets = (Target(macs=0.7), Target(macs=0.5))
    base = variant(settings, "swept", targets=targets, retrain_steps=10)
    sweep(base)
    one = replace(base, out=base.out.with_name("swept-killed"), save_steps=4)
    original, seen = prune_module.retrain, []

    def dies(job: Any, narrow: Any, folder: Path, *rest: Any) -> Any:
        seen.append(folder.name)
        if len(seen) == 2:
            raise Killed
        return original(job, narrow, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "retrain", dies)
        with pytest.raises(Killed):
            sweep(one)
    assert seen == ["retrain-macs-0.7", "retrain-macs-0.5"]
    with pytest.raises(ValueError, match="other settings: targets"):
        sweep(replace(one, resume=True, targets=(Target(macs=0.7), Target(macs=0.4))))
    late = one.out.with_name("swept-killed.partial") / "retrain-macs-0.5"
    late.mkdir()
    (late / "seconds.json").write_text('{"seconds": 6000}')
    sweep(replace(one, resume=True))
    minutes = []
    for name in ("macs-0.7", "macs-0.5"):
        same_end(one.out / name, base.out / name)
        minutes.append(json.loads((one.out / name / "report.json").read_text())["training"]["minutes"])
    assert 0 < minutes[0] < 100 < minutes[1]


def test_hidden_gates_resume(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the projection that starts from the dimensions that were kept."""
    parts = ("heads", "ffn", "hidden")
    base = variant(
        settings, "narrowed", parts=parts, targets=(Target(params=0.3),), align=1, gate_steps=16,
        retrain_steps=16, save_steps=5,
    )  # fmt: skip
    prune(base)
    for phase in ("gates", "retrain"):
        one = replace(base, out=base.out.with_name(f"narrowed-{phase}"))
        killed(one, phase, 13, monkeypatch)
        prune(replace(one, resume=True))
        same_end(one.out, base.out)


def test_a_spoilt_model_is_not_saved(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is no number while the loss still is one must not replace the last good checkpoint."""
    one = variant(settings, "spoilt", save_steps=4)
    original = PruningTrainer._save_checkpoint

    def spoils(self: Any, model: Any, trial: Any) -> None:
        if self.state.global_step == 8:
            next(model.parameters()).data.view(-1)[0] = float("nan")
        original(self, model, trial)

    monkeypatch.setattr(PruningTrainer, "_save_checkpoint", spoils)
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 8 .*gates/checkpoint-4"):
        prune(one)


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
