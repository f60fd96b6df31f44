"""Pruning from Python: one call for any head, with labels or without, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithPadding,
    TrainingArguments,
)

import pruned_trainer
from head_models import SIZES
from pruned_trainer import Decision, Distillation, PruneResult, Target
from pruned_trainer.training.trainer import PruningTrainer
from tiny_tokenizers import word_tokenizer

DENSE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
HALF = Target(macs=0.5)


def config(**more: Any) -> BertConfig:
    return BertConfig(**{**SIZES, **DENSE, **more})


def classifier(**more: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(config(**more)).eval()


def rows(number: int, seed: int = 0, per_token: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Texts of which the first token says the label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(4, 12, (number,), generator=generator).tolist():
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        labels = [token % 3 for token in ids]
        made.append({"input_ids": ids, "labels": labels if per_token else labels[1], **more})
    return made


def unlabelled(number: int) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in rows(number)]


def arguments(folder: Path, steps: int = 8, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=8, **more,
    )  # fmt: skip


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def test_a_classifier_is_pruned_in_one_call(tmp_path: Path) -> None:
    model = classifier()
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
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, result.model.eval()(**batch).logits)


class Embedder(nn.Module):
    """A model of one's own with no loss and no config."""

    def __init__(self) -> None:
        super().__init__()
        self.body = BertModel(config(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = self.body(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return {"embedding": (states * mask).sum(1) / mask.sum(1)}


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
    assert all(entry.get("loss_task", 0) == 0 for entry in report["training"]["retrain"])
    assert report["dense"]["agreement"] == pytest.approx(100)
    low, high = report["agreement_loss_interval"]
    assert low <= report["agreement_loss"] <= high and report["agreement_loss"] >= 0
    if head == "embeddings":
        assert type(result.model) is Embedder and type(result.model.body).__name__ == "PrunedBertModel"
    if head == "tokens":
        result.model.save_pretrained(tmp_path)
        assert AutoModelForTokenClassification.from_pretrained(tmp_path)


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
        args=arguments(tmp_path, 4, label_names=["gold"], remove_unused_columns=False),
        distillation=Distillation(task=1.0, hidden=0.0), gate_steps=2, retrain_steps=2,
        loss=lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["gold"]),
    )  # fmt: skip
    assert type(result.model) is Silent
    assert all(entry["loss_task"] > 0 for entry in result.report["training"]["gates"] if "loss_task" in entry)


class TwoTowers(nn.Module):
    """Two encoders and a loss between them; only the second is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = (BertModel(config(), add_pooling_layer=False) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        pair = [tower(input_ids, attention_mask)[0][:, 0] for tower in (self.query, self.passage)]
        return {"loss": (pair[0] - pair[1]).square().mean(), "embedding": torch.cat(pair, -1)}


def test_the_encoder_that_is_named_is_pruned() -> None:
    torch.manual_seed(0)
    result = pruned_trainer.prune(
        TwoTowers(), HALF, unlabelled(24), unlabelled(16), encoder="passage", gate_steps=2, retrain_steps=2,
        recipe="joint",
    )  # fmt: skip
    assert type(result.model.query) is BertModel and type(result.model.passage).__name__ == "PrunedBertModel"
    assert result.report["speedup"]["reached"] > 0


class Detached(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss.detach()
        return output


def without_mask(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"][:4] for row in batch])}


GOOD = rows(16)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": (
        {"train_dataset": [{"text": "a"}] * 4}, r"training dataset has no column input_ids \(it has text\)",
    ),
    "no rows": ({"train_dataset": []}, "training dataset has no rows"),
    "no dictionaries": ({"train_dataset": [(1, 2)] * 4}, "row 0 of the training dataset is a tuple"),
    "one row without": (
        {"eval_dataset": [*GOOD[:2], {"labels": 1}, *GOOD[2:]]}, "row 2 of the evaluation dataset has no",
    ),
    "label outside": (
        {"eval_dataset": [*GOOD, {"input_ids": [7, 8], "labels": 3}]},
        r"row 16 of the evaluation dataset has the label 3, .*3 labels \(0 to 2\)",
    ),
    "label as text": (
        {"train_dataset": [*GOOD, {"input_ids": [7, 8], "labels": "joy"}]}, "row 16 .*the label 'joy'",
    ),
    "empty text": (
        {"train_dataset": [*GOOD, {"input_ids": [], "labels": 0}]}, "row 16 of the training .* is an empty",
    ),
    "only special tokens": (
        {"train_dataset": [*GOOD, {"input_ids": [2, 3], "labels": 0}],
         "data_collator": DataCollatorWithPadding(word_tokenizer(90))},
        "row 16 of the training dataset is an empty text",
    ),
    "too long": ({"eval_dataset": [{"input_ids": [7] * 90, "labels": 0}] * 2}, "row 0 .*90 tokens.* 80"),
    "no mask": ({"data_collator": without_mask}, r"collator gives no attention_mask \(it gives input_ids\)"),
    "two encoders": ({"model": TwoTowers}, "2 encoders, query, passage: name the one"),
    "no such encoder": ({"model": TwoTowers, "encoder": "doc"}, "no encoder 'doc'"),
    "no gradient": ({"model": lambda: Detached(config())}, "loss of the Detached has no gradient"),
    "no loss": (
        {"model": lambda: OnlyLogits(), "train_dataset": GOOD}, "OnlyLogits returns no loss for a batch",
    ),
    "another head": (
        {"teacher": lambda: classifier(num_labels=5)}, "logits have a width of 5, and the student's of 3",
    ),
    "another kind": (
        {"teacher": lambda: BertForTokenClassification(config())}, "teacher gives tokens, and the student cl",
    ),
    "no signal": (
        {"train_dataset": unlabelled(8), "distillation": Distillation.none()}, "gates phase would have",
    ),
    "no labels to score by": ({"train_dataset": unlabelled(8), "recipe": "gain"}, "recipe gain scores by"),
    "hidden under a head of one's own": (
        {"model": lambda: OnlyLogits(), "train_dataset": unlabelled(8), "parts": ("heads", "hidden")},
        "hidden dimensions cannot be pruned",
    ),
    "unknown option": ({"gate_step": 3}, "prune has no option gate_step; it has align"),
}  # fmt: skip


class OnlyLogits(BertForSequenceClassification):
    def __init__(self) -> None:
        super().__init__(config())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        return {"logits": super().forward(input_ids, attention_mask).logits}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_said_before_any_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(PruningTrainer, "train", no_training)
    changes, message = REFUSED[name]
    call: dict[str, Any] = {
        "model": classifier, "target": HALF, "train_dataset": GOOD, "eval_dataset": GOOD, "gate_steps": 1,
        "retrain_steps": 1, "out": tmp_path / "out", **changes,
    }  # fmt: skip
    for key in ("model", "teacher"):
        if key in call:
            call[key] = call[key]()
    with pytest.raises(ValueError, match=message):
        pruned_trainer.prune(**call)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
