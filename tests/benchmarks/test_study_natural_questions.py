"""The study of benchmarks/study_natural_questions.py, end to end on a small model: its rows, an interruption,
going on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import study_natural_questions as study
from harness import Row, read_rows
from matching import save_checkpoint, squad_file, trained_model
from nq_pages import matching_file
from pruned_ops.models.natural_questions import with_answer_types

pytest.importorskip("datasets")

ONLY = ("dense-distilled", "c-distilled", "c-squad-distilled", "half-distilled", "c-cross-entropy")


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name models and data, and what of it is done."""
    folder = tmp_path_factory.mktemp("study")
    save_checkpoint(trained_model(), folder / "squad")
    save_checkpoint(with_answer_types(trained_model()), folder / "dense")
    for seed, (name, pages, annotators) in enumerate(zip(study.FILES, (80, 24, 40), (1, 1, 5), strict=True)):
        matching_file(folder / name, pages, seed, annotators=annotators)
    squad_file(folder / "train.json", 200, 1)
    sources = ["--model", str(folder / "dense"), "--data", str(folder), "--squad", str(folder / "squad")]
    return [*sources, "--squad-file", str(folder / "train.json"), "--steps", "4", "--every", "2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "CUT", {"max_length": 32, "stride": 8})


def run(argv: list[str], folder: Path, *only: str) -> list[Row]:
    places = ["--work", str(folder / "work"), "--out", str(folder / "out.csv")]
    study.main([*argv, *places, "--only", *only])
    return read_rows(folder / "out.csv")


def test_it_stops_goes_on_and_compares(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = monkeypatch.context()
    with stopped as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "retrain", _stopped_at_the_second(study.retrain))
        run(argv, tmp_path, *ONLY)
    before = read_rows(tmp_path / "out.csv")
    assert [row["model"] for row in before] == ["as it came", "dense"]
    records = tmp_path / "work/records"
    times = {path: path.stat().st_mtime_ns for path in records.iterdir()}

    rows = run(argv, tmp_path, *ONLY)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    names = [(row["model"], row["chosen"], row["retraining"]) for row in rows[1:]]
    assert names == [(m.size, m.chosen, m.retraining) for m in study.MODELS if m.name in ONLY]
    dense, control, own, squad, half, entropy = rows
    assert dense["documents"] == 20 and dense["macs_cut"] == 1.0  # every second of 40
    assert [row["retrain_steps"] for row in rows] == [0, 4, 4, 4, 4, 4]
    assert entropy["compensation"] == own["compensation"]
    for row in (own, squad, entropy):  # five of eight heads
        assert row["heads_removed"] == 0.625 and row["macs_cut"] == pytest.approx(own["macs_cut"], rel=0.1)
    assert half["macs_cut"] == pytest.approx(2, rel=0.01) and half["heads_removed"] == 0.5
    for row in rows[1:]:
        for kind in study.KINDS:
            assert row[f"{kind}_f1_loss"] == pytest.approx(dense[f"{kind}_f1"] - row[f"{kind}_f1"])
            assert row[f"{kind}_f1_loss_low"] <= row[f"{kind}_f1_loss"] <= row[f"{kind}_f1_loss_high"]
    for row in (own, squad, half):  # of the same loss
        assert row["short_f1_loss_control"] == pytest.approx(control["short_f1"] - row["short_f1"])
    assert not any(
        "control" in key for row in (control, entropy) for key in row
    )  # no control of its loss yet

    with np.load(tmp_path / "out.npz") as counts:
        right, predicted, gold = counts["c-distilled/short"].sum(0)
    assert own["short_f1"] == pytest.approx(200 * right / (predicted + gold), abs=1e-4)
    page = (tmp_path / "out.md").read_text()
    assert page.count("| row c |") == 3 and "every second layer" in page and "on 20 documents" in page
    assert "trained on for 4 steps" in page

    timed = _timed(argv, tmp_path, monkeypatch)
    assert timed[0]["speedup"] == 1.0 and {row["model"] for row in timed if "speedup" in row} >= {"c", "half"}
    assert run(argv, tmp_path) == timed  # a run that times nothing keeps what was timed


def _stopped_at_the_second(retrain: Any) -> Any:
    calls: list[int] = []

    def stopped(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return retrain(*arguments)

    return stopped


def _timed(argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(study.NqStudy, "speedups", lambda self, sizes: {size: 1.5 for size in sizes})
    return run([*argv, "--timings"], folder)


def test_what_was_chosen_by_another_task_is_another_choice(argv: list[str], tmp_path: Path) -> None:
    """The three ways to choose remove as much, and not the same."""
    options = study.parsed(argv)
    squad = (options.squad, options.squad_file)
    opened = study.open_study(options.model, options.data, squad, tmp_path, 4, 2)
    decisions = [opened.decision("d", chosen) for chosen in study.CHOSEN]
    shapes = {sum(len(layer.ffn.indices) for layer in decision.layers) for decision in decisions}
    heads = [tuple(layer.heads.indices for layer in decision.layers) for decision in decisions]
    assert max(shapes) - min(shapes) <= 2 * opened.job.align and len(set(heads)) > 1


def test_a_run_that_could_not_begin_leaves_no_documents_to_the_next(argv: list[str], tmp_path: Path) -> None:
    options = study.parsed(argv)
    squad = (options.squad, options.squad_file)
    with pytest.raises((OSError, ValueError)):
        study.open_study(str(tmp_path / "none"), options.data, squad, tmp_path, 4, 2)
    opened = study.open_study(options.model, options.data, squad, tmp_path, 4, 4)
    assert len(opened.job.evaluation) == 10  # every fourth of 40


def test_another_study_in_its_folder_is_refused(argv: list[str], tmp_path: Path) -> None:
    run(argv, tmp_path)
    changed = [*argv[:-1], "1"]
    with pytest.raises(ValueError, match="another model, data or size; give another --work"):
        run(changed, tmp_path)
