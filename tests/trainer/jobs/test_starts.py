"""Runs that begin elsewhere than at the dense model and its gates: with the model of a larger target, or with
a decision that is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from head_models import stock
from inputs import padded_batch
from jobs import Killed, changed, job_settings, same_end, variant
from matching import trained_model
from pruned_trainer import Decision, SizeBudget, Target, attached, compact, decide
from pruned_trainer.cli import main
from pruned_trainer.jobs import prune as prune_module
from pruned_trainer.jobs.job import budget_for
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.decision import Kept, LayerDecision
from pruned_trainer.pruning.expand import close, expanded

TARGETS = (Target(macs=0.7), Target(macs=0.45))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return replace(job_settings(tmp_path_factory.mktemp("starts"), trained_model(steps=1)), retrain_steps=15)


@pytest.mark.parametrize(("kind", "head"), [("bert", "sequence"), ("roberta", "token")])
def test_an_expanded_model_computes_what_its_narrow_one_does(kind: str, head: str) -> None:
    """With the gates of what was removed closed, also for a model that was trained on; those gates stay
    closed under noise, and the others are as they begin."""
    model, batch = stock(kind, head), padded_batch((9, 3, 5), pad_token_id=1)
    with attached(model) as gates:
        for i, log_alpha in enumerate(gates.locations()):
            log_alpha.data = 4 * torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(i))
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.5), align=4)
        narrow = compact(model, decision)
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
        expected = narrow(**batch).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = expanded(model, narrow, decision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with attached(wide) as gates:
        close(gates, decision)
        real = batch["attention_mask"].bool() if head == "token" else ...
        with torch.no_grad():
            torch.testing.assert_close(wide(**batch).logits[real], expected[real], atol=1e-4, rtol=1e-4)
        gates.train().draw()
        for part in ("heads", "ffn"):
            for values, layer in zip(gates.values.of(part), decision.layers, strict=True):
                open_ones = set(values.nonzero().flatten().tolist())
                assert open_ones <= set(getattr(layer, part).indices)


def kept(out: Path) -> set[tuple[int, str, int]]:
    """Everything that a run's decision keeps."""
    decision = Decision.load(out / "decision.json")
    return {
        (number, part, index)
        for number, layer in enumerate(decision.layers)
        for part in ("heads", "ffn")
        for index in getattr(layer, part).indices
    }


def test_a_gradual_sweep_goes_from_model_to_model_and_resumes(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "gradual", targets=TARGETS, gradual=True, align=1, tensorboard=True)
    starts: list[Any] = []
    original = prune_module.choose

    def watched(job: Any, folder: Path, steps: int) -> Any:
        starts.append((job.earlier, steps))
        return original(job, folder, steps)

    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "choose", watched)
        summary = sweep(one)
    assert [point["folder"] for point in summary["points"]] == ["macs-0.7", "macs-0.45"]
    large, small = (one.out / target.name for target in TARGETS)
    assert kept(small) < kept(large)  # what was removed stays removed
    (first, first_steps), (second, second_steps) = starts
    assert first is None and first_steps + second_steps == settings.gate_steps
    trained = AutoModelForQuestionAnswering.from_pretrained(large).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in second.model.state_dict().items())
    assert not list(one.out.glob("stage-*"))
    boards = {file.parent.relative_to(one.out / "tensorboard") for file in one.out.rglob("events.out.*")}
    assert {*map(str, boards)} == {"stage-0/gates", "stage-1/gates", "retrain-macs-0.7", "retrain-macs-0.45"}
    assert len(json.loads((small / "report.json").read_text())["training"]["gates"]) > 20  # of both stages

    killed = replace(one, out=one.out.with_name("gradual-killed"))
    trainings = prune_module.retrain

    def dies(job: Any, narrow: Any, folder: Path, *rest: Any) -> Any:
        if "0.45" in folder.name:
            raise Killed
        return trainings(job, narrow, folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "retrain", dies)
        with pytest.raises(Killed):
            sweep(killed)
    sweep(replace(killed, resume=True))
    for name in ("macs-0.7", "macs-0.45"):
        same_end(killed.out / name, one.out / name)


def test_a_gradual_sweep_without_gates_scores_each_model_anew(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradual = variant(
        settings, "gradual-fast", recipe="fast", targets=TARGETS, gradual=True, align=1, compensate="none",
        gate_steps=2, retrain_steps=3,
    )  # fmt: skip
    begun: list[Any] = []
    original = prune_module.choose

    def watched(job: Any, folder: Path, steps: int) -> Any:
        choices = original(job, folder, steps)
        begun.append((steps, choices.chosen[0].decision, choices.chosen[0].load(job.dense)))
        return choices

    with monkeypatch.context() as patch:
        patch.setattr(prune_module, "choose", watched)
        sweep(gradual)
    large, small = (gradual.out / target.name for target in TARGETS)
    assert kept(small) < kept(large)
    (first_steps, before, _), (second_steps, decision, narrow) = begun
    assert first_steps == second_steps == 2  # minibatches, for each scoring
    trained = AutoModelForQuestionAnswering.from_pretrained(large)
    expected = compact(trained, decision.within(before)).state_dict()
    tensors = narrow.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="what an earlier decision removed cannot be kept"):
        before.within(decision)


def test_a_decision_is_trained_on(settings: PruneSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """The same one makes the same model again, and a report without gates."""
    first = variant(settings, "decided-first")
    prune(first)
    decided = json.loads((first.out / "decision.json").read_text())
    file = first.out.with_name("of-other-lengths.json")
    file.write_text(json.dumps({**decided, "reached": {"macs": 0.01}}))
    one = changed(
        first, out=first.out.with_name("decided"), targets=(), gate_steps=None, decision=file
    )  # fmt: skip
    report = prune(one)
    assert kept(one.out) == kept(first.out) and report["recipe"] == "decision"
    assert report["plan"]["gate_steps"] == 0 and report["training"]["gates"] == []
    assert report["target"]["asked"] == {"macs": 0.5}
    assert report["target"]["reached"]["macs"] == pytest.approx(decided["reached"]["macs"])
    assert (one.out / "report.html").is_file()
    new, missing = str(one.out.with_name("new")), str(one.out / "none.json")
    argv = ["prune", "--model", one.model, "--train-file", str(one.train_file), "--out", new]
    assert main([*argv, "--decision", missing]) == 2
    assert f"there is no file {missing}" in capsys.readouterr().err
    twice = {**decided, "layers": 2 * decided["layers"]}  # as of a model of twice the layers
    (one.out / "other.json").write_text(json.dumps(twice))
    cut = ["--max-length", "24", "--stride", "4"]
    assert main([*argv, *cut, "--decision", str(one.out / "other.json")]) == 2
    assert "the decision is for 4 layers, the model has 2" in capsys.readouterr().err
    assert not list(one.out.parent.glob("new*"))  # refused before there is anything to resume


def test_a_decision_that_cuts_hidden_dimensions_is_none_for_an_embedder(tmp_path: Path) -> None:
    heads, ffn, hidden = (Kept(tuple(range(size)), (1.0,) * size) for size in (4, 48, 16))
    Decision((LayerDecision(heads, ffn),) * 2, 1, {}, {}, hidden).save(tmp_path / "decision.json")
    fields = {"parts": ("heads", "ffn"), "compensation": "none", "targets": ()}
    for task in ("squad", "embedding"):
        settings: Any = SimpleNamespace(**fields, decision=tmp_path / "decision.json", task=task)
        if task == "squad":
            assert budget_for(settings, trained_model(), [5], None).dense.hidden_size == 32
        else:
            with pytest.raises(ValueError, match="cuts hidden dimensions, and an embedding is as wide"):
                budget_for(settings, trained_model(), [5], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradual": True}, "gradual goes from each target to the next: name two or more"),
        (
            {"gradual": True, "targets": TARGETS, "recipe": "gain"},
            "gradual chooses heads and ffn anew for each target: --recipe joint or fast",
        ),
        ({"decision": Path("d.json")}, "a decision has met its target: give one of the two"),
        ({"decision": Path("d.json"), "targets": ()}, "no recipe and no steps of gates go with it"),
        (
            {"decision": Path("d.json"), "targets": (), "gate_steps": None, "align": 4},
            "no parts, no align and no penalty go with it",
        ),
        (
            {"decision": Path("d.json"), "targets": (), "gate_steps": None, "parts": ("ffn",)},
            "no parts, no align and no penalty go with it",
        ),
    ],
)
def test_refusals(settings: PruneSettings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)
