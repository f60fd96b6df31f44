"""The study of benchmarks/study_squad.py, end to end on a small model that has learned a small task: every
kind of row, an interruption, and going on."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import study_squad
from harness import Row, read_rows, write_rows
from matching import save_checkpoint, squad_file, trained_model
from pruned_trainer.tasks.squad.metrics import bootstrap_interval
from study import claims as study_claims
from study import figures as study_figures
from study import page as study_page
from study import rows as study_rows
from study.records import Profile, open_study, save_arrays

TINY = Profile(
    name="tiny", seeds=(0,), train_every=2, judged_every=2, curve_every=2, fractions=(0.5,),
    held=(0.5,), hidden_fractions=(0.1, 0.25), gate_steps=24, gate_batch=8, gate_learning_rate=0.1,
    retrain_steps=6, retrain_batch=8, score_steps={"gain": 2, "leave-one-out": 1},
    max_length=24, stride=4, save_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and a folder of data."""
    folder = tmp_path_factory.mktemp("study")
    squad_file(folder / "train.json", 200, 1)
    squad_file(folder / "validation.json", 60, 2, unanswerable=0.3)
    squad_file(folder / "eval.json", 120, 3, unanswerable=0.3)
    return str(save_checkpoint(trained_model(), folder / "model")), folder


def test_the_study_stops_and_goes_on(
    sources: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (study_rows, study_squad):
        monkeypatch.setattr(module, "TABLE", {"e": (0.5, 0.65), "b": (0.5, 0.0)})
    monkeypatch.setattr(study_rows, "HIDDEN_SHARES", (0.5, 0.5, 0.3))
    monkeypatch.setattr(study_squad, "TIMED", (2,))
    whole = _run(sources, tmp_path / "whole", tmp_path)
    assert {row["part"] for row in whole} == {"curves", "rows", "recipes", "hidden"}
    assert all(row["finished"] == "True" for row in whole)
    _check_curves([row for row in whole if row.get("kind") == "curve" and row["on"] != "hidden"])
    _check_rows([row for row in whole if "row" in row])

    _check_page(tmp_path / "whole/study-tiny.csv")
    _check_unfinished(tmp_path / "whole/study-tiny.csv")
    _check_scores(whole, tmp_path / "whole/study-tiny.npz")

    # Stopped in the middle of row e's retraining, then gone on with: the same numbers.
    retrain = study_rows.retrain
    with monkeypatch.context() as patch:
        patch.setattr(study_rows, "retrain", _stopped)
        with pytest.raises(KeyboardInterrupt):
            _run(sources, tmp_path / "stopped", tmp_path, ("rows",))
    assert study_rows.retrain is retrain
    between = read_rows(tmp_path / "stopped/study-tiny.csv")
    states = {row["unit"]: row["finished"] for row in between}
    assert states["row-a-seed0"] == "True" and states["row-control-distilled-seed0"] == "False"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped-work" / "records").iterdir()}
    again = _run(sources, tmp_path / "stopped", tmp_path, ("rows",))
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    rows = [[_lasting(row) for row in made if row["part"] == "rows"] for made in (whole, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 1 + 2 * 4
    assert {row["part"] for row in again if row["finished"] == "False"} == {"curves", "recipes", "hidden"}

    _goes_on_elsewhere(sources, tmp_path, monkeypatch, again)


def _goes_on_elsewhere(
    sources: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[Row]
) -> None:
    """A study in an empty folder does nothing again that its results have, times their models by their
    shapes, and compares new rows with their controls."""
    other = open_study(TINY, *sources, tmp_path / "other-work")
    (timed,) = study_squad.run(other, tmp_path / "stopped", ("timings",))
    assert [row["row"] for row in read_rows(timed)] == ["a", "half", "e", "b"]
    with np.load(tmp_path / "stopped/study-tiny.npz") as arrays:
        scores = dict(arrays)
    monkeypatch.setattr(study_squad, "TABLE", {"e": (0.5, 0.65), "b": (0.5, 0.0), "c": (0.0, 0.5)})
    monkeypatch.setattr(study_rows, "TABLE", study_squad.TABLE)
    stamp = study_squad.harness.stamp()
    monkeypatch.setattr(study_squad.harness, "stamp", lambda: {**stamp, "machine_processor": "another"})
    after = _run(sources, tmp_path / "stopped", tmp_path, ("rows",), "other-work")
    done = {row["unit"]: row for row in before if row["finished"] == "True"}
    kept = [row for row in after if row["unit"] in done]
    assert kept == list(done.values()) and not any(row["machine_processor"] == "another" for row in kept)
    new = [row for row in after if row["finished"] == "True" and row["unit"] not in done]
    assert {row["row"] for row in new} == {"c"} and len(new) == 2
    with np.load(tmp_path / "stopped/study-tiny.npz") as arrays:
        assert all(np.array_equal(arrays[name], score) for name, score in scores.items())
        assert len(arrays.files) > len(scores)
    for row in new:
        (control,) = (r for r in kept if r["unit"] == row["unit"].replace("row-c", "row-control"))
        assert row["f1_span_loss_control"] == pytest.approx(control["f1_span"] - row["f1_span"], abs=1e-4)
        assert row["machine_processor"] == "another"
    title = study_page.section(study_figures.Results(tmp_path / "stopped/study-tiny.csv"))[0]
    assert "; another, " in title


def _run(
    sources: tuple[str, Path],
    results: Path,
    tmp_path: Path,
    parts: tuple[str, ...] = study_squad.PARTS,
    folder: str = "",
) -> list[Row]:
    work = tmp_path / (folder or f"{results.name}-work")
    study = open_study(TINY, sources[0], sources[1], work, note="a test")
    written = study_squad.run(study, results, parts, "python study")
    if "timings" in parts:
        timed = read_rows(written[1])
        assert {row["row"] for row in timed} == {"a", "half", "e", "b", "h", "joint"}
        assert all(row["speedup"] > 0 and row["arrives"] > 0 and row["note"] == "a test" for row in timed)
    return read_rows(written[0])


def _stopped(job: Any, narrow: Any, folder: Path, steps: int, decision: Any) -> None:
    """Training that ends as by Ctrl-C after half of its steps, with a checkpoint."""
    from pruned_trainer.training.callbacks import StopOnInterrupt

    on_step_end = StopOnInterrupt.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.requested = self.requested or state.global_step == steps // 2
        return on_step_end(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", stop)
        from pruned_trainer.jobs.prune import retrain

        retrain(job, narrow, folder, steps, decision)


def _check_curves(rows: list[Row]) -> None:
    assert {(row["on"], row["method"]) for row in rows} == {
        (on, method) for on in ("heads", "ffn") for method in study_rows.METHODS
    }
    for row in rows:
        assert row["removed"] == pytest.approx(0.5, abs=0.01) or row["method"] == "leave-one-out"
        assert row.get("held") == (0.5 if row["method"] == "l0" else None)
        assert row["gate_batch"] == TINY.gate_batch and row["penalty"] == "one" and row["gate_start"] == 2.5
        assert row["f1_span_loss_low"] <= row["f1_span_loss"] <= row["f1_span_loss_high"]
        assert row["f1_behind_l0"] == 0 or row["method"] != "l0"
        assert 0 <= row["f1_span_compensated"] <= 100 and row["compensation"].startswith("ffn ")


def _check_rows(rows: list[Row]) -> None:
    by_name = {(row["row"], row.get("retraining")): row for row in rows}
    assert len(by_name) == len(rows) == 1 + 2 * 4 + 2
    dense = by_name["a", "none"]
    assert dense["heads_removed"] == 0 and dense["f1_loss"] == 0 and dense["macs_cut"] == 1
    for retraining in study_rows.RETRAININGS:
        control, half, e, b = (by_name[letter, retraining] for letter in ("control", "half", "e", "b"))
        assert control["macs_cut"] == 1 and control["f1_span_before"] == pytest.approx(dense["f1_span"])
        assert half["layers"].count("/") == 1 and half["heads_removed"] == half["ffn_removed"] == 0.5
        assert e["heads_removed"] == pytest.approx(0.5) and e["ffn_removed"] == pytest.approx(0.65, abs=0.16)
        assert b["ffn_removed"] == 0 and b["layers"].count("/48") == 2
        for row in (half, e, b):
            gained = control["f1_span"] - row["f1_span"]
            assert row["f1_span_loss_control"] == pytest.approx(gained, abs=1e-9)
    assert by_name["e", "distilled"]["f1_span_before"] == by_name["e", "cross-entropy"]["f1_span_before"]
    assert by_name["h", "distilled"]["hidden_removed"] > 0
    assert by_name["joint", None]["macs_kept"] <= by_name["e", "distilled"]["macs_kept"]
    assert 1 < by_name["joint", None]["joint_pace"] <= study_rows.MAX_PACE
    for row in rows:
        assert 0 <= row["f1"] <= 100 and row["questions"] == 60
        assert row["row"] == "a" or row["f1_before"] >= 0


def _check_scores(rows: list[Row], path: Path) -> None:
    """The published scores of the questions give the rows' own numbers and intervals again."""
    scores = np.load(path)
    dense = scores["dense-row/f1_span"].astype(float)
    for row in rows:
        if row.get("kind") == "row" and row["row"] != "a":
            own = scores[f"{row['unit']}/f1_span"].astype(float)
            assert row["f1_span"] == pytest.approx(own.mean(), abs=0.05)
            ends = bootstrap_interval(dense, own)
            assert (row["f1_span_loss_low"], row["f1_span_loss_high"]) == pytest.approx(ends, abs=0.1)


def _check_page(path: Path) -> None:
    """Figures first, as the page shows those that are there."""
    results = study_figures.Results(path)
    drawn = [figure.save(path.parent) for figure in study_figures.figures(results)]
    assert [one.name.rpartition("-")[2] for one in drawn] == ["curves.png", "layers.png", "speed.png"]
    assert all(1000 < one.stat().st_size < 200_000 for one in drawn)
    text = "\n".join(study_page.section(results))
    assert all(f"](results/{one.name})" in text for one in drawn)
    titles = [line[5:] for line in text.splitlines() if line.startswith("#### ")]
    assert len(titles) == 6 and titles[0] == "The paper's claims" and titles[1].startswith("Four ways")
    _check_claims(results, text)
    assert "- L0 against random: in span F1 " in text and "Not finished" not in text
    for row in results.row("e") + results.row("e", "cross-entropy") + results.row("joint"):
        assert f"| {row['f1']:.2f} |" in text and study_page.change([row], "f1_span_loss") in text
    (speeds,) = results.timings.values()
    assert all(f"{row['speedup']:.2f}x" in text for row in speeds if row["row"] in "aeb")
    assert "heads removed, compensated" in text and "those held at 50%" in text
    assert "8 windows a step (the paper: 24) at a rate of 0.1" in text and "(control)" in text


def _check_unfinished(path: Path) -> None:
    """The page can be made after any piece of work."""
    rows = read_rows(path)
    units = list(dict.fromkeys(row["unit"] for row in rows))
    so_far = path.parent / "unfinished" / path.name
    for done in range(1, len(units)):
        left = [{"part": "rows", "unit": unit, "finished": False, "seed": 0} for unit in units[done:]]
        write_rows(so_far, [row for row in rows if row["unit"] in units[:done]] + left)
        text = "\n".join(study_page.section(study_figures.Results(so_far)))
        assert "Not finished" in text


def _check_claims(results: study_figures.Results, text: str) -> None:
    """Differences between rows are those of the rows' own scores, and the controls' losses are repeated."""
    (distilled,), (plain,) = results.row("e"), results.row("e", "cross-entropy")
    won = distilled["f1_span"] - plain["f1_span"]
    (line,) = [each for each in text.splitlines() if "distillation is better than cross-entropy" in each]
    assert f"row e {won:+.1f} (" in line
    won = distilled["f1_span"] - results.row("half")[0]["f1_span"]
    (line,) = [each for each in text.splitlines() if "than a smaller dense one" in each]
    assert "worse by 0.5 short F1" in line  # by the paper's table of RoBERTa-large
    assert f"row e {won:+.1f} (" in line and f"by half the layers, {distilled['macs_cut']:.2f}x" in line
    won = plain["f1_span"] - plain["f1_span_before"]
    (line,) = [each for each in text.splitlines() if "wins back what pruning lost" in each]
    assert f"row e {won:+.1f} (" in line
    lost = tuple(plain[f"f1_loss_control{end}"] for end in ("", "_low", "_high"))
    assert lost[1] <= lost[0] <= lost[2] and f"control: row e {study_claims.points(lost)}" in text
    assert "arrives as speed" in text


def test_an_unfinished_study_does_not_pass_for_a_whole_one(tmp_path: Path) -> None:
    """Lines of fewer seeds than the study has name them, and a figure names the rows that it shows."""
    path = tmp_path / "study-cpu.csv"
    about = {
        "part": "rows", "unit": "a row", "finished": True, "kind": "row", "profile": "cpu",
        "model": "teacher", "windows_retrained": 1920, "questions": 10, "machine_processor": "a CPU",
        "machine_threads": 1, "date": "2026-12-01", "version_torch": "2", "version_transformers": "5",
        "command": "python study", "mib": 9.0, "macs_cut": 2.0,
        "f1": 50.0, "f1_span": 60.0, "f1_loss": 1.0, "f1_span_loss": 2.0, "f1_loss_control": 3.0,
    }  # fmt: skip
    rows = []
    for row, retraining, seeds in (
        ("a", "none", 2), ("d", "cross-entropy", 1), ("e", "distilled", 2), ("g", "cross-entropy", 1),
        ("g", "distilled", 1),
    ):  # fmt: skip
        for seed in range(seeds):
            own = {"row": row, "retraining": retraining, "seed": seed, "layers": f"{2 - seed}/8 1/4 1/2"}
            rows.append({**about, **own})
    write_rows(path, rows)
    timed = {"study": path.name, "workload": "arrival-b8", "ms": 5.0, "speedup": 1.9, "rounds": 3}
    write_rows(tmp_path / "study-timings-cpu.csv", [{**row, **timed} for row in rows])
    results = study_figures.Results(path)
    text = "\n".join(study_page.section(results))
    assert "Teacher teacher; seeds 0, 1. " in text and "| a | - |" in text and "| e | distilled |" in text
    assert "| g (seed 0) | distilled |" in text and "| d (seed 0) | cross-entropy |" in text
    assert "F1 lost against the control: row g (seed 0) +3.0 (" in text
    assert " | row e keeps, by thirds of the layers: " in text
    assert "| e (seed 0) | 2/8 | 1/4 | 1/2 |" in text  # the shape of one model is no mean
    assert "span F1, rows a, e, g here" in study_figures.speed_figure(results).alt
    curve = {"kind": "curve", "on": "heads", "method": "l0", "fraction": 0.5, "seed": 2}
    write_rows(path, [*rows, {**about, **curve}])
    results = study_figures.Results(path)
    assert study_page.seeds_text(results).startswith("rows: seeds 0, 1; curves: seed 2. Intervals are 95%")
    assert study_figures.labelled(results, "g", results.row("g", "distilled")) == "g (seed 0)"
    (at_half,) = results.curve("heads", "l0").values()
    assert study_figures.labelled(results, "50%", at_half) == "50%"


def test_a_claim_on_a_share_is_judged_at_that_share(tmp_path: Path) -> None:
    """A quarter, which a study removes first, says nothing of half of the heads."""
    about = {"finished": True, "kind": "curve", "on": "heads", "method": "l0", "f1_loss": 1.0, "seed": 0}
    path = tmp_path / "study-cpu.csv"
    for fractions, judged in (((0.25,), 0), ((0.25, 0.5), 1)):
        write_rows(path, [{**about, "fraction": fraction} for fraction in fractions])
        text = study_claims.claims(study_figures.Results(path))
        assert sum("without 48% of its heads" in line for line in text) == judged


def _lasting(row: Row) -> Row:
    """What does not depend on the clock."""
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_another_study_is_refused(sources: tuple[str, Path], tmp_path: Path) -> None:
    open_study(TINY, *sources, tmp_path)
    with pytest.raises(ValueError, match="holds a study of another profile"):
        open_study(replace(TINY, gate_steps=7), *sources, tmp_path)


def test_results_of_another_study_are_not_gone_on_with(sources: tuple[str, Path], tmp_path: Path) -> None:
    study_squad.run(open_study(TINY, *sources, tmp_path / "one"), tmp_path, ())
    path = tmp_path / "study-tiny.csv"
    rows = [{**row, "finished": "True"} for row in read_rows(path)]
    study_squad.harness.write_rows(path, rows)
    other = open_study(replace(TINY, gate_steps=7), *sources, tmp_path / "other")
    with pytest.raises(ValueError, match="is of another study: windows_l0 is 192 there and 56 here"):
        study_squad.run(other, tmp_path, ())


def test_time_is_that_of_all_steps(tmp_path: Path) -> None:
    """Half of a training took half of the time."""
    (tmp_path / "checkpoint-5").mkdir()

    def work() -> int:
        torch.randn(300, 300).svd()
        return 7

    found, seconds = study_rows.timed_training(tmp_path, 10, work)
    assert found == 7 and seconds is not None and seconds > 0
    assert study_rows.timed_training(tmp_path, 5, work)[1] is None


@dataclass(frozen=True)
class _Joint:
    """What the joint row needs of a job."""

    settings: Any
    dense: Any = None
    clock: Any = None


def test_an_interrupted_joint_recipe_keeps_the_time_of_its_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gates were trained before the interruption, and are only read after it."""
    records: dict[str, Row] = {}
    phases: list[str] = []

    def once(name: str, work: Any) -> Row:
        if name not in records:
            records[name] = work()
        return records[name]

    def choose(*_: Any) -> Any:
        begun = time.process_time()
        while not phases and time.process_time() < begun + 0.05:
            pass
        phases.append("chosen")
        return SimpleNamespace(chosen=[SimpleNamespace(load=lambda dense: None, decision=None)])

    def train_on(*_: Any) -> Row:
        phases.append("trained on")
        if phases.count("trained on") == 1:
            raise KeyboardInterrupt
        return {}

    (tmp_path / "training").mkdir()
    plan = {"gate_steps": 4, "retrain_steps": 2, "planned_seconds": 1.0}
    monkeypatch.setattr(study_rows, "_equal_time", lambda *_: plan)
    monkeypatch.setattr(study_rows, "choose", choose)
    monkeypatch.setattr(study_rows, "_train_on", train_on)
    joint = _Joint(SimpleNamespace(gate_learning_rate=0.1))
    study: Any = SimpleNamespace(work=tmp_path, job=joint, job_for=lambda *_, **__: joint, once=once)
    with pytest.raises(KeyboardInterrupt):
        study_rows.joint_row(study, 0, {"macs_kept": 0.5})
    (row,) = study_rows.joint_row(study, 0, {"macs_kept": 0.5})["rows"]
    assert row["gate_seconds"] >= 0.05 and row["gate_steps"] == 4


class _Interrupted:
    """A value during whose writing Ctrl-C comes."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_results_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study goes on from its files: half a file would stop it for good."""
    rows, scores = tmp_path / "study.csv", tmp_path / "study.npz"
    write_rows(rows, [{"f1": 1}])
    save_arrays(scores, {"model/f1": np.ones(2)})

    def half(file: Any, **_: Any) -> None:
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(KeyboardInterrupt):
        write_rows(rows, [{"f1": 2}, {"f1": _Interrupted()}])
    with pytest.raises(KeyboardInterrupt):
        save_arrays(scores, {})
    assert read_rows(rows) == [{"f1": 1}]
    with np.load(scores) as arrays:
        assert arrays.files == ["model/f1"]
