"""Targets in measured time: the table, the budget that interpolates it, the choice held to a clock."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from jobs import changed, job_settings, variant
from matching import save_checkpoint, trained_model
from pruned_ops import LayerShape
from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_trainer import LatencyBudget, PerGate, Target, attached
from pruned_trainer.jobs import evaluation, job, timed_choice
from pruned_trainer.jobs import plan as planning
from pruned_trainer.jobs.job import Job, running, start
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.jobs.timed_choice import MEETS
from pruned_trainer.pruning import importance


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("targets"), trained_model(steps=100))


@pytest.fixture(scope="module")
def timed(settings: PruneSettings) -> Path:
    """The output of a run with a target in time, of a model whose FFN takes most of it."""
    wide = save_checkpoint(trained_model(steps=30, intermediate_size=4096), settings.out.with_name("wide"))
    shape = [LayerShape(4, 4096)] * 2
    lengths = Workload.fixed(14, 8, 4)
    table = measure_table(AutoConfig.from_pretrained(wide), lengths, rounds=2, progress=False)
    empty = table.predict([LayerShape(0, 0)] * 2) / table.predict(shape)
    # A quarter of what this machine has within reach; `prune` measures again, maybe under load.
    target = Target(speedup=round(1 + (1 / empty - 1) / 4, 2))
    one = variant(settings, "timed", targets=(target,), model=str(wide), align=8)
    with pytest.MonkeyPatch.context() as patch:  # a clock that agrees with the table, on any machine
        patch.setattr(
            timed_choice, "measured_fraction", lambda job, narrow, _: job.budget.fraction(narrow.config.shape)
        )
        prune(replace(one, gate_steps=10, retrain_steps=5))
    return one.out


def of_wide(settings: PruneSettings, timed: Path, name: str, target: Target) -> PruneSettings:
    """Another job on the model and the table of `timed`."""
    model, table = str(timed.with_name("wide")), timed / "latency.json"
    return variant(settings, name, model=model, targets=(target,), latency_table=table)


def test_a_target_in_time(timed: Path) -> None:
    """Asked, reached, the table with its error; nothing about how fast this machine is."""
    report = json.loads((timed / "report.json").read_text())
    asked = report["speedup"]["asked"]
    assert report["target"]["asked"] == {"speedup": asked} and asked > 1
    assert report["target"]["reached"] == {"speedup": report["speedup"]["reached"]}
    assert report["speedup"]["workload"] == "arrival-b8"
    table = LatencyTable.load(timed / "latency.json")
    said = report["latency_table"]
    for name in ("dense", "pruned"):
        one = said[name]
        assert one["error"] == pytest.approx(one["predicted_ms"] / one["measured_ms"] - 1)
        assert one["measured_ms"] == pytest.approx(
            report[name]["workloads"]["arrival-b8"]["ms"]["p50"], abs=1e-3
        )
    dense = said["dense"]["predicted_ms"]
    assert dense == pytest.approx(table.base_ms + 2 * (table.attention[-1][1] + table.ffn[-1][1]))
    assert said["predicted_speedup"] > 1


def test_milliseconds(timed: Path, settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target in milliseconds, to its end; what is reached is measured."""
    dense = json.loads((timed / "report.json").read_text())["latency_table"]["dense"]["predicted_ms"]
    asked = Target(latency_ms=0.8 * dense)
    one = changed(of_wide(settings, timed, "ms", asked), gate_steps=5, retrain_steps=0, align=8)
    monkeypatch.setattr(
        timed_choice, "measured_fraction", lambda job, narrow, _: job.budget.fraction(narrow.config.shape)
    )
    report = prune(one)
    assert report["target"]["asked"] == {"latency_ms": asked.value} and report["speedup"]["asked"] is None
    (workload,) = report["pruned"]["workloads"].values()
    reached = report["target"]["reached"]["latency_ms"]
    assert reached == pytest.approx(workload["ms"]["p50"], abs=1e-3)
    assert report["latency_table"]["pruned"]["predicted_ms"] <= asked.value


def test_the_clock_s_fraction(timed: Path, settings: PruneSettings) -> None:
    """The dense model against itself: a positive number, whatever the machine."""
    job = start(of_wide(settings, timed, "clock", Target(speedup=1.01)))
    assert timed_choice.measured_fraction(job, copy.deepcopy(job.dense), job.settings.targets[0]) > 0


@pytest.mark.parametrize("target", [Target(speedup=1.5), Target(latency_ms=80.0)])
def test_a_slow_machine_times_choices_on_fewer_batches(
    target: Target, timed: Path, settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured on an evenly spread part of the batches is of the whole workload's mean batch, and the
    plan knows how long it takes."""
    job = start(of_wide(settings, timed, f"few-{target.unit}", Target(speedup=1.01)))
    workload = Workload("w", tuple((tokens,) for tokens in range(1, 17)))
    job = replace(job, workload=workload, settings=replace(job.settings, targets=(target,)))
    job.budget.total = 100.0  # milliseconds of a batch

    def by_tokens(runners: Any, workload: Workload, *_: Any, **__: Any) -> dict[str, Timing]:
        seen.append(workload)
        seconds = {"dense": 0.1 * workload.tokens / 8.5, "narrow": 0.06 * workload.tokens / 8.5}
        return {name: Timing(workload, (seconds[name],)) for name in runners}

    seen: list[Workload] = []
    monkeypatch.setattr(timed_choice, "interleave", by_tokens)
    both = 100 * (1 + job.budget.allowed_fraction(target)) / 1000
    for batches, most in ((16, 1e3), (4, 4.5 * (timed_choice.ROUNDS + 1) * both), (1, 1e-3)):
        monkeypatch.setattr(timed_choice, "MOST_SECONDS", most)
        assert timed_choice.measured_fraction(job, copy.deepcopy(job.dense), target) == pytest.approx(0.6)
        assert len(seen[-1].batches) == batches
        expected = planning.TIMED_CHOICES * batches * (timed_choice.ROUNDS + 1) * both
        assert planning._deciding_seconds(job) == pytest.approx(expected)
    assert seen[1].batches == ((3,), (7,), (11,), (15,))


def test_what_is_served_in_int8_is_measured_in_int8(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, decision, timing and the pruned model's scores, on the threads that were asked for."""
    runs: list[tuple[str | None, int]] = []

    def seen(job: Job, narrow: Any, target: Target) -> float:
        runs.append((job.settings.served_dtype, torch.get_num_threads()))
        return job.budget.fraction(narrow.config.shape)

    monkeypatch.setattr(timed_choice, "measured_fraction", seen)
    judged: list[tuple[str, frozenset[str]]] = []
    score = evaluation.Judged

    def scored(model: Any, *rest: Any) -> Any:
        judged.append((type(model).__name__, model.base_model.packed.encoder.int8_linears)
                      if packed_encoders(model) else (type(model).__name__, frozenset()))  # fmt: skip
        return score(model, *rest)

    monkeypatch.setattr(evaluation, "Judged", scored)
    one = variant(settings, "int8", targets=(Target(speedup=1.02),), dtype="int8", threads=1, recipe="random",
                  gate_steps=None)  # fmt: skip
    report = prune(changed(one, retrain_steps=0))
    assert LatencyTable.load(one.out / "latency.json").dtype == "int8"
    assert LatencyTable.load(one.out / "latency.json").machine["threads"] == 1
    assert runs and {dtype for dtype, _ in runs} == {"int8"}
    speed = report["speedup"]
    assert speed["dtype"] == "int8" and speed["against_hugging_face"] > 0
    assert speed["interval"][0] <= speed["reached"] <= speed["interval"][1]
    assert report["machine"]["threads"] == 1
    (dense, nothing), (pruned, quantised) = judged
    assert (dense, pruned) == ("BertForQuestionAnswering", "PrunedBertForQuestionAnswering")
    assert not nothing and len(quantised) > 0


def test_the_dense_model_is_timed_as_it_would_be_served_while_it_teaches(
    timed: Path, settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of gates runs it in a dtype of its own, which it has again after the timing."""
    target = Target(speedup=1.01)
    job = start(of_wide(settings, timed, "taught", target))
    narrow, seen = copy.deepcopy(job.dense), list[list[str | None]]()

    def dtypes(runners: Any, workload: Workload, *_: Any, **__: Any) -> dict[str, Timing]:
        both = [*packed_encoders(job.dense), *packed_encoders(narrow)]
        seen.append([packed.linear_dtype for packed in both])
        return {name: Timing(workload, (0.1,)) for name in runners}

    monkeypatch.setattr(timed_choice, "interleave", dtypes)
    with running(job.teacher) as teacher:
        assert teacher is job.dense
        for dtype in ("int8", "fp32"):
            served = replace(job, settings=replace(job.settings, dtype=dtype))
            timed_choice.measured_fraction(served, narrow, target)
            assert [packed.linear_dtype for packed in packed_encoders(job.dense)] == [None]
    assert seen == [["int8", "int8"], [None, None]] and not packed_encoders(job.dense)


def test_what_cannot_be_served_is_refused_first(settings: PruneSettings, tmp_path: Path) -> None:
    relu = save_checkpoint(trained_model(steps=1, hidden_act="relu"), tmp_path / "relu")
    one = variant(settings, "relu", targets=(Target(speedup=1.1),), dtype="int8", model=str(relu))
    with pytest.raises(ValueError, match="cannot be served in int8 here: int8 takes a float32 model"):
        prune(one)
    for wrong, message in (({"dtype": "fp8"}, "dtype is 'fp8'"), ({"threads": 0}, "threads is 0")):
        with pytest.raises(ValueError, match=message):
            variant(settings, "wrong", **wrong)


def test_what_no_kernel_here_computes_is_refused_first(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeBERTa on a GPU, which could be trained there, and not scored."""
    monkeypatch.setattr(job, "refuse_encoder", lambda *_: "no kernel for a GPU does that")
    with pytest.raises(ValueError, match="cannot be scored and timed on cpu: no kernel for a GPU does that"):
        prune(variant(settings, "refused"))


def test_a_last_timing_that_falls_short_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Short of the target, too noisy to say, and right."""
    for asked, interval, words in (
        (2.0, (1.90, 1.94), "falls short of the 2x that the decision was timed at: 1.92x (1.90 to 1.94)"),
        (2.0, (1.70, 2.10), "the last timing is noisy: 1.92x (1.70 to 2.10)"),
        (1.9, (1.90, 1.94), ""),
        (None, (1.90, 1.94), ""),
    ):
        evaluation._say_what_falls_short(asked, 1.92, interval)
        said = capsys.readouterr().out
        assert words in said and bool(said) == bool(words)


def test_the_table_of_a_run_is_used_again(
    timed: Path, settings: PruneSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """No second measurement; another machine's, another version's, another model's is refused by name."""
    again = variant(
        settings,
        "again",
        model=str(timed.with_name("wide")),
        targets=(Target(latency_ms=1e4),),
        latency_table=timed / "latency.json",
        align=8,
    )
    with pytest.raises(ValueError, match="the dense model costs no more than that"):
        prune(again)
    assert "measuring how long each part" not in capsys.readouterr().out
    data = json.loads((timed / "latency.json").read_text())
    for place, key, value, message in (
        ("machine", "processor", "Abacus", "Abacus"),
        ("versions", "torch", "1.0.0", "1.0.0"),
        (None, "dtype", "bfloat16", "bfloat16"),
    ):
        changed = json.loads(json.dumps(data))
        (changed if place is None else changed[place])[key] = value
        other = settings.out.with_name("other.json")
        other.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{message}.*make it again: pruned-ops latency-table"):
            prune(replace(again, latency_table=other))


def test_a_speedup_beyond_reach_says_what_is_within(timed: Path, settings: PruneSettings) -> None:
    one = variant(
        settings,
        "far",
        model=str(timed.with_name("wide")),
        targets=(Target(speedup=500.0),),
        latency_table=timed / "latency.json",
    )
    with pytest.raises(ValueError, match=r"500x the dense speed cannot be met.*speedup \d+\.\d+x is the lim"):
        prune(one)
    assert not one.out.with_name("far.partial").exists()


POINTS: dict[str, Any] = {
    "attention": ((0, 1.0), (4, 9.0)), "ffn": ((0, 1.0), (16, 2.0), (48, 10.0)), "base_ms": 2.0,
}  # fmt: skip


def test_expected_latency_is_the_table_s(timed: Path) -> None:
    """All gates open cost what `predict` says; between measured points the gradient is the slope."""
    table = LatencyTable.load(timed / "latency.json")
    table = replace(table, **POINTS)
    model = trained_model(steps=1)
    with attached(model) as gates:
        budget = LatencyBudget(gates.shape, table)
        counts = PerGate.full(gates.shape, 1.0)
        assert float(budget.expected(counts)) == pytest.approx(1.0)
        counts.ffn[0] = torch.full((48,), 0.5, requires_grad=True)
        counts.heads[1] = torch.zeros(4)
        expected = budget.expected(counts)
        # A tenth of the straight line is mixed in: 4 ms of the curve, 5.5 of the line.
        assert float(expected.detach()) == pytest.approx((2 + 9 + 1 + (0.9 * 4.0 + 0.1 * 5.5) + 10) / 40)
        (slope,) = torch.autograd.grad(expected, [counts.ffn[0]])
    assert slope.tolist() == pytest.approx([(0.9 * 0.25 + 0.1 * 9 / 48) / 40] * 48)
    assert (
        budget.allowed_fraction(Target(speedup=4.0)) == 0.25
        and budget.allowed_fraction(Target(latency_ms=10.0)) == 0.25
    )
    with pytest.raises(ValueError, match="not held by a budget of measured time"):
        budget.allowed_fraction(Target(macs=0.5))


def test_a_choice_is_corrected_until_its_measured_time_meets_the_target(
    settings: PruneSettings, timed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a clock that contradicts the table by a fifth; and one that no choice can satisfy."""
    file = settings.out.with_name("points.json")
    replace(LatencyTable.load(timed / "latency.json"), **POINTS).save(file)
    target = Target(speedup=1.3)
    job = start(variant(settings, "clocked", targets=(target,), latency_table=file, align=1))
    scores = importance.score("random", job.dense, [], job.budget, ["heads", "ffn"])
    asked = []

    def clock(_: Any, narrow: Any, __: Any) -> float:
        asked.append(job.budget.fraction(narrow.config.shape))
        return asked[-1] * 1.2

    monkeypatch.setattr(timed_choice, "measured_fraction", clock)
    decision = timed_choice.decide_in_time(job, job.dense, scores, target)
    reached = 1.2 * job.budget.fraction(decision.shape(job.budget.dense))
    assert 1 / 1.3 * MEETS[0] <= reached <= 1 / 1.3 and 2 <= len(asked) <= timed_choice.ATTEMPTS
    monkeypatch.setattr(timed_choice, "measured_fraction", lambda *_: 0.9)
    with pytest.raises(ValueError, match="no choice took at most 0.769 .* the fastest took 0.900"):
        timed_choice.decide_in_time(job, job.dense, scores, target)


def test_a_choice_that_is_too_slow_is_not_made_again(
    settings: PruneSettings, timed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads alone, of which each is 5% of the time: what is asked of the table lies between two choices."""
    file = settings.out.with_name("heads.json")
    replace(LatencyTable.load(timed / "latency.json"), **POINTS).save(file)
    target = Target(speedup=1 / 0.9)
    one = variant(settings, "heads", targets=(target,), latency_table=file, align=1, parts=("heads",))
    job = start(one)
    scores = importance.score("random", job.dense, [], job.budget, ["heads"])
    asked = list[float]()

    def clock(_: Any, narrow: Any, __: Any) -> float:
        asked.append(job.budget.fraction(narrow.config.shape))
        return asked[-1] * 1.07

    monkeypatch.setattr(timed_choice, "measured_fraction", clock)
    decision = timed_choice.decide_in_time(job, job.dense, scores, target)
    assert job.budget.fraction(decision.shape(job.budget.dense)) == pytest.approx(0.8)
    assert asked == pytest.approx([0.85, 0.8])
