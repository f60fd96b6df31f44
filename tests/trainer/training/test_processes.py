"""A job that two processes share, and the order of its data, which does not depend on their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import command, job_settings, killed, losses, variant
from matching import trained_model
from processes import with_sources
from pruned_trainer import Decision
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.batches import LengthGroupedSampler
from thorough import EVERYTHING


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("processes"), trained_model())


def test_the_sampler_s_order_is_its_seed_and_epoch() -> None:
    lengths = [5 + (7 * i) % 40 for i in range(103)]
    steps = [0]
    sampler = LengthGroupedSampler(lengths, 8, 1, lambda: steps[0])
    first = list(sampler)
    assert first == list(sampler) and len(set(first)) == len(first) == len(sampler) == 96
    assert max(lengths) in [lengths[i] for i in first[:8]] and set(first) <= set(range(103))
    steps[0] = 11  # of 12
    assert list(sampler) == first
    steps[0] = 12
    assert list(sampler) != first
    assert first != list(LengthGroupedSampler(lengths, 8, seed=2))
    groups = [[lengths[j] for j in first[i : i + 8]] for i in range(0, 96, 8)]
    spread = [max(group) - min(group) for group in groups]
    assert sum(spread) / len(spread) < 20  # of 40
    assert sorted(LengthGroupedSampler([3, 1], 8, seed=0)) == [0, 1]


# The jobs of these command lines, one after another, in processes that part at the end.
IN_TURN = """
import json, sys
from pruned_trainer import distributed
from pruned_trainer.cli import main
*others, last = json.loads(sys.argv[1])
leave, distributed.leave = distributed.leave, lambda: None
for argv in others:
    if main(argv):
        sys.exit(1)
distributed.leave = leave
sys.exit(main(last))
"""
# Two processes retrain in the job that is resumed, too.
RECIPES = {"joint": "gates", **({"random": "retrain"} if EVERYTHING else {})}


def in_two_processes(script: Path, jobs: list[list[str]]) -> str:
    """What the jobs print on two gloo processes; a hang is an error after some minutes."""
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    environment = {**with_sources(), **more}
    script.write_text(IN_TURN)
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", str(script), json.dumps(jobs),
    ]  # fmt: skip
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def printed(settings: PruneSettings) -> str:
    """What two processes print, which start each recipe, and bring what one process began to its end."""
    begun = variant(settings, "epochs-two", gate_steps=2, retrain_steps=60, save_steps=25)
    with pytest.MonkeyPatch.context() as patch:
        killed(begun, "retrain", 55, patch)  # an epoch has 18 steps; the checkpoint is of step 50
    jobs = [command(begun, "--resume")]
    for recipe in RECIPES:
        steps = {"gate_steps": None} if recipe == "random" else {}
        two = variant(settings, f"two-{recipe}", save_steps=200, recipe=recipe, **steps)
        jobs.append(command(two, "--recipe", recipe))
    return in_two_processes(settings.out.with_name("in_turn.py"), [job[2:] for job in jobs])


@pytest.mark.parametrize(("recipe", "phase"), RECIPES.items())
def test_two_processes_equal_one(recipe: str, phase: str, settings: PruneSettings, printed: str) -> None:
    """Half of each batch on each of two gloo processes: the same loss curve within rounding, the same
    decision; one writes. Each phase from one start: rounding in the gates grows in what follows."""
    steps = {"gate_steps": None} if recipe == "random" else {}
    alone = variant(settings, f"whole-{recipe}", recipe=recipe, **steps)
    whole = alone.out
    prune(alone)
    out = settings.out.with_name(f"two-{recipe}")
    assert printed.count("decided, heads/FFN width") == 1 + len(RECIPES)  # one speaks in each job
    reports = [json.loads((place / "report.json").read_text()) for place in (out, whole)]
    curves = [losses(report["training"][phase]) for report in reports]
    assert len(curves[0]) == len(curves[1]) > 5
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-4)
    kept = [
        [(layer.heads.indices, layer.ffn.indices) for layer in Decision.load(place / "decision.json").layers]
        for place in (out, whole)
    ]
    assert kept[0] == kept[1]
    assert reports[0]["dense"]["f1"] == reports[1]["dense"]["f1"]  # gathered from both
    assert reports[0]["pruned"]["f1_span"] == pytest.approx(reports[1]["pruned"]["f1_span"], abs=3)
    assert not out.with_name(f"two-{recipe}.partial").exists()


def test_two_processes_resume_where_they_were(settings: PruneSettings, printed: str) -> None:
    """Past the first epoch too: what one process began, killed in its third epoch, two bring to the end that
    one alone reaches."""
    base = variant(settings, "epochs", gate_steps=2, retrain_steps=60, save_steps=25)
    prune(base)
    places = (base.out.with_name("epochs-two"), base.out)
    mine, others = (load_file(place / "model.safetensors") for place in places)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, others[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: n + m)
