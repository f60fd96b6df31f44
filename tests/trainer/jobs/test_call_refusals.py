"""What a call from Python refuses before any training: models, rows, labels, the caller's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DataCollatorWithPadding,
)

import pruned_ops
import pruned_trainer
from calls import HALF, TwoTowers, arguments, classifier, config, rows, unlabelled
from pruned_ops.measure.timing import Workload
from pruned_trainer import Distillation, Target
from pruned_trainer.training.trainer import PruningTrainer
from tiny_tokenizers import word_tokenizer


class Detached(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:  # there is none without labels, as in evaluation
            output.loss = output.loss.detach()
        return output


class OneWay(torch.autograd.Function):
    """As a loss of whole numbers may be: it has a gradient until somebody asks for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("one way")


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


def with_a_dictionary() -> Any:
    model: Any = TwoTowers()
    model.config = {"dropout": 0.1}
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
    "a temperature of scores": (
        {"model": regressor, "train_dataset": unlabelled(16), "eval_dataset": unlabelled(16),
         "distillation": Distillation(temperature=3.0)},
        "a temperature softens distributions that are compared, and the model gives scores: leave it out",
    ),
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
    "another order": (
        {"teacher": lambda: classifier(id2label={0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"})},
        "its labels are label_1, label_0, label_2, in another order than the student's",
    ),
    "another kind": (
        {"teacher": lambda: BertForTokenClassification(config())}, "teacher gives tokens, and the student cl",
    ),
    "another kind that only judges": (
        {"teacher": lambda: BertForTokenClassification(config()), "distillation": Distillation.none()},
        "teacher gives tokens, and the student classes",
    ),
    "no signal": (
        {"train_dataset": unlabelled(8), "distillation": Distillation.none()}, "gates phase would have",
    ),
    "no labels to score by": ({"train_dataset": unlabelled(8), "recipe": "gain"}, "recipe gain scores by"),
    "hidden under a head of one's own": (
        {"model": lambda: OnlyLogits(), "train_dataset": unlabelled(8), "parts": ("heads", "hidden")},
        "hidden dimensions cannot be pruned",
    ),
    "hidden dimensions of a bare encoder": (
        {"model": lambda: BertModel(config(), add_pooling_layer=False), "train_dataset": unlabelled(16),
         "eval_dataset": unlabelled(16), "parts": ("heads", "hidden")},
        "an embedding is as wide as the hidden size: parts hidden cannot be pruned",
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
    "a loss without a way back": (
        {"loss": lambda outputs, batch: OneWay.apply(outputs["logits"])},
        r"the gradient of the loss of the function loss fails on the first rows \(RuntimeError: one way",
    ),
    "metrics that fail": (
        {"compute_metrics": lambda predicted: 1 / 0}, "compute_metrics fails on the evaluation dataset",
    ),
    "metrics without names": ({"compute_metrics": lambda predicted: 0.5}, "it gives a float, and a dict"),
    "metrics by the names of others": (
        {"compute_metrics": lambda predicted: {"agreement": 0.5, "macs": 1.0}},
        "evaluation dataset .ValueError: it gives agreement, macs, by which the report calls something else",
    ),
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
    "a dictionary as its config": (
        {"model": with_a_dictionary, "encoder": "passage"}, "the model's config is a dictionary, and transf",
    ),
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
    "arguments of another optimiser": (
        {"args": lambda: arguments(Path(), optim_args="b=0.5")}, "optim_args is of optimisers that are not",
    ),
    "smoothed labels": (
        {"args": lambda: arguments(Path(), label_smoothing_factor=0.1)}, "label_smoothing_factor is not app",
    ),
    "another optimiser": (
        {"args": lambda: arguments(Path(), optim="adafactor")}, "optim is adafactor: .* by AdamW",
    ),
    "a model of an earlier step": (
        {"args": lambda: arguments(
            Path(), load_best_model_at_end=True, eval_strategy="no", save_strategy="no"
        )},
        "load_best_model_at_end chooses by evaluations on the way, and models are judged at the end alone",
    ),
    "an upload": ({"args": lambda: arguments(Path(), push_to_hub=True)}, "push_to_hub: nothing is uploaded"),
    "no whole batch": (
        {"args": lambda: arguments(Path(), dataloader_drop_last=True), "train_dataset": GOOD[:4]},
        "dataloader_drop_last leaves no batch of 8 of the 4 rows",
    ),
    "no whole batch of the gates' share": (
        {"args": lambda: arguments(Path(), dataloader_drop_last=True), "gate_fraction": 0.25},
        "dataloader_drop_last leaves no batch of 8 of the 4 rows",
    ),
    "gradient checkpointing of a module that has none": (
        {"args": lambda: arguments(Path(), gradient_checkpointing=True), "model": TwoTowers,
         "encoder": "passage", "train_dataset": unlabelled(16), "eval_dataset": unlabelled(16)},
        "gradient_checkpointing: a TwoTowers has no gradient_checkpointing_enable",
    ),
    "arguments as a dictionary": ({"args": {"max_steps": 4}}, "args is a dict, and a TrainingArguments is"),
    "parts as a text": ({"parts": "heads"}, "parts are 'heads': a list of one or more of heads, ffn"),
    "parts as a set": ({"parts": {"heads"}}, r"parts are \{'heads'\}: a list of one or more of heads, ffn"),
    "minutes as a text": ({"max_minutes": "5", "gate_steps": None}, "an option is of another type"),
    "steps as a text": (
        {"gate_steps": "5", "args": lambda: arguments(Path())}, "an option is of another type than it can be",
    ),
    "a share as a text": (
        {"gate_steps": None, "gate_epochs": 1.0, "gate_fraction": "half", "args": lambda: arguments(Path())},
        "an option is of another type than it can be",
    ),
    "a share that is no number": (
        {"gate_steps": None, "gate_epochs": 1.0, "gate_fraction": float("inf"),
         "args": lambda: arguments(Path())},
        "gate_fraction is inf: a finite number is needed",
    ),
    "half a step": ({"retrain_steps": 2.5}, "retrain_steps is 2.5: an integer is needed"),
    "minutes and steps": (
        {"max_minutes": 5.0, "gate_steps": None, "retrain_steps": None, "args": lambda: arguments(Path(), 4)},
        "max_minutes, and max_steps or num_train_epochs of args: say one of them",
    ),
    "minutes and epochs": (
        {"max_minutes": 5.0, "gate_steps": None, "retrain_steps": None,
         "args": lambda: arguments(Path(), -1, num_train_epochs=5)},
        "max_minutes, and max_steps or num_train_epochs of args: say one of them",
    ),
    "all steps to the gates": (
        {"args": lambda: arguments(Path(), 10), "gate_steps": 40, "retrain_steps": None},
        "gate_steps leaves none of the 10 steps of args to the narrow model: 40 are the gates'",
    ),
    "two workloads": (
        {"target": Target(speedup=1.5), "workload": Workload.fixed(8, 2, 1), "latency_table": "table.json"},
        "a latency table is of a workload of its own: give workload or latency_table",
    ),
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
