"""Training: the losses, the Lagrangian, gates with teeth, and the whole job on a 2-layer model in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, set_seed

import pruned_ops
from inputs import padded_batch, stock_model
from jobs import job_settings
from matching import WORDS, accuracy, batch_of, trained_model
from pruned_ops.models.configuration import ScoreCalibration
from pruned_trainer import (
    Decision,
    Distillation,
    HoldTarget,
    PruningTrainer,
    SizeBudget,
    Target,
    attached,
    compact,
    decide,
)
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.output_kinds import comparable_outputs, divergences
from pruned_trainer.tasks.squad.task import Questions
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.distillation_losses import HiddenProjection, hidden_loss
from pruned_trainer.training.phase import prepare_student, training_arguments
from pruned_trainer.training.trainer import last_checkpoint

HEADS, FFN = 4, 48  # of the trained model
PLANTED_HEADS, PLANTED_FFN = 4, 48  # useless ones put beside them


@pytest.fixture(scope="module")
def trained() -> BertForQuestionAnswering:
    model = trained_model()
    assert accuracy(model) > 0.95
    return model


def with_planted(model: BertForQuestionAnswering) -> BertForQuestionAnswering:
    """The same function with twice the heads and FFN units: each second half is random and goes nowhere.

    A pruned class holds it, because its heads (8 of 8 columns) are wider together than hidden_size (32).
    """
    config = pruned_ops.PrunedBertConfig(
        **{
            **model.config.to_dict(),
            "num_attention_heads": HEADS + PLANTED_HEADS,
            "intermediate_size": FFN + PLANTED_FFN,
        },
        head_dim=32 // HEADS,
    )
    torch.manual_seed(7)
    wide = pruned_ops.PrunedBertForQuestionAnswering(config).eval()
    state = wide.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            into = state[name]
            if name.endswith(("attention.output.dense.weight", "output.dense.weight")):
                into.zero_()[:, : tensor.size(1)] = tensor
            elif into.shape != tensor.shape:
                into[: tensor.size(0)] = tensor
            else:
                into.copy_(tensor)
    return wide


def features(questions: int, seed: int) -> list[dict[str, Any]]:
    batch = batch_of(questions, torch.Generator().manual_seed(seed))
    rows = [{name: tensor[i].tolist() for name, tensor in batch.items()} for i in range(questions)]
    return rows


def gate_trainer(
    model: Any, teacher: Any, gates: Any, budget: SizeBudget, target: Target, steps: int, folder: Path
) -> Any:
    return PruningTrainer(
        model,
        training_arguments(folder, steps, 32, 1e-4, 0),
        Distillation(task=1.0, logits=1.0, hidden=0.0),
        teacher=teacher,
        gate_phase=HoldTarget(gates, budget, [target.value]),
        train_dataset=features(2000, 1),
        data_collator=partial(pad_batch, pad_token_id=0),
    )


def at_the_end(trainer: PruningTrainer) -> float:
    """The expected budget in the last entry of the trainer's log, the mean of a twentieth of the steps."""
    return float([entry["expected"] for entry in trainer.state.log_history if "expected" in entry][-1])


def planted_share(decision: Decision) -> float:
    """Share of what is kept that is planted."""
    kept = planted = 0
    for layer in decision.layers:
        kept += len(layer.heads.indices) * 8 + len(layer.ffn.indices)
        planted += sum(i >= HEADS for i in layer.heads.indices) * 8 + sum(i >= FFN for i in layer.ffn.indices)
    return planted / kept


def test_gates_have_teeth(trained: BertForQuestionAnswering, tmp_path: Path) -> None:
    """L0 closes what was planted and keeps the function; a random choice of the same size does neither."""
    wide, teacher = with_planted(trained), pruned_ops.optimize(with_planted(trained))
    assert accuracy(wide) == accuracy(trained)
    with attached(wide) as gates:
        budget, target = SizeBudget(gates.shape, "params"), Target(params=0.42)
        trainer = gate_trainer(wide, teacher, gates, budget, target, 150, tmp_path)
        trainer.train()
        chosen = decide(gates.scores(), budget, target, align=1)
        for i, log_alpha in enumerate(gates.locations()):
            log_alpha.data = torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(i))
        random = decide(gates.scores(), budget, target, align=1)
    assert at_the_end(trainer) == pytest.approx(target.value, abs=0.01)  # the Lagrangian held it
    assert planted_share(chosen) < 0.1 < 0.35 < planted_share(random)
    assert accuracy(compact(wide, chosen)) > 0.8
    assert accuracy(compact(wide, random)) < 0.5


def test_the_lagrangian_follows_its_target(tmp_path: Path) -> None:
    """With nothing else to learn from, the expected budget goes where the target is."""
    model = stock_model(hidden_size=32, num_hidden_layers=1, vocab_size=WORDS + 4)
    with attached(model) as gates:
        budget, target = SizeBudget(gates.shape, "params"), Target(params=0.5)
        trainer = gate_trainer(model, model, gates, budget, target, 120, tmp_path)
        trainer.teaching.distillation = Distillation(task=1e-6, logits=0.0, hidden=0.0)
        trainer.train()
        start = trainer.gate_phase.start
    logged = [entry["wanted"] for entry in trainer.state.log_history if "wanted" in entry]
    assert logged[0] == pytest.approx(start, abs=0.02) and logged[-1] == pytest.approx(0.5)
    assert logged == sorted(logged, reverse=True)
    assert at_the_end(trainer) == pytest.approx(0.5, abs=0.01)


def logits_loss(student: Any, teacher: Any, real: torch.Tensor, temperature: float) -> torch.Tensor:
    own, wanted = (comparable_outputs(outputs, None, real) for outputs in (student, teacher))
    return divergences(own, wanted, real, temperature).mean()


def test_distillation_losses() -> None:
    """Zero for equals, the closed form for KL and squares, blind to padding."""
    batch = padded_batch((6, 3))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a = stock_model(seed=0)(**batch, output_hidden_states=True)
        b = stock_model(seed=1)(**batch, output_hidden_states=True)
    every = HiddenProjection([(1, 1), (2, 2), (3, 3)], None)
    assert float(logits_loss(a, a, real, 2.0)) == 0
    assert float(hidden_loss(a.hidden_states, a.hidden_states, real, every)) == 0
    by_hand = 0.0
    for row, length in enumerate((6, 3)):
        for s, t in ((a.start_logits, b.start_logits), (a.end_logits, b.end_logits)):
            p, q = (t[row, :length] / 3).softmax(-1), (s[row, :length] / 3).softmax(-1)
            by_hand += float((p * (p / q).log()).sum()) * 9 / 4
    assert float(logits_loss(a, b, real, 3.0)) == pytest.approx(by_hand, rel=1e-4)
    squares = [
        (x - y)[row][real[row]].square().mean()
        for x, y in zip(a.hidden_states[1:], b.hidden_states[1:], strict=True)
        for row in range(2)
    ]
    found = float(hidden_loss(a.hidden_states, b.hidden_states, real, every))
    assert found == pytest.approx(float(sum(squares)) / len(squares), rel=1e-4)
    a.start_logits[1, 4] = 1e9  # at padding
    assert torch.isfinite(logits_loss(a, b, real, 3.0))


def test_distillation_is_validated() -> None:
    for bad in ({"task": -1.0}, {"task": 0.0, "logits": 0.0, "hidden": 0.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            Distillation(**bad)
    with pytest.raises(ValueError, match="need a teacher"):
        PruningTrainer(stock_model(), training_arguments(Path("x"), 1, 1, 1e-4, 0), Distillation())


def test_a_loss_that_is_no_number_stops_with_the_step(tmp_path: Path) -> None:
    model = trained_model(steps=1)
    with torch.no_grad():
        model.qa_outputs.bias.fill_(float("nan"))
    trainer = PruningTrainer(
        model,
        training_arguments(tmp_path, 3, 8, 1e-4, 0),
        Distillation(task=1.0, logits=0.0, hidden=0.0),
        train_dataset=features(32, 0),
        data_collator=partial(pad_batch, pad_token_id=0),
    )
    with pytest.raises(FloatingPointError, match="at step 0 .*learning rate"):
        trainer.train()


def test_prepare_student() -> None:
    model = stock_model()
    prepare_student(model, 0.0, train_embeddings=False)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.bert.embeddings.position_embeddings.weight.requires_grad


@pytest.fixture(scope="module")
def settings(trained: BertForQuestionAnswering, tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("job"), trained)


def test_the_whole_job(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """From gates to a published folder, and what is on disk is what was measured. Thresholds are chosen on
    the 60 validation questions, and never on the 100 that judge the models."""
    chosen_on: list[int] = []
    for name in ("best_thresholds", "best_fields"):
        original = getattr(Questions, name)

        def counted(self: Questions, model: Any, original: Any = original) -> Any:
            chosen_on.append(len(self))
            return original(self, model)

        monkeypatch.setattr(Questions, name, counted)
    report = prune(settings)
    assert chosen_on == [60, 60]  # of the dense model, and of the pruned one
    out = settings.out
    written = json.loads((out / "report.json").read_text())
    for name in ("dense", "pruned"):
        assert written[name]["f1"] == report[name]["f1"]
        assert set(written[name]) >= {"f1", "exact", "f1_span", "params", "macs", "bytes", "workloads"}
        (workload,) = written[name]["workloads"].values()
        assert set(workload["ms"]) == {"p20", "p50", "p80"}
        assert workload["backends"] == {"embed_layer_norm": "cpu", "encoder": "cpu"}
    speed = written["speedup"]
    assert {*speed} == {"asked", "reached", "interval", "against_hugging_face", "workload", "dtype"}
    assert 0 < speed["interval"][0] <= speed["reached"] <= speed["interval"][1]
    assert written["dense"]["f1_span"] > 95 and written["pruned"]["f1_span"] > 60
    assert written["f1_loss"] == pytest.approx(written["dense"]["f1"] - written["pruned"]["f1"])
    assert written["f1_loss_interval"][0] <= written["f1_loss"] <= written["f1_loss_interval"][1]
    decision = Decision.load(out / "decision.json")
    assert decision.reached["macs"] <= 0.5 and written["command"] == "pruned-trainer prune --as-a-test"
    model = AutoModelForQuestionAnswering.from_pretrained(out)
    assert (
        list(model.config.layer_shapes)
        == written["shape"]
        == [{"num_heads": d.shape.num_heads, "ffn_width": d.shape.ffn_width} for d in decision.layers]
    )
    assert model.config.null_score_threshold == written["pruned"]["null_score_threshold"]
    assert ScoreCalibration.parse(model.config.score_calibration) != ScoreCalibration()
    assert (out / "tokenizer.json").read_bytes() == (Path(settings.model) / "tokenizer.json").read_bytes()
    for name in ("dense", "pruned"):
        assert len(json.loads((out / f"predictions-{name}.json").read_text())) == 100
    assert not out.with_name("out.partial").exists()
    assert written["pruned"]["macs"] / written["dense"]["macs"] == pytest.approx(
        decision.reached["macs"], rel=1e-6
    )


class Tied(nn.Module):
    """A model of one's own whose outputs are made by the word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = trained_model(steps=1).bert
        self.words = nn.Linear(32, WORDS + 4, bias=False)
        self.words.weight = self.body.embeddings.word_embeddings.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, Any]:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"loss": self.words(states).square().mean()}


def test_a_module_with_weights_in_two_places_has_checkpoints(tmp_path: Path) -> None:
    trainers = [
        PruningTrainer(
            Tied(),
            training_arguments(tmp_path, 2, 8, 1e-3, 0, save_strategy="steps", save_steps=1),
            Distillation.none(),
            train_dataset=features(8, 1),
            data_collator=partial(pad_batch, pad_token_id=0),
        )
        for _ in range(2)
    ]
    trainers[0].train()
    trainers[1].train_from(last_checkpoint(tmp_path))
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert trainers[1].model.words.weight is trainers[1].model.body.embeddings.word_embeddings.weight


def test_same_seed_steps_and_data_give_the_same_result(settings: PruneSettings) -> None:
    states = []
    for name in ("first", "second"):
        one = replace(settings, out=settings.out.with_name(name), gate_steps=6, retrain_steps=6)
        prune(one)
        model = AutoModelForQuestionAnswering.from_pretrained(one.out)
        states.append((model.state_dict(), (one.out / "decision.json").read_text()))
    assert states[0][1] == states[1][1]
    for name, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][name]), name


def test_without_files_of_its_own_the_training_file_serves(settings: PruneSettings) -> None:
    one = replace(
        settings,
        out=settings.out.with_name("alone"),
        validation_file=None,
        eval_file=None,
        gate_steps=2,
        retrain_steps=2,
    )
    report = prune(one)
    about = report["evaluated_on"]
    assert about["file"] == "held-out validation questions"
    assert about["questions"] == 600 // 8  # one of the articles, of which all are larger than 5% of the file
    set_seed(0)
