"""bench_family.py on a family of small models: its losses are those that the runs reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_family
import harness
from jobs import job_settings, variant
from matching import trained_model
from pruned_ops.measure.timing import Timing, Workload
from pruned_trainer import Target
from pruned_trainer.jobs.prune import prune, sweep


def test_losses_are_those_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = job_settings(tmp_path, trained_model())
    base = variant(base, "family", recipe="random", gate_steps=None, retrain_steps=0)
    sweep(variant(base, "family", targets=(Target(macs=0.7), Target(macs=0.4))))
    prune(variant(base, "control", targets=(Target(macs=0.999),), retrain_steps=2))
    prune(variant(base, "alone", targets=(Target(macs=0.5),)))
    rounds = {"dense": 4.0, "control": 3.9, "macs-0.7": 3.0, "macs-0.4": 2.0, "alone": 2.5}  # seconds

    def timed(models: dict[str, Any], workload: Workload) -> tuple[dict[str, Timing], None]:
        assert workload.name.startswith("arrival") and models.keys() == rounds.keys()
        return {name: Timing(workload, (rounds[name],) * 9) for name in models}, None

    monkeypatch.setattr(bench_family, "time_models", timed)
    out = tmp_path / "found.csv"
    monkeypatch.setattr(
        sys, "argv",
        ["bench_family.py", str(tmp_path / "family"), str(tmp_path / "alone"), "--dense", base.model,
         "--data", str(tmp_path), "--control", str(tmp_path / "control"), "--out", str(out)],
    )  # fmt: skip
    bench_family.main()
    rows = {row["model"]: row for row in harness.read_rows(out)}
    assert list(rows) == ["dense", "control", "macs-0.7", "macs-0.4", "alone"]
    for name, row in rows.items():
        assert str(tmp_path) not in row["command"] and row["questions"] == 100
        if name == "dense":
            continue
        folder = tmp_path / (name if name in ("control", "alone") else f"family/{name}")
        report = json.loads((folder / "report.json").read_text())
        assert row["gate_steps"] == 0  # a choice by chance
        assert row["run"].startswith("pruned-trainer prune") and str(tmp_path) not in row["run"]
        for end in ("", "_low", "_high"):
            assert row[f"times_as_fast{end}"] == pytest.approx(rounds["dense"] / rounds[name], abs=1e-4)
        assert row["macs"] == pytest.approx(report["pruned"]["macs"] / report["dense"]["macs"], abs=1e-4)
        for score in ("f1", "f1_span"):
            assert row[score] == pytest.approx(report["pruned"][score], abs=2e-3)
            assert row[f"{score}_lost_to_dense"] == pytest.approx(report[f"{score}_loss"], abs=2e-3)
            ends = [row[f"{score}_lost_to_dense_{end}"] for end in ("low", "high")]
            assert ends == pytest.approx(report[f"{score}_loss_interval"], abs=2e-3)
            if name != "control":
                behind = rows["control"][score] - row[score]
                assert row[f"{score}_lost_to_control"] == pytest.approx(behind, abs=2e-3)
    assert rows["macs-0.4"]["f1_span_lost_to_control"] > 0 and "f1_lost_to_control" not in rows["control"]
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(line in text for line in bench_family.page(list(rows.values())))
    assert f"| macs-0.4 | {rows['macs-0.4']['times_as_fast']:.2f}x |" in text and "lost to control" in text
    machine = f"{rows['dense']['machine_processor']}, {rows['dense']['machine_threads']} thread"
    assert f"All were timed in turn, in batches of 8, on an {machine}" in text


def test_a_command_is_shown_without_this_machines_folders() -> None:
    command = "pruned-trainer sweep --model /models/minilm --train-file /data/train.json --out family"
    shown = "pruned-trainer sweep --model minilm --train-file train.json --out family"
    assert bench_family.without_folders(command) == shown


def test_a_folder_that_is_no_family_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        str(tmp_path),
        "--dense",
        str(tmp_path),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "x.csv"),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_family.py", *options])
    with pytest.raises(OSError, match=r"sweep\.json|config\.json"):
        bench_family.main()
