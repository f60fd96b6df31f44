"""What a run plans: from steps that it times, and from windows that it scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import TrainingArguments

from jobs import job_settings, variant
from matching import trained_model
from pruned_trainer import Target
from pruned_trainer.jobs import call
from pruned_trainer.jobs import plan as planning
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.plan import make_plan
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
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=100, use_cpu=True)
    assert call._steps(arguments, 1000, 8, recipe, {}) == {"gate_steps": windows // 8, "retrain_steps": 100}


def test_a_share_that_leaves_no_two_steps_to_average_is_refused(settings: PruneSettings) -> None:
    one = variant(settings, "averaged", retrain_steps=10, average_steps=0.14)
    job = start(one)
    with pytest.raises(ValueError, match="average_steps is 0.14, which is 1 of 10 retrain steps, and a mean"):
        make_plan(job)
    assert make_plan(replace(job, settings=replace(one, retrain_steps=11))).retrain_steps == 11
