"""Pruning from Python: one call for any head, with labels or without."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithPadding,
)

import pruned_trainer
from calls import HALF, TwoTowers, arguments, classifier, config, rows, unlabelled
from pruned_ops.models.stock import model_shape, running_encoder
from pruned_trainer import Decision, Distillation, PruneResult, Target
from pruned_trainer.jobs import call as call_module
from pruned_trainer.jobs import examples as examples_module
from pruned_trainer.jobs.evaluation import Judged
from pruned_trainer.jobs.examples import DatasetExamples
from pruned_trainer.jobs.rows import Rows, as_batch
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.output_kinds import OutputKind
from pruned_trainer.training.distillation_losses import HiddenProjection
from pruned_trainer.training.trainer import PruningTrainer
from tiny_tokenizers import word_tokenizer


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def test_a_classifier_is_pruned_in_one_call(tmp_path: Path) -> None:
    model = classifier(hidden_dropout_prob=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = tmp_path / "out"
    result = pruned_trainer.prune(
        model, HALF, rows(64), rows(40, 1), compute_metrics=accuracy, args=arguments(tmp_path), out=out
    )
    assert (
        isinstance(result, PruneResult)
        and type(result.model).__name__ == "PrunedBertForSequenceClassification"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.decision.reached["macs"] <= 0.5 and result.decision == Decision.load(out / "decision.json")
    report = json.loads((out / "report.json").read_text())
    assert report["pruned"]["accuracy"] == result.report["pruned"]["accuracy"]
    assert report["plan"]["gate_steps"] == 2 and report["plan"]["retrain_steps"] == 6
    lost = report["dense"]["accuracy"] - report["pruned"]["accuracy"]
    assert report["accuracy_loss"] == pytest.approx(lost)
    low, high = report["accuracy_loss_interval"]
    assert low <= lost <= high
    assert report["dense"]["agreement"] == 100 and 0 <= report["pruned"]["agreement"] <= 100
    assert report["speedup"]["reached"] > 0
    again = type(result.model).from_pretrained(out).eval()
    # What its own training needed is gone: it trains on as any other model.
    dropouts = []
    for one in (result.model, again):
        assert all(parameter.requires_grad for parameter in one.parameters())
        dropouts.append([module.p for module in one.modules() if isinstance(module, nn.Dropout)])
    assert dropouts[0] == dropouts[1] and 0.1 in dropouts[0]
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, result.model.eval()(**batch).logits)


def test_the_report_says_whose_rows_were_judged_on(tmp_path: Path) -> None:
    """Those of the evaluation dataset, or some that were held out of the training dataset; nobody chose a
    threshold on them."""
    for judged, name in ((rows(16, 1), "eval_dataset"), (None, "held-out validation examples")):
        result = pruned_trainer.prune(
            classifier(), HALF, rows(40), judged, recipe="random", gate_steps=None, retrain_steps=0
        )
        about = result.report["evaluated_on"]
        assert about["file"] == name and about["threshold_chosen_on_these"] is False


class _Begun(Exception):
    """Ends a call once its job is made."""


def begun(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    """The job of a call that ends before its training."""
    jobs = []

    def only_begin(settings: Any, begin: Any, **_: Any) -> None:
        jobs.append(begin(settings, None))
        raise _Begun

    monkeypatch.setattr(call_module, "run_for_one", only_begin)
    with pytest.raises(_Begun):
        pruned_trainer.prune(*args, **options)
    return jobs[0]


@pytest.mark.parametrize(
    ("more", "chooses"),
    [
        ({"recipe": "random", "compensate": "auto"}, True),
        ({"recipe": "random", "retrain_steps": 4, "average_steps": 0.5}, True),
        ({"recipe": "fast"}, True),
        ({"recipe": "fast", "compensate": "bias"}, False),
        ({"recipe": "random"}, False),
    ],
)
def test_nothing_is_chosen_on_the_rows_that_the_report_is_about(
    more: dict[str, Any], chooses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, judged = rows(40), rows(16, 1)
    job = begun(monkeypatch, classifier(), HALF, training, judged, **more)
    lists = [[data[k]["input_ids"] for k in range(len(data))] for data in (job.train, job.evaluation.rows)]
    assert lists[1] == [row["input_ids"] for row in judged]
    if not chooses:
        assert job.validation is job.evaluation and lists[0] == [row["input_ids"] for row in training]
        return
    chosen_on = [job.validation.rows[k]["input_ids"] for k in range(len(job.validation.rows))]
    assert len(chosen_on) == 2 and len(lists[0]) == 38
    assert sorted(lists[0] + chosen_on) == sorted(row["input_ids"] for row in training)


def test_what_is_counted_is_counted_on_the_rows_that_the_report_is_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where choices are made on others: budget, workload and report have the same lengths."""
    longer = [{**row, "input_ids": 3 * row["input_ids"]} for row in rows(16, 1)]
    job = begun(monkeypatch, classifier(), HALF, rows(40), longer, recipe="fast")
    lengths = job.evaluation.arrival_lengths()
    assert job.validation is not job.evaluation and job.budget.lengths == lengths
    assert sorted(length for batch in job.workload.batches for length in batch) == sorted(lengths)
    result: Any = SimpleNamespace(scores=dict)
    macs = Judged(job.dense, {}, result).to_json(job)["macs"]
    assert macs == model_shape(job.dense).macs(lengths) / len(lengths)


def test_the_rate_of_the_arguments_goes_to_each_training_that_there_is(tmp_path: Path) -> None:
    """Both of joint's, the narrow model's alone of a recipe without gates, and nothing's without steps."""
    call = call_module._Call(classifier(), None, None, None, arguments(tmp_path), None, None)
    for recipe, options, rates in (
        ("joint", {}, (1e-3, 1e-3)),
        ("joint", {"retrain_learning_rate": 5e-3}, (1e-3, 5e-3)),
        ("gain", {}, (PruneSettings.learning_rate, 1e-3)),
        ("random", {"retrain_steps": 0}, (PruneSettings.learning_rate, PruneSettings.retrain_learning_rate)),
    ):
        settings = call.settings(HALF, 64, False, recipe, tmp_path / "out", options)
        assert (settings.learning_rate, settings.retrain_learning_rate) == rates


@pytest.mark.parametrize(
    ("recipe", "more", "gates", "again"),
    [
        ("joint", {}, 25, 75),
        ("paper", {}, 12, 76),  # of either part
        ("paper", {"parts": ["ffn"]}, 25, 75),
        ("random", {}, None, 100),  # a choice by chance reads no windows
        ("joint", {"gate_steps": 40}, 40, 60),
        ("joint", {"gate_epochs": 5.0}, None, 60),
        ("paper", {"gate_epochs": 2.0, "gate_fraction": 0.5}, None, 84),
    ],
)
def test_the_steps_of_the_arguments_are_those_of_all_trainings(
    recipe: str, more: dict[str, Any], gates: int | None, again: int, tmp_path: Path
) -> None:
    steps = call_module._steps(arguments(tmp_path, 100), 64, 8, recipe, more)
    assert steps == {**({} if gates is None else {"gate_steps": gates}), "retrain_steps": again}


def test_epochs_of_gates_that_leave_no_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gate_epochs leaves none of the 100 steps of args"):
        call_module._steps(arguments(tmp_path, 100), 64, 8, "joint", {"gate_epochs": 13.0})


def test_a_token_s_one_logit_is_for_or_against() -> None:
    """The largest of one logit says nothing: every two models would agree."""
    own, other = ({"logits": np.array(values)[:, None]} for values in ([1.0, -2.0, 3.0], [0.5, 2.0, -1.0]))
    assert examples_module._agreed(OutputKind.TOKENS, own, other) == pytest.approx(1 / 3)
    assert examples_module._classes(own["logits"]).tolist() == [1, 0, 1]
    several = {"logits": np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])}
    assert examples_module._classes(several["logits"]).tolist() == [1, 0, 0]


def test_first_rows_without_a_labelled_token_have_no_loss_to_check() -> None:
    call = call_module._Call(BertForTokenClassification(config()), None, None, None, None, None, None)
    batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    assert call._check_loss({**batch, "labels": torch.tensor([[-100, -100]])}, 0.3)


class Embedder(nn.Module):
    """A model of one's own with no loss and no config."""

    def __init__(self) -> None:
        super().__init__()
        self.body = BertModel(config(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return {"embedding": (states * mask).sum(1) / mask.sum(1)}


class Configured(Embedder):
    """One that calls something else its config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(dropout=0.1)


def test_sizes_are_those_of_the_encoder_whatever_a_model_calls_its_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = begun(monkeypatch, Configured(), HALF, unlabelled(24), unlabelled(16), recipe="random")
    projection = HiddenProjection.attach(job.dense, job.teacher, Distillation())
    assert projection.matrix is None and projection.pairs == [(1, 1), (2, 2)]


@pytest.mark.parametrize("head", ["classes", "scores", "tokens", "embeddings"])
def test_without_labels_the_teacher_is_the_signal(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "classes": lambda: classifier(),
        "scores": lambda: classifier(num_labels=1),
        "tokens": lambda: BertForTokenClassification(config()),
        "embeddings": Embedder,
    }
    model = made[head]()
    result = pruned_trainer.prune(
        model, Target(params=0.6), unlabelled(48), unlabelled(24), gate_steps=3, retrain_steps=3
    )
    report = result.report
    for phase in ("gates", "retrain"):
        steps = [entry for entry in report["training"][phase] if "loss" in entry]
        assert {entry["loss_task"] for entry in steps} == {0.0}
        assert max(entry["loss_logits"] for entry in steps) > 0
    assert report["dense"]["agreement"] == pytest.approx(100)
    low, high = report["agreement_loss_interval"]
    assert low <= report["agreement_loss"] <= high and report["agreement_loss"] >= 0
    if head == "embeddings":
        assert type(result.model) is Embedder and type(result.model.body).__name__ == "PrunedBertModel"
    if head == "tokens":
        result.model.save_pretrained(tmp_path)
        assert AutoModelForTokenClassification.from_pretrained(tmp_path)


def test_rows_of_tensors_and_weights_of_half_precision(tmp_path: Path) -> None:
    """A dataset of torch's format gives numbers as tensors, too; what is trained is float32."""
    tensors = [{name: torch.tensor(value) for name, value in row.items()} for row in rows(24)]
    model = classifier().bfloat16()
    result = pruned_trainer.prune(model, HALF, tensors, tensors[:8], gate_steps=1, retrain_steps=1)
    assert result.model.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert "accuracy_loss" in result.report


def test_what_transformers_takes_several_labels_for(tmp_path: Path) -> None:
    """Floats for each class are several labels, also where neither config says so."""
    data = [{**row, "labels": [1.0, 0.0, 1.0]} for row in rows(24)]
    data.append({"input_ids": [5, 6, 7], "labels": [0.0, 1.0, 0.0]})  # as many tokens as labels
    teacher = classifier()
    result = pruned_trainer.prune(
        classifier(), HALF, data, data, teacher=teacher, gate_steps=1, retrain_steps=1,
        args=arguments(tmp_path),
    )  # fmt: skip
    assert result.model.config.problem_type == "multi_label_classification"
    assert teacher.config.problem_type is None and "agreement_loss" in result.report


def test_a_collator_sees_the_rows_as_they_are(tmp_path: Path) -> None:
    """Labels keep the name that the rows have for them, also where there are two."""
    padded = DataCollatorWithPadding(word_tokenizer(90))

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = padded([{"input_ids": row["input_ids"]} for row in batch])
        return {**ids, "labels": torch.tensor([row["label"] % 3 for row in batch])}

    data = [{"input_ids": row["input_ids"], "label": 3 + row["labels"]} for row in rows(24)]
    result = pruned_trainer.prune(
        classifier(), HALF, data, data[:8], data_collator=collate, compute_metrics=lambda predicted: {
            "gold": float(predicted.label_ids.sum())}, gate_steps=1, retrain_steps=1,
    )  # fmt: skip
    # What the metric gets is what the collator made of them, as in transformers' Trainer.
    assert result.report["dense"]["gold"] == sum(row["label"] % 3 for row in data[:8])
    both = [{**row, "label": 99} for row in rows(24)]  # a data set's own numbers beside the models'
    assert pruned_trainer.prune(classifier(), HALF, both, both, gate_steps=1, retrain_steps=1)


def test_a_text_of_unknown_tokens_alone_is_a_text() -> None:
    """As one of emoji alone is to many tokenizers."""
    data = [*rows(16), {"input_ids": [2, 1, 3], "labels": 0}]
    result = pruned_trainer.prune(
        classifier(), HALF, data, data, data_collator=DataCollatorWithPadding(word_tokenizer(90)),
        recipe="random", gate_steps=None, retrain_steps=0,
    )  # fmt: skip
    assert result.report["evaluated_on"]["examples"] == 17


def test_metrics_get_the_labels_that_the_collator_makes() -> None:
    """Numbers of names, also where rows lack that column; of tokens without padding, wherever that is."""
    names, padded = ["a", "b", "c"], DataCollatorWithPadding(word_tokenizer(90))

    def of_texts(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = padded([{"input_ids": row["input_ids"]} for row in batch])
        return {**ids, "labels": torch.tensor([names.index(row["tone"]) for row in batch])}

    def of_tokens(batch: list[dict[str, Any]]) -> dict[str, Any]:
        mask = torch.zeros(len(batch), 16, dtype=torch.long)
        filled = {"input_ids": mask.clone(), "labels": torch.full_like(mask, -100)}
        for place, row in enumerate(batch):
            length = len(row["input_ids"])
            for name, values in filled.items():
                values[place, 16 - length :] = torch.tensor(row[name])
            mask[place, 16 - length :] = 1
        return {**filled, "attention_mask": mask}

    def gold(data: list[dict[str, Any]], collate: Any, kind: OutputKind) -> Any:
        given = Rows(data, "evaluation dataset", renames=False)
        examples = DatasetExamples(given, as_batch(collate), ["labels"], None, 3, "mean", kind=kind)
        return examples.gold

    texts = rows(8)
    toned = [{"input_ids": row["input_ids"], "tone": names[row["labels"]]} for row in texts]
    found = gold(toned, of_texts, OutputKind.CLASSES)
    assert found.tolist() == [row["labels"] for row in texts]
    tagged = rows(8, per_token=True)
    found = gold(tagged, of_tokens, OutputKind.TOKENS)
    longest = max(len(row["labels"]) for row in tagged)
    assert found.tolist() == [row["labels"] + [-100] * (longest - len(row["labels"])) for row in tagged]
    assert gold(unlabelled(4), padded, OutputKind.CLASSES) is None


def test_a_loss_and_a_collator_of_ones_own(tmp_path: Path) -> None:
    """The texts are tokenised by the collator, and the loss is a function."""
    tokenizer = word_tokenizer(90)
    texts = [{"text": f"w{i % 7} w{i % 5} w3", "gold": i % 3} for i in range(40)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        encoded = tokenizer([row["text"] for row in batch], padding="longest", return_tensors="pt")
        return {**encoded, "gold": torch.tensor([row["gold"] for row in batch])}

    class Silent(BertForSequenceClassification):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, gold: Any = None
        ) -> Any:
            return {"logits": super().forward(input_ids, attention_mask, token_type_ids).logits}

    torch.manual_seed(0)
    result = pruned_trainer.prune(
        Silent(config(vocab_size=100)), HALF, texts, data_collator=collate,
        args=arguments(tmp_path, 4, label_names=["gold"], remove_unused_columns=False, logging_steps=1),
        distillation=Distillation(task=1.0, hidden=0.0), gate_steps=2, retrain_steps=2,
        loss=lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["gold"]),
    )  # fmt: skip
    assert type(result.model) is Silent
    training = result.report["training"]
    for phase in ("gates", "retrain"):
        assert min(entry["loss_task"] for entry in training[phase] if "loss" in entry) > 0


def test_an_interrupted_call_goes_on_where_it_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(out: Path | None, number: int = 24, **more: Any) -> PruneResult:
        args = arguments(tmp_path, save_steps=1)
        options = {"model": classifier(), "eval_dataset": rows(16, 1), **more}
        return pruned_trainer.prune(target=HALF, train_dataset=rows(number), args=args, out=out, **options)

    whole, step = call(None), PruningTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gate_phase is None and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"nothing is kept: with out="):
            call(None)
        with pytest.raises(KeyboardInterrupt, match=r"retrain phase after step 3; its checkpoint is .*out"):
            call(out)
    with pytest.raises(OSError, match="an earlier run was interrupted"):
        call(out)
    other: Any = classifier()
    other.classifier.bias.data += 1
    for name, changes in {
        "the training dataset": {"number": 23},
        "the evaluation dataset": {"eval_dataset": rows(16, 2)},
        "the model": {"model": other},
    }.items():
        with pytest.raises(ValueError, match=f"^{name} changed since .*out.partial was started"):
            call(out, resume=True, **changes)
    result = call(out, resume=True)
    assert result.decision == whole.decision
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.model.state_dict().items())


def test_rows_of_any_kind_have_a_digest() -> None:
    """Of ragged lists, bfloat16 and dictionaries, too; values count, and not how they are held."""

    def digest(**row: Any) -> str:
        return Rows([row], "training dataset").digest()

    for value, other in (
        ([[1, 2], [3]], [[1, 2], [4]]),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        ({"text": ["a"], "answer_start": [0]}, {"text": ["a"], "answer_start": [1]}),
        ("a\ud800", "b"),
        (None, 0),
    ):
        assert digest(input_ids=[5], more=value) == digest(more=value, input_ids=[5])
        assert digest(input_ids=[5], more=value) != digest(input_ids=[5], more=other)
    as_array, as_tensor = np.array([5, 6]), torch.tensor([5, 6])
    assert digest(input_ids=[5, 6]) == digest(input_ids=as_array) == digest(input_ids=as_tensor)
    assert digest(input_ids=[5], more=object()) == digest(input_ids=[5], more=object())


def test_the_encoder_that_is_named_is_pruned() -> None:
    torch.manual_seed(0)
    result = pruned_trainer.prune(
        TwoTowers(), HALF, unlabelled(24), unlabelled(16), encoder="passage", gate_steps=2, retrain_steps=2,
        recipe="joint",
    )  # fmt: skip
    assert type(result.model.query) is BertModel and type(result.model.passage).__name__ == "PrunedBertModel"
    assert result.report["speedup"]["reached"] > 0


def test_of_a_teacher_with_several_encoders_the_one_of_that_name_teaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its hidden states are compared, and not those of its first encoder."""
    taught = {"teacher": TwoTowers(), "encoder": "passage", "recipe": "random"}
    job = begun(monkeypatch, TwoTowers(), HALF, unlabelled(24), unlabelled(16), **taught)
    assert job.teacher is not job.dense and running_encoder(job.teacher) is job.teacher.passage
