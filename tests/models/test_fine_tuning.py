"""Pruned models in transformers' own Trainer, and new heads on pruned encoders."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import family_models
from family_models import ANSWERS, TEXTS, TOKENS
from head_models import KINDS, natural_questions, pruned
from inputs import pruned_model
from pruned_ops.checkpoints.loading import load_model
from pruned_ops.models.encoder import NewHeadWarning

SPAN = ["start_positions", "end_positions"]
# A model of every head, and the labels that it takes.
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    **{f"{kind}-{head}": (lambda k=kind, h=head: pruned(k, h), ["labels"])
       for kind in KINDS for head in ("sequence", "token")},
    **{f"{kind}-answers": (lambda k=kind: pruned_model(k), SPAN) for kind in KINDS},
    "bert-natural-questions": (natural_questions, [*SPAN, "answer_types"]),
}  # fmt: skip


def examples(name: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    rows = []
    for number in range(16):
        row = {"input_ids": torch.randint(5, 100, (12,)), "attention_mask": torch.ones(12, dtype=torch.long)}
        if name.endswith("sequence"):
            row["labels"] = torch.tensor(number % 3)
        elif name.endswith("token"):
            row["labels"] = row["input_ids"] % 3
        else:
            row["start_positions"], row["end_positions"] = torch.tensor(1), torch.tensor(2 + number % 3)
        if name.endswith("questions"):
            row["answer_types"] = torch.tensor(number % 5)
        rows.append(row)
    return rows


def trainer(model: Any, name: str, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=3, learning_rate=0.1, optim="sgd", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, label_names=MODELS[name][1], seed=1, **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=examples(name), eval_dataset=examples(name))


@pytest.mark.parametrize("name", MODELS)
def test_every_head_trains_in_transformers_trainer(name: str, tmp_path: Path) -> None:
    """Two minibatches of 4 are a step of 8, with gradient checkpointing too."""
    start = MODELS[name][0]()
    for module in start.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ends = []
    for more in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    ):
        model = copy.deepcopy(start)
        run = trainer(model, name, tmp_path, **more)
        before = run.evaluate()["eval_loss"]
        run.train()
        assert run.evaluate()["eval_loss"] < before
        ends.append({key: tensor for key, tensor in model.state_dict().items() if tensor.numel()})
    for end in ends[1:]:
        for key, tensor in end.items():
            torch.testing.assert_close(tensor, ends[0][key], atol=2e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_computes_layers_again(kind: str) -> None:
    model = pruned_model(kind).train()
    calls = []
    model.base_model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 90, (2, 9))
    positions = torch.tensor([1, 2])
    model(input_ids=ids, start_positions=positions, end_positions=positions).loss.backward()
    assert len(calls) == 2
    model.gradient_checkpointing_disable()
    model(input_ids=ids, start_positions=positions, end_positions=positions).loss.backward()
    assert len(calls) == 3


SOURCES: dict[str, Callable[[str], Any]] = {
    "answers": pruned_model,
    "bare": lambda kind: pruned_model(kind).base_model,
    "sequence": lambda kind: pruned(kind, "sequence"),
    "token": lambda kind: pruned(kind, "token"),
}
AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("labels", [3, 5])
@pytest.mark.parametrize("head", AUTO)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_on_a_pruned_encoder(
    kind: str, source: str, head: str, labels: int, tmp_path: Path
) -> None:
    model = SOURCES[source](kind)
    if source == "answers":
        model.config.null_score_threshold = 1.5
    model.save_pretrained(tmp_path)
    if source == head and (head == "answers" or labels == 3):
        AUTO[head].from_pretrained(tmp_path, num_labels=labels)  # its own head: no warning
        return
    with pytest.warns(NewHeadWarning, match="new, random head to be trained"):
        new = AUTO[head].from_pretrained(tmp_path, num_labels=labels)
    mine, theirs = new.base_model.state_dict(), model.base_model.state_dict()
    for key in theirs.keys() & mine.keys():
        assert torch.equal(mine[key], theirs[key]), key
    assert {key for key in mine.keys() - theirs.keys() if "pooler" not in key} == set()
    on_top = [p for n, p in new.named_parameters() if not n.startswith(new.base_model_prefix)]
    assert on_top and all(torch.isfinite(p).all() for p in new.parameters())
    assert 0 < float(on_top[0].detach().std()) < 2 * new.config.initializer_range
    for parameter in on_top:
        assert not any(torch.equal(parameter, p) for p in model.parameters() if parameter.dim() == 2)
    assert new.config.null_score_threshold == 0 and new.config.score_calibration is None
    if head != "answers":
        assert new.config.num_labels == labels
    new.save_pretrained(tmp_path / "again")
    again = AUTO[head].from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("source", "head"), [("answers", "token"), ("sequence", "token"), ("token", "sequence")]
)
def test_a_new_head_whose_tensors_are_called_as_the_old_ones(source: str, head: str, tmp_path: Path) -> None:
    """ModernBERT's heads: the config alone tells what a checkpoint's is for. Its own head stays."""
    names = {"answers": ANSWERS, "sequence": TEXTS, "token": TOKENS}
    model = family_models.pruned("pruned_modernbert", names[source])
    model.config.num_labels = 2 if source == "answers" else 3
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NewHeadWarning)
        own = AUTO[source].from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.warns(NewHeadWarning, match="new, random head to be trained: classifier, head.dense, head.n"):
        new = AUTO[head].from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(new[name], tensor) is name.startswith("model."), name


def test_what_stays_refused(tmp_path: Path) -> None:
    """A head or an encoder that is not what its own config describes; loading for answers."""
    model = pruned("bert", "sequence")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    metadata = {"format": "pt"}
    with pytest.raises(ValueError, match="no fine-tuned question-answering checkpoint: it lacks qa_outputs"):
        load_model(str(tmp_path))
    save_file({k: v for k, v in tensors.items() if not k.startswith("classifier.")}, file, metadata)
    with pytest.raises(ValueError, match="missing classifier.bias"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    save_file({**tensors, "classifier.weight": torch.zeros(4, 90)}, file, metadata)
    with pytest.raises(ValueError, match="classifier.weight has"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.dense.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata)
    with pytest.raises(ValueError, match=f"missing {name}"):
        AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(ValueError, match=f"missing {name.removeprefix('bert.')}"):
        AutoModel.from_pretrained(tmp_path)
