"""Which windows the trainings of a run see, where none of them sees all."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from jobs import job_settings, variant
from matching import trained_model
from pruned_trainer import Target
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.trainer import PruningTrainer

Windows = dict[str, set[tuple[int, ...]]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    """Trainings of 5 steps, of the 18 that an epoch has."""
    one = job_settings(tmp_path_factory.mktemp("order"), trained_model(steps=1))
    return replace(one, gate_steps=5, retrain_steps=5)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Windows:
    """The windows of each training that follows, by its folder."""
    windows: Windows = defaultdict(set)
    original = PruningTrainer.compute_loss

    def watched(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        folder = Path(self.args.output_dir)
        windows["/".join(folder.parts[-2:])] |= {tuple(row) for row in inputs["input_ids"].tolist()}
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(PruningTrainer, "compute_loss", watched)
    return windows


def in_common(first: set[tuple[int, ...]], second: set[tuple[int, ...]]) -> float:
    return len(first & second) / min(len(first), len(second))


def test_retraining_begins_with_other_windows_than_the_gates(settings: PruneSettings, seen: Windows) -> None:
    prune(variant(settings, "one"))
    assert len(seen) == 2 and all(len(windows) > 120 for windows in seen.values())
    assert in_common(*seen.values()) < 0.6


def test_each_training_of_a_gradual_sweep_has_windows_of_its_own(
    settings: PruneSettings, seen: Windows
) -> None:
    one = variant(settings, "gradual", gradual=True, targets=(Target(macs=0.7), Target(macs=0.45)))
    sweep(replace(one, gate_steps=10))
    assert len(seen) == 4
    for first, second in combinations(seen.values(), 2):
        assert in_common(first, second) < 0.6
