"""Compensation in whole jobs and in the compact command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import job_settings, variant
from matching import trained_model
from pruned_trainer import Decision, compact
from pruned_trainer.cli import main
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.options import Target


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    one = job_settings(tmp_path_factory.mktemp("compensated"), trained_model())
    return variant(one, "out", recipe="random", gate_steps=None, retrain_steps=0)


def saved(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_a_job_compensates_as_it_is_told(settings: PruneSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """The same choice each time; the decision says what was done, and without any it is plain compaction."""
    outs = {}
    for method in ("none", "bias", "least-squares", "auto"):
        one = variant(settings, method, compensate=method)
        prune(one)
        outs[method] = one.out
    decisions = {method: Decision.load(out / "decision.json") for method, out in outs.items()}
    assert len({decision.layers for decision in decisions.values()}) == 1
    assert decisions["none"].compensation == {}
    assert decisions["bias"].compensation == {"ffn": "bias", "heads": "bias"}
    assert set(decisions["auto"].compensation) == {"ffn", "heads"}
    plain = compact(start(settings).dense, decisions["none"]).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in saved(outs["none"]).items())
    changed = {name for name, tensor in saved(outs["bias"]).items() if not torch.equal(tensor, plain[name])}
    assert changed and all(name.endswith("output.dense.bias") for name in changed)
    chosen = re.findall(r"compensated: .*; loss ([0-9.]+) to ([0-9.]+)", capsys.readouterr().out)
    assert len(chosen) == 1  # `auto` alone measures what it chooses by
    assert float(chosen[0][1]) < float(chosen[0][0]) - 1


def test_a_model_of_which_nothing_is_left_is_warned_of(
    settings: PruneSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    warned = {}
    for name, left in (("nothing", 1e-9), ("half", 0.5)):
        prune(variant(settings, name, compensate="none", targets=(Target(macs=left),)))
        warned[name] = "no head and no FFN unit is left" in capsys.readouterr().out
    assert warned == {"nothing": True, "half": False}


def test_the_compact_command_compensates(settings: PruneSettings, tmp_path: Path) -> None:
    decision = settings.out.with_name("none") / "decision.json"
    texts = tmp_path / "texts.txt"
    lines = [" ".join(f"w{(5 * i + 3 * j) % 24}" for j in range(12)) for i in range(64)]
    texts.write_text("\n".join(["", *lines]))
    outs = [tmp_path / name for name in ("plain", "solved", "turns")]
    command = ["compact", "--model", settings.model, "--decision", str(decision)]
    more = ["--calibration", str(texts), "--compensate", "least-squares"]
    for out, options in zip(outs, ([], more, [*more, "--layer-by-layer"]), strict=True):
        assert main([*command, "--out", str(out), *options]) == 0
    weights = [saved(out)["bert.encoder.layer.1.output.dense.weight"] for out in outs]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert (
        main([*command, "--out", str(tmp_path / "none"), "--compensate", "bias"]) == 2
    )  # nothing to do it on
