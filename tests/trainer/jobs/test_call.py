"""Pruning from Python: one call for any head, with labels or without, and what is refused."""

from __future__ import annotations

import json
import os
import signal
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

import pruned_ops
import pruned_trainer
from head_models import SIZES
from pruned_trainer import Decision, Distillation, PruneResult, Target
from pruned_trainer.jobs import call as call_module
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
            classifier(), HALF, rows(40), judged, recipe="random", gate_steps=1, retrain_steps=0
        )
        about = result.report["evaluated_on"]
        assert about["file"] == name and about["threshold_chosen_on_these"] is False


@pytest.mark.parametrize(
    ("recipe", "more", "gates", "again"),
    [
        ("joint", {}, 25, 75),
        ("paper", {}, 12, 76),  # of either part
        ("paper", {"parts": ["ffn"]}, 25, 75),
        ("random", {}, 1, 100),
        ("joint", {"gate_steps": 40}, 40, 60),
    ],
)
def test_the_steps_of_the_arguments_are_those_of_all_trainings(
    recipe: str, more: dict[str, Any], gates: int, again: int, tmp_path: Path
) -> None:
    steps = call_module._steps(arguments(tmp_path, 100), 64, 8, recipe, more)
    assert steps == {"gate_steps": gates, "retrain_steps": again}


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
    assert result.report["dense"]["gold"] == sum(row["label"] for row in data[:8])
    both = [{**row, "label": 99} for row in rows(24)]  # a data set's own numbers beside the models'
    assert pruned_trainer.prune(classifier(), HALF, both, both, gate_steps=1, retrain_steps=1)


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


def test_an_interrupted_call_goes_on_where_it_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(out: Path | None, **more: Any) -> PruneResult:
        args = arguments(tmp_path, save_steps=1)
        return pruned_trainer.prune(classifier(), HALF, rows(24), rows(16, 1), args=args, out=out, **more)

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
    result = call(out, resume=True)
    assert result.decision == whole.decision
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.model.state_dict().items())


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
        if output.loss is not None:  # there is none without labels, as in evaluation
            output.loss = output.loss.detach()
        return output


def without_mask(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"][:4] for row in batch])}


class Table:
    """A table such as pandas', of which the length and the places are not those of its rows."""

    columns = ("input_ids",)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        return []


def labelled(label: Any) -> list[dict[str, Any]]:
    return [{**row, "labels": label} for row in rows(16)]


def several() -> Any:
    return classifier(problem_type="multi_label_classification")


def regressor() -> Any:
    return classifier(num_labels=1)


def with_masks_for_scores(batch: list[Any]) -> dict[str, Tensor]:
    return {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3)}


def tagger() -> Any:
    return BertForTokenClassification(config())


def gated() -> Any:
    model = classifier()
    pruned_trainer.attach(model)
    return model


def replaced() -> Any:
    """Its pruned class would compute another activation."""
    model = classifier()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    return model


def broken() -> Any:
    model = classifier()
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    return model


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = type("Mine", (BertModel,), {})(config())


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
    # Rows.
    "a table": ({"train_dataset": Table()}, r"training dataset is a Table: .*to_dict\("),
    "no data": ({"train_dataset": 5}, "training dataset is a int: rows"),
    "another tokenizer": (
        {"train_dataset": [*GOOD, {"input_ids": [7, 100], "labels": 0}]},
        "row 16 of the training dataset does not fit the model: input_ids holds 100.*another tokenizer",
    ),
    "token types": (
        {"train_dataset": [{**row, "token_type_ids": [9] * len(row["input_ids"])} for row in GOOD]},
        "row 0 of the training dataset does not fit the model: token_type_ids holds 9",
    ),
    "ids of a batch": (
        {"train_dataset": [{"input_ids": torch.tensor([[7, 8]]), "labels": 0}] * 4},
        r"row 0 .*input_ids of shape \(1, 2\).*without return_tensors",
    ),
    "ids as text": ({"train_dataset": [{"input_ids": "w1 w2"}] * 4}, "row 0 .*the input_ids 'w1 w2': num"),
    "a short mask": (
        {"eval_dataset": [*GOOD, {"input_ids": [7, 8], "labels": 0, "attention_mask": [1]}]},
        "row 16 of the evaluation dataset has 2 input_ids and 1 as attention_mask",
    ),
    "a column of text": (
        {"train_dataset": [{**row, "text": "w1"} for row in GOOD],
         "args": lambda: arguments(Path(), remove_unused_columns=False)},
        "row 0 .*the text 'w1': numbers are needed; without remove_unused_columns=False",
    ),
    "a mask of nothing": (
        {"train_dataset": [*GOOD, {"input_ids": [7, 8], "labels": 0, "attention_mask": [0, 0]}]},
        "row 16 of the training dataset is an empty text",
    ),
    # Labels.
    "one row unlabelled": (
        {"train_dataset": [*GOOD, {"input_ids": [7, 8]}]}, "row 16 .* has no labels, which row 0 has",
    ),
    "one row labelled": (
        {"train_dataset": [{"input_ids": [7, 8]}, *GOOD]}, "row 1 .* has labels, which row 0 has not",
    ),
    "no label": (
        {"train_dataset": [*GOOD, {"input_ids": [7, 8], "labels": None}]}, "row 16 .* has no labels",
    ),
    "label as a float": ({"train_dataset": labelled(0.0)}, "row 0 .*label 0.0: a whole number from 0 to 2"),
    "label as a truth": ({"train_dataset": labelled(True)}, "row 0 .*label True: a whole number"),
    "one-hot label": ({"train_dataset": labelled([1, 0, 0])}, r"row 0 .*label \[1, 0, 0\]: a whole number"),
    "several labels as whole numbers": (
        {"model": several, "train_dataset": labelled([1, 0, 1])}, r"label \[1, 0, 1\]: 3 floats from 0.0 to",
    ),
    "too few labels": (
        {"model": several, "train_dataset": labelled([1.0, 0.0])}, r"label \[1.0, 0.0\]: 3 floats",
    ),
    "one row with too few": (
        {"model": several, "train_dataset": [*labelled([1.0, 0.0, 1.0]), *labelled([1.0, 0.0])]},
        "row 16 .*2 as labels: .*, or equally many in all rows",
    ),
    "no number to regress to": (
        {"model": regressor, "train_dataset": [*labelled(0.5), *labelled(float("nan"))]},
        "row 16 .*label nan: one finite number is needed",
    ),
    "too few token labels": (
        {"model": tagger, "train_dataset": [*rows(4, 0, True), {"input_ids": [7, 8], "labels": [0]}]},
        "row 4 .*2 input_ids and 1 as labels",
    ),
    "one label for many tokens": (
        {"model": tagger, "train_dataset": GOOD}, "row 0 .*input_ids and one number as labels",
    ),
    "no token labelled": (
        {"model": tagger, "train_dataset": [{"input_ids": [7, 8], "labels": [-100, -100]}] * 4},
        "training dataset labels no token at all",
    ),
    # The caller's own code.
    "a collator that fails": (
        {"data_collator": lambda batch: 1 / 0},
        r"collator fails on rows 0 to 1 of the training dataset \(ZeroDivisionError: division by zero\)",
    ),
    "a collator of what is left out": (
        {"data_collator": lambda batch: batch[0]["text"], "train_dataset": [{**GOOD[0], "text": ""}]},
        r"collator fails on .*, without the columns text, which remove_unused_columns=False keeps \(KeyError",
    ),
    "a collator of lists": ({"data_collator": lambda batch: batch}, "it gives a list, and a dict"),
    "a mask of another shape": (
        {"data_collator": with_masks_for_scores},
        r"input_ids of shape \(2, 3\) and an attention_mask of shape \(2, 1, 3\)",
    ),
    "a loss that fails": (
        {"loss": lambda outputs, batch: outputs["nope"]}, "function loss fails on the first rows .KeyError",
    ),
    "a loss of each text": (
        {"loss": lambda outputs, batch: outputs["logits"].sum(1)}, "loss of the function loss is no scalar",
    ),
    "a loss that is no number": (
        {"loss": lambda outputs, batch: outputs["logits"].sum() * float("nan")}, "loss is nan on the first",
    ),
    "metrics that fail": (
        {"compute_metrics": lambda predicted: 1 / 0}, "compute_metrics fails on the evaluation dataset",
    ),
    "metrics without names": ({"compute_metrics": lambda predicted: 0.5}, "it gives a float, and a dict"),
    "metrics by name": ({"compute_metrics": "accuracy"}, "compute_metrics is a str, and a function"),
    # Models.
    "a name": ({"model": lambda: "bert"}, "the model is a str: a model is needed"),
    "a class": ({"model": lambda: BertForSequenceClassification}, "the class BertForSequenceClassificat"),
    "a model without weights": ({"model": lambda: classifier().to("meta")}, "is on the meta device, witho"),
    "an optimised model": ({"model": lambda: pruned_ops.optimize(classifier())}, "is optimised: pruned_op"),
    "a compiled model": (
        {"model": lambda: torch.compile(classifier())}, "OptimizedModule: give the BertForSequenceCla",
    ),
    "gates already": ({"model": gated}, "gates are attached to the model already"),
    "another module": ({"model": replaced}, "cannot be pruned, because layer 1's intermediate.* is a ReLU"),
    "broken weights": ({"model": broken}, "the model gives NaN for the first rows"),
    "one dictionary": ({"model": lambda: nn.Sequential(classifier())}, "a Sequential takes its inputs as"),
    "a subclass": ({"model": Renamed}, "bert, a Mine, is a subclass of BertModel"),
    "a teacher of other words": (
        {"teacher": lambda: classifier(vocab_size=50)}, "row . .* does not fit the teacher: input_ids holds",
    ),
    "a teacher of short texts": (
        {"teacher": lambda: classifier(max_position_embeddings=6)}, "; the teacher's position table allows 6",
    ),
    "a teacher's name": ({"teacher": lambda: "bert"}, "the teacher is a str: a model is needed"),
    # Arguments.
    "a number": ({"target": 0.5}, "target is a float, and a Target is needed"),
    "smoothed labels": (
        {"args": lambda: arguments(Path(), label_smoothing_factor=0.1)}, "label_smoothing_factor is not app",
    ),
    "another optimiser": (
        {"args": lambda: arguments(Path(), optim="adafactor")}, "optim is adafactor: .* by AdamW",
    ),
    "no whole batch": (
        {"args": lambda: arguments(Path(), dataloader_drop_last=True), "train_dataset": GOOD[:4]},
        "dataloader_drop_last leaves no batch of 8 of the 4 rows",
    ),
    "arguments as a dictionary": ({"args": {"max_steps": 4}}, "args is a dict, and a TrainingArguments is"),
    "parts as a text": ({"parts": "heads"}, "parts are 'heads': a list of one or more of heads, ffn"),
    "minutes as a text": ({"max_minutes": "5", "gate_steps": None}, "an option is of another type"),
    "nothing to resume": ({"out": None, "resume": True}, "resume goes on in the folder out"),
    "no path": ({"out": 5}, "out is 5, and a path is needed"),
    "a decision, no file": ({"target": None, "decision": HALF}, "decision is Target.*, and a path is needed"),
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
    for key in ("model", "teacher", "args"):
        if callable(call.get(key)):
            call[key] = call[key]()
    with pytest.raises(ValueError, match=message):
        pruned_trainer.prune(**call)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
