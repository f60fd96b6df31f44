"""Which precision a run trains in where it is left to the run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from family_models import stock
from jobs import job_settings
from matching import trained_model
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.optimize import optimize, restore
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_ops.runtime.refusals import refuse_encoder
from pruned_trainer.cli import main
from pruned_trainer.jobs import finetune as finetune_module
from pruned_trainer.jobs import plan as plan_module
from pruned_trainer.jobs import precision as precision_module
from pruned_trainer.jobs.job import Job, open_cache, paused, running, start
from pruned_trainer.jobs.plan import make_plan
from pruned_trainer.jobs.precision import STEPS_TO_COMPARE, TIMED_STEPS, WARMUP_STEPS
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.task import without_labels
from pruned_trainer.training.attention_precision import AttentionInFp32
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.phase import autocast_in, precision_of, training_arguments


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("precision"), trained_model(steps=1))


@pytest.fixture(scope="module")
def job(settings: PruneSettings) -> Job:
    return start(replace(settings, gate_steps=STEPS_TO_COMPARE))


def times(monkeypatch: pytest.MonkeyPatch, bf16: tuple[float, float], can: bool = True) -> list[str]:
    """Let a step with gates and one without take 1 s in fp32, and these seconds in bf16; the precisions that
    are timed go into the list."""
    seen: list[str] = []

    def seconds(job: Job) -> tuple[float, float]:
        seen.append(job.settings.precision)
        return bf16 if job.settings.precision == "bf16" else (1.0, 1.0)

    monkeypatch.setattr(plan_module, "_step_seconds", seconds)
    monkeypatch.setattr(precision_module, "has_bf16", lambda: can)
    return seen


@pytest.mark.parametrize(
    ("bf16", "chosen"),
    [((0.7, 0.7), "bf16"), ((2.0, 0.5), "bf16"), ((0.5, 1.0), "bf16"), ((1.0, 0.97), "fp32")],
)
def test_bf16_is_taken_where_it_is_measured_to_be_faster(
    bf16: tuple[float, float], chosen: str, job: Job, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen = times(monkeypatch, bf16)
    assert make_plan(job).precision == chosen and seen == ["fp32", "bf16"]
    assert f"training in {chosen} (--precision)" in capsys.readouterr().out
    minutes = replace(job.settings, gate_steps=None, retrain_steps=None, max_minutes=10.0)
    plan = make_plan(replace(job, settings=minutes))
    assert plan.precision == chosen and plan.retrain_step_seconds == (bf16[1] if chosen == "bf16" else 1.0)


def test_it_is_not_measured_where_it_would_not_matter(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for can, changes in ((False, {}), (True, {"gate_steps": 40}), (True, {"precision": "fp32"})):
        seen = times(monkeypatch, (0.5, 0.5), can)
        plan = make_plan(replace(job, settings=replace(job.settings, **changes)))
        assert (plan.precision, seen) == ("fp32", [])
    assert make_plan(replace(job, settings=replace(job.settings, precision="bf16"))).precision == "bf16"


def test_the_run_trains_in_it(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times(monkeypatch, (0.5, 0.5))
    monkeypatch.setattr(precision_module, "STEPS_TO_COMPARE", 1)
    built: list[Any] = []
    original = plan_module.build_trainer
    for module in ("choice", "prune"):
        monkeypatch.setattr(
            f"pruned_trainer.jobs.{module}.build_trainer",
            lambda *args, **kwargs: built.append(original(*args, **kwargs)) or built[-1],
        )
    entered, dtypes = list[str](), set[Any]()

    class Watched(AttentionInFp32):
        def __enter__(self) -> Any:
            entered.append("a step")
            return super().__enter__()

    def optimized(model: Any, dtype: str | None = None) -> Any:
        dtypes.add(dtype)
        return optimize(model, dtype=dtype)

    monkeypatch.setattr("pruned_trainer.training.trainer.AttentionInFp32", Watched)
    monkeypatch.setattr("pruned_trainer.jobs.job.optimize", optimized)
    report = prune(replace(settings, out=tmp_path / "out", gate_steps=2, retrain_steps=2))
    assert len(entered) == 4 and all(trainer.optimizer.defaults["fused"] for trainer in built)
    can = refuse_encoder(find_encoder(built[-1].model), bfloat16=True) is None
    assert ("bfloat16" in dtypes) is can
    assert [trainer.args.bf16 for trainer in built] == [True, True]
    assert report["plan"]["precision"] == "bf16"
    # Few lengths, because each is compiled for; but none that the model does not take.
    limit = built[0].model.config.max_position_embeddings
    for trainer in built:
        (batch, *_) = trainer.get_train_dataloader()
        assert batch["input_ids"].size(1) == min(32, limit) and batch["attention_mask"].sum(1).max() < 32
    rows = [{"input_ids": [5] * 40, "start_positions": 3}, {"input_ids": [5] * 9, "start_positions": 1}]
    shapes = [pad_batch(rows, 0, 32, limit)["input_ids"].shape for limit in (None, 64, 50, 40, 33)]
    assert [longest for _, longest in shapes] == [64, 64, 50, 40, 40]
    assert pad_batch(rows, 0)["input_ids"].size(1) == 40


def test_a_launcher_does_not_change_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an earlier training of this process, after which transformers 4 leaves its own there."""
    for left in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", left)
        for precision in ("fp32", "bf16"):
            with autocast_in(precision):
                assert os.environ["ACCELERATE_MIXED_PRECISION"] == precision.replace("fp32", "no")
            arguments = training_arguments(tmp_path, 1, 2, 1e-3, 0, precision)
            assert precision_of(arguments) == precision
            assert os.environ["ACCELERATE_MIXED_PRECISION"] == left


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "bf16"), (2.0, "fp32")])
def test_fine_tuning_times_its_steps_too(
    ratio: float, chosen: str, settings: PruneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both precisions run the steps of a timing on copies; the training is as with that precision given."""
    monkeypatch.setattr(precision_module, "has_bf16", lambda: True)
    monkeypatch.setattr(precision_module, "STEPS_TO_COMPARE", 1)
    built: list[Any] = []
    original = finetune_module._trainer
    monkeypatch.setattr(finetune_module, "_trainer", lambda *args: built.append(original(*args)) or built[-1])
    monkeypatch.setattr(precision_module, "mean_seconds", lambda clock: ratio if built[-1].args.bf16 else 1.0)
    argv = ["finetune", "--model", settings.model, "--train-file", str(settings.train_file)]
    argv += ["--max-length", "24", "--stride", "4", "--epochs", "0.1"]
    assert main([*argv, "--out", str(tmp_path / "auto")]) == 0
    assert f"training in {chosen} (--precision)" in capsys.readouterr().out
    fp32, bf16, real = built
    assert [trainer.args.bf16 for trainer in built] == [False, True, chosen == "bf16"]
    assert fp32.state.global_step == WARMUP_STEPS + TIMED_STEPS and bf16.state.global_step == 2 * TIMED_STEPS
    monkeypatch.setattr(precision_module, "has_bf16", lambda: False)
    assert main([*argv, "--precision", chosen, "--out", str(tmp_path / "given")]) == 0
    assert len(built) == 4 and built[-1].state.global_step == real.state.global_step
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("auto", "given")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert main([*argv, "--out", str(tmp_path / "again")]) == 0  # no bf16 here: fp32, and nothing is timed
    assert len(built) == 5 and not built[-1].args.bf16


def test_the_teacher_runs_in_bfloat16_where_there_are_kernels_for_it(job: Job) -> None:
    def dtype(precision: str) -> str | None:
        return replace(job, settings=replace(job.settings, precision=precision)).teacher_dtype

    can = refuse_encoder(find_encoder(job.teacher), bfloat16=True) is None
    assert dtype("fp32") is None and dtype("bf16") == ("bfloat16" if can else None)
    before = {name: tensor.clone() for name, tensor in job.teacher.state_dict().items()}
    batch = without_labels(job.batch(job.train[:2]))
    exact = job.teacher(**batch).start_logits
    with running(job.teacher, dtype("bf16")) as teacher, torch.no_grad():
        taught = teacher(**batch).start_logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(taught[mask], exact[mask], atol=0.05, rtol=0.05)
    assert (taught[mask] != exact[mask]).any() or not can
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.teacher.state_dict().items())


def test_a_model_is_paused_where_it_runs_in_another_dtype(job: Job) -> None:
    """It comes back with the linears in int8 that were chosen for it."""
    encoder = find_encoder(job.dense)
    if refuse_encoder(encoder, int8=True) is not None:
        pytest.skip("no int8 kernels here")
    batch = without_labels(job.batch(job.train[:2]))
    optimize(job.dense, dtype="int8", calibration=[batch], tolerance=1e9)
    chosen = [*encoder.packed.encoder.int8_linears][1:]
    encoder.packed.encoder.pack(False, chosen)
    try:
        with paused(job.dense, "int8"):
            assert packed_encoders(job.dense)
        with paused(job.dense, None):
            assert not packed_encoders(job.dense)
        assert encoder.packed.encoder.int8_linears == set(chosen)
    finally:
        restore(job.dense)


def test_a_cache_is_of_the_dtype_in_which_the_teacher_runs(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruned_trainer.jobs.job.refuse_encoder", lambda *args, **kwargs: None)
    in_fp32, in_bf16 = (
        replace(job, settings=replace(job.settings, precision=precision)) for precision in ("fp32", "bf16")
    )
    for _ in range(2):  # made, and opened again
        open_cache(tmp_path, in_bf16)
    with pytest.raises(ValueError, match="its dtype is 'bfloat16', this run's is 'float32'"):
        open_cache(tmp_path, in_fp32)


def test_a_cache_takes_a_teacher_whose_head_has_another_name(job: Job, tmp_path: Path) -> None:
    """ModernBERT's is no `qa_outputs`, and gives start and end logits all the same."""
    teacher = stock("ModernBert", "QuestionAnswering")
    assert len(open_cache(tmp_path, replace(job, teacher=teacher))) == len(job.train)
