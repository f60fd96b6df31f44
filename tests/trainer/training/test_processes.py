"""A job that two processes share, and the order of its data, which does not depend on their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import command, job_settings, killed, losses, variant
from matching import trained_model
from pruned_trainer import Decision
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.batches import LengthGroupedSampler
from thorough import only_in_test_all

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("processes"), trained_model())


def test_the_sampler_s_order_is_its_seed_and_epoch() -> None:
    lengths = [5 + (7 * i) % 40 for i in range(103)]
    epoch = [0]
    sampler = LengthGroupedSampler(lengths, 8, 1, lambda: epoch[0])
    first = list(sampler)
    assert first == list(sampler) and len(set(first)) == len(first) == len(sampler) == 96
    assert max(lengths) in [lengths[i] for i in first[:8]] and set(first) <= set(range(103))
    epoch[0] = 1
    assert list(sampler) != first
    assert first != list(LengthGroupedSampler(lengths, 8, seed=2))
    groups = [[lengths[j] for j in first[i : i + 8]] for i in range(0, 96, 8)]
    spread = [max(group) - min(group) for group in groups]
    assert sum(spread) / len(spread) < 20  # of 40
    assert sorted(LengthGroupedSampler([3, 1], 8, seed=0)) == [0, 1]


def in_two_processes(one: PruneSettings, *more: str) -> subprocess.CompletedProcess[str]:
    """The job on two gloo processes; a hang is an error after some minutes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    path = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0",
    ]  # fmt: skip
    return subprocess.run(
        [*launcher, *command(one, *more)], capture_output=True, text=True, env=environment, timeout=900
    )


# Two processes retrain in the test below, too.
@pytest.mark.parametrize(
    ("recipe", "phase"),
    [("joint", "gates"), pytest.param("random", "retrain", marks=only_in_test_all)],
)
def test_two_processes_equal_one(recipe: str, phase: str, settings: PruneSettings) -> None:
    """Half of each batch on each of two gloo processes: the same loss curve within rounding, the same
    decision; one writes. Each phase from one start: rounding in the gates grows in what follows."""
    alone = variant(settings, f"whole-{recipe}", recipe=recipe)
    whole = alone.out
    prune(alone)
    one = variant(settings, f"two-{recipe}", save_steps=200)
    done = in_two_processes(one, "--recipe", recipe)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("decided, heads/FFN width") == 1  # one speaks
    reports = [json.loads((place / "report.json").read_text()) for place in (one.out, whole)]
    curves = [losses(report["training"][phase]) for report in reports]
    assert len(curves[0]) == len(curves[1]) > 5
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-4)
    kept = [
        [(layer.heads.indices, layer.ffn.indices) for layer in Decision.load(place / "decision.json").layers]
        for place in (one.out, whole)
    ]
    assert kept[0] == kept[1]
    assert reports[0]["dense"]["f1"] == reports[1]["dense"]["f1"]  # gathered from both
    assert reports[0]["pruned"]["f1_span"] == pytest.approx(reports[1]["pruned"]["f1_span"], abs=3)
    assert not one.out.with_name(f"two-{recipe}.partial").exists()


def test_two_processes_resume_where_they_were(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the first epoch too: what one process began, killed in its third epoch, two bring to the end that
    one alone reaches."""
    base = variant(settings, "epochs", gate_steps=2, retrain_steps=60, save_steps=25)
    prune(base)
    one = replace(base, out=base.out.with_name("epochs-two"))
    killed(one, "retrain", 55, monkeypatch)  # an epoch has 18 steps; the checkpoint is of step 50
    done = in_two_processes(one, "--resume")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    mine, others = (load_file(place / "model.safetensors") for place in (one.out, base.out))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: n + m)
