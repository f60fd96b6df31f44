"""The other heads: as the stock models, through disk, optimised, and in transformers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    pipeline,
)

import pruned_ops
from head_models import CLASSES, CONFIGS, DENSE, HEADS, KINDS, SIZES, pruned, stock
from inputs import ODD_SHAPES, READY, padded_batch
from pruned_ops.ops.registry import record, use_backend
from pruned_ops.runtime.optimize import optimized
from tiny_tokenizers import word_tokenizer


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def at_real_tokens(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """A label of a text is one of its tokens; of a padded token there is none."""
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_shapes_are_the_stock_model(kind: str, head: str) -> None:
    """Names, logits and loss."""
    theirs = stock(kind, head)
    ours = CLASSES[kind, head][1](CONFIGS[kind][1](**theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    batch = padded_batch((20, 3, 11), theirs.config.pad_token_id)
    labels = torch.tensor([2, 0, 1])
    if head == "token":
        labels = torch.where(batch["attention_mask"].bool(), labels[:, None], -100)
    found, expected = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(found.loss, expected.loss, **close)
    real = at_real_tokens(expected.logits, batch)
    assert real.std() > 0.1
    torch.testing.assert_close(at_real_tokens(found.logits, batch), real, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_regression_and_several_labels(kind: str) -> None:
    """The losses that stock models choose by the labels' number and dtype."""
    for labels, num_labels in ((torch.tensor([0.5, -1.0]), 1), (torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 2)):
        torch.manual_seed(0)
        theirs = CLASSES[kind, "sequence"][0](
            CONFIGS[kind][0](**{**SIZES, **DENSE, "num_labels": num_labels})
        ).eval()
        ours = CLASSES[kind, "sequence"][1](CONFIGS[kind][1](**theirs.config.to_dict())).eval()
        ours.load_state_dict(theirs.state_dict())
        batch = padded_batch((9, 4), theirs.config.pad_token_id)
        expected = theirs(**batch, labels=labels)
        torch.testing.assert_close(ours(**batch, labels=labels).loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimised_is_padded(kind: str, head: str, backend: str) -> None:
    for model in (pruned(kind, head), stock(kind, head)):
        batch = padded_batch((20, 3, 11), model.config.pad_token_id)
        expected = at_real_tokens(run(model, batch), batch)
        with use_backend(backend), record() as ran:
            found = at_real_tokens(run(pruned_ops.optimize(model), batch), batch)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert {name for counts in ran.values() for name in counts} == {backend}


@pytest.mark.parametrize("mask", ["left", "holes", "empty", "positions"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_inputs(kind: str, head: str, mask: str) -> None:
    """Left padding too: the text's label is read from its first real token."""
    model = pruned(kind, head)
    batch = padded_batch((20, 20, 20), model.config.pad_token_id)
    if mask == "left":
        batch["attention_mask"][0, :7] = 0
    elif mask == "holes":
        batch["attention_mask"][1, 3:6] = batch["attention_mask"][1, 0] = 0
    elif mask == "empty":
        batch["attention_mask"][2] = 0
    else:
        batch["position_ids"] = torch.arange(2, 22).flip(0).expand(3, 20).contiguous()
    expected = run(model, batch)
    fast = pruned_ops.optimize(model)
    torch.testing.assert_close(
        at_real_tokens(run(fast, batch), batch), at_real_tokens(expected, batch), atol=2e-5, rtol=1e-4
    )
    with torch.no_grad():
        states = fast(**batch, output_hidden_states=True).hidden_states
    assert len(states) == len(ODD_SHAPES) + 1 and (states[-1][batch["attention_mask"] == 0] == 0).all()
    if mask == "left":  # alone and unpadded it is the same text
        alone = {"input_ids": batch["input_ids"][:1, 7:], "attention_mask": batch["attention_mask"][:1, 7:]}
        # Positions count from the batch's first place on (in RoBERTa from 2): no id is the padding's.
        alone["position_ids"] = torch.arange(7, 20)[None] + (2 if kind == "roberta" else 0)
        torch.testing.assert_close(
            at_real_tokens(run(fast, alone), alone)[0],
            at_real_tokens(expected, batch)[0], atol=2e-5, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_through_disk(kind: str, head: str, tmp_path: Path) -> None:
    model, (_, ours, auto) = pruned(kind, head), CLASSES[kind, head]
    model.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    batch = padded_batch((9, 4), model.config.pad_token_id)
    assert type(again) is ours and torch.equal(run(again, batch), run(model, batch))
    assert again.config.id2label[2] == "perhaps"
    bare = AutoModel.from_pretrained(tmp_path)  # the encoder of it, without a pooler
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
        assert torch.equal(bare(**batch).last_hidden_state, expected)
    card = (tmp_path / "README.md").read_text()
    task = {"sequence": "text-classification", "token": "token-classification"}[head]
    assert f"pipeline_tag: {task}" in card and auto.__name__ in card


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_refused_once_optimised(kind: str, head: str) -> None:
    model = pruned(kind, head)
    batch = padded_batch((9, 4), model.config.pad_token_id)
    labels = torch.zeros(2, 9, dtype=torch.long) if head == "token" else torch.zeros(2, dtype=torch.long)
    pruned_ops.optimize(model)
    with pytest.raises(ValueError, match="does not take labels"):
        model(**batch, labels=labels)
    pruned_ops.restore(model).train()(**batch, labels=labels).loss.backward()
    assert model.base_model.embeddings.word_embeddings.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_classifier_refuses_padding_at_position_0(kind: str) -> None:
    """Stock models read whatever is there; a row of padding only is no error."""
    batch = padded_batch((9, 4, 0), 1)
    model = pruned_ops.optimize(stock(kind, "sequence"))
    assert torch.isfinite(run(model, batch)).all()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="reads position 0.*pad on the right"):
        run(model, batch)
    run(pruned_ops.optimize(stock(kind, "token")), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_pipelines(kind: str) -> None:
    """The same results from a saved and from an optimised model, in padded batches."""
    tokenizer = word_tokenizer(90, padding_side="right")
    texts = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9 w10"]
    for task, head in (("text-classification", "sequence"), ("token-classification", "token")):
        model = pruned(kind, head)
        expected = pipeline(task, model=model, tokenizer=tokenizer)(texts, batch_size=3)
        with optimized(model) as fast:
            found = pipeline(task, model=fast, tokenizer=tokenizer)(texts, batch_size=3)
        assert len(expected) == 3 and found == nearly(expected)
    bare = pruned(kind, "token").base_model
    expected = pipeline("feature-extraction", model=bare, tokenizer=tokenizer)(texts)
    fast = pruned_ops.optimize(bare)
    found = pipeline("feature-extraction", model=fast, tokenizer=tokenizer)(texts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-5, rtol=1e-4)


def nearly(value: Any) -> Any:
    """The same, with numbers compared within rounding."""
    if isinstance(value, list):
        return [nearly(one) for one in value]
    if isinstance(value, dict):
        return {key: nearly(one) for key, one in value.items()}
    return pytest.approx(float(value), abs=1e-4) if not isinstance(value, (str, int)) else value
