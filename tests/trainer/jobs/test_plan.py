"""What a run plans: from steps that it times, and from windows that it scores."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from calls import arguments
from jobs import job_settings, variant
from matching import trained_model
from pruned_trainer import Target
from pruned_trainer.jobs import call, trainers
from pruned_trainer.jobs import plan as planning
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.plan import make_plan
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("plan"), trained_model(steps=1))


def test_each_target_in_time_has_its_own_time_for_the_choice(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(settings)
    targets = (Target(speedup=1.5), Target(speedup=3.0))
    assert planning._deciding_seconds(job) == 0.0  # no target in time
    timed: Any = replace(job, settings=replace(settings, targets=targets), table=object())  # type: ignore[arg-type]
    monkeypatch.setattr(planning, "round_seconds", lambda _, target: 1 + 1 / target.value)
    monkeypatch.setattr(planning, "choice_workload", lambda *_: job.workload)
    rounds = planning.TIMED_CHOICES * (planning.ROUNDS + 1) * len(job.workload.batches)
    assert planning._deciding_seconds(timed) == pytest.approx(rounds * (2 + 1 / 1.5 + 1 / 3.0))


@pytest.mark.parametrize(("recipe", "windows"), [("fast", 128), ("gain", 1024), ("leave-one-out", 128)])
def test_a_small_batch_scores_as_many_windows(
    recipe: str, windows: int, settings: PruneSettings, tmp_path: Any
) -> None:
    one = variant(settings, "scored", recipe=recipe, gate_steps=None)
    job = start(one)
    for size in (4, 16, 48):
        plan = make_plan(replace(job, settings=replace(one, batch_size=size)))
        assert windows <= plan.gate_steps * size < windows + size
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=100, use_cpu=True)
    assert call._steps(args, 1000, 8, recipe, {}) == {"gate_steps": windows // 8, "retrain_steps": 100}


def test_a_choice_by_chance_has_no_steps(
    settings: PruneSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither trains gates nor scores windows, in the plan, the report and what is said; and a call from
    Python gives all its steps to the narrow model."""
    assert prune(variant(settings, "chance", recipe="random", gate_steps=None, retrain_steps=1))["plan"] == {
        "gate_steps": 0, "retrain_steps": 1, "gate_step_seconds": None, "retrain_step_seconds": None,
        "precision": "fp32",
    }  # fmt: skip
    assert "random: a choice by chance, without steps, towards" in capsys.readouterr().out
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=100, use_cpu=True)
    assert call._steps(args, 1000, 8, "random", {}) == {"retrain_steps": 100}


def test_a_share_that_leaves_no_two_steps_to_average_is_refused(settings: PruneSettings) -> None:
    averaging = variant(settings, "averaged", retrain_steps=10, average_steps=0.14)
    job = start(averaging)
    with pytest.raises(ValueError, match="average_steps is 0.14, which is 1 of 10 retrain steps, and a mean"):
        make_plan(job)
    assert make_plan(replace(job, settings=replace(averaging, retrain_steps=11))).retrain_steps == 11


def test_the_minutes_count_the_scoring_of_averaged_weights(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All validation windows, twice for a threshold and twice at it, by each target's model."""
    averaging = variant(
        settings, "scored-mean", recipe="random", gate_steps=None, retrain_steps=None, max_minutes=20.0,
        average_steps=0.2, precision="fp32",
    )  # fmt: skip
    job, now = start(averaging), [0.0]
    windows = len(job.validation.windows)

    class Slow:
        """A model that takes a second for a window."""

        def __call__(self, input_ids: Any, **_: Any) -> None:
            now[0] += len(input_ids)

    monkeypatch.setattr(planning, "running", lambda model: nullcontext(Slow()))
    monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(planning, "_step_seconds", lambda _: (0.0, 1.0))
    for targets in (averaging.targets, (Target(macs=0.7), Target(macs=0.4))):
        several = replace(job, settings=replace(averaging, targets=targets))
        assert planning._averaging_seconds(several) == pytest.approx(len(targets) * 4 * windows)
    counted = make_plan(job).retrain_steps
    without = make_plan(replace(job, settings=replace(averaging, average_steps=0.0))).retrain_steps
    assert without - counted == pytest.approx(4 * windows, abs=2)


def test_the_warm_up_of_the_arguments_takes_the_same_part_of_each_phase(tmp_path: Path) -> None:
    """A part of the steps is one already."""
    own = SimpleNamespace(seed=0, save_steps=200, train_batch=8, precision="fp32")
    for warmup_steps, steps, warm in ((50, 25, 12), (50, 75, 38), (0, 25, 0), (500, 25, 25), (0.2, 25, 5)):
        args = arguments(tmp_path, 100, warmup_steps=warmup_steps)
        job: Any = SimpleNamespace(settings=own, arguments=args, train=range(64))
        phase = trainers._arguments(job, tmp_path, steps, 1e-3, None, False)
        assert phase.max_steps == steps and phase.get_warmup_steps(steps) == warm


def test_steps_that_are_only_timed_are_reported_nowhere(tmp_path: Path) -> None:
    """Wherever the caller's arguments report a training."""
    args = replace(arguments(tmp_path, 100), report_to=["tensorboard"])
    own = SimpleNamespace(seed=0, save_steps=200, train_batch=8, precision="fp32")
    job: Any = SimpleNamespace(settings=own, arguments=args, train=range(64))
    for timing, places in ((False, ["tensorboard"]), (True, [])):
        assert trainers._arguments(job, tmp_path, 10, 1e-3, None, timing).report_to == places
