"""What each family takes otherwise than BERT is right, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

import pruned_ops
from family_models import (
    ANSWERS,
    TEXTS,
    batch,
    family_named,
    fields,
    largest_difference,
    outputs,
    pruned,
    stock,
)
from pruned_ops.models.families.known import family_of
from pruned_ops.models.inputs import longest_sequence


def typed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}


def test_distilbert_has_no_token_types() -> None:
    """Those that a tokenizer gives are not looked at, as in stock transformers 5."""
    inputs = batch("right")
    for model in (stock("DistilBert", ANSWERS), pruned("pruned_distilbert", ANSWERS)):
        expected = outputs(model, inputs)
        assert largest_difference(outputs(pruned_ops.optimize(model), typed(inputs)), expected) <= 2e-5
        with pytest.raises((ValueError, RuntimeError), match="expand|shape"):
            model(**inputs, token_type_ids=torch.zeros(3, 5, dtype=torch.long))


def test_distilbert_takes_its_own_order_of_arguments() -> None:
    """Its third argument is inputs_embeds, which an optimised encoder refuses by name."""
    model, inputs = pruned_ops.optimize(stock("DistilBert", "")), batch("right")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        found = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds|inputs_embeds"):
        model(None, inputs["attention_mask"], torch.zeros(4, 20, 64))


def test_distilbert_has_no_pooler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DistilBERT has no pooler"):
        pruned("pruned_distilbert", "", add_pooling_layer=True)
    pruned("pruned_distilbert", "").save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).pooler is None


@pytest.mark.parametrize("stem", ["Roberta", "XLMRoberta"])
def test_one_token_type(stem: str) -> None:
    model, inputs = pruned_ops.optimize(stock(stem, ANSWERS)), batch("right")
    with pytest.raises(IndexError, match="token_type_ids holds 1; its table has 1 rows"):
        model(**typed(inputs))


@pytest.mark.parametrize(("stem", "longest"), [("Bert", 80), ("Roberta", 78), ("DistilBert", 80)])
def test_the_table_of_positions(stem: str, longest: int) -> None:
    model = pruned_ops.optimize(stock(stem, ANSWERS))
    assert longest_sequence(model.config) == longest
    assert outputs(model, batch("right", (longest, 2)))
    message = f"{longest + 1} tokens; the model's position table allows {longest}"
    with pytest.raises(ValueError, match=message):
        model(**batch("right", (longest + 1,)))


def test_a_config_takes_its_publishers_names_and_berts() -> None:
    own = AutoConfig.for_model("pruned_distilbert", **fields("DistilBert"))
    of_bert = AutoConfig.for_model("pruned_distilbert", vocab_size=100, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=80, pad_token_id=1,
        initializer_range=0.2)  # fmt: skip
    assert own.to_dict() == of_bert.to_dict()
    assert (
        (own.dim, own.hidden_dim, own.n_layers) == (64, 96, 2) == (own.hidden_size, own.intermediate_size, 2)
    )
    with pytest.raises(ValueError, match="hidden_dim is 0: it must lie between 1"):
        AutoConfig.for_model("pruned_distilbert", **{**fields("DistilBert"), "hidden_dim": 0})
    with pytest.raises(ValueError, match="it is a 'albert' model; one of bert, pruned_bert, roberta"):
        family_of(AutoConfig.for_model("albert"))
    assert family_named("Camembert").name == "RoBERTa"


def test_a_changed_head_is_not_computed_in_its_place() -> None:
    """Another module in the head of texts: the model's own forward computes it."""
    inputs = batch("right")
    for change in (
        lambda model: setattr(model, "pre_classifier", torch.nn.Sequential(model.pre_classifier)),
        lambda model: model.classifier.register_forward_hook(lambda *call: call[-1] * 2),
    ):
        model = stock("DistilBert", TEXTS)
        change(model)
        expected = outputs(model, inputs)
        assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= 2e-5
