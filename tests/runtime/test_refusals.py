"""What optimize refuses, by name: models it would not compute as they are, inputs, training, saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

import pruned_ops
from inputs import padded_batch, randn, stock_model
from pruned_ops.models.encoder import PrunedPreTrainedModel


def test_a_refusal_leaves_everything_as_it_was() -> None:
    good, bad = stock_model().bert.train(), stock_model(hidden_act="tanh").bert
    both = nn.ModuleList([good, bad])
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    with pytest.raises(ValueError, match="optimize cannot take 1, a BertModel: hidden_act is 'tanh'"):
        pruned_ops.optimize(both)
    assert both[0] is good and good.training and all(p.requires_grad for p in both.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.state_dict().items())


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no BERT or RoBERTa encoder found in DistilBertModel"):
        pruned_ops.optimize(DistilBertModel(DistilBertConfig(dim=16, n_heads=2, n_layers=1, hidden_dim=16)))
    with pytest.raises(ValueError, match="decoder"):
        pruned_ops.optimize(BertModel(BertConfig(**{**stock_model().config.to_dict(), "is_decoder": True})))
    with pytest.raises(ValueError, match="hidden_act is 'tanh'"):
        pruned_ops.optimize(stock_model(hidden_act="tanh"))
    replaced = stock_model()
    replaced.bert.encoder.layer[1].intermediate.dense = nn.Sequential(
        replaced.bert.encoder.layer[1].intermediate.dense
    )
    with pytest.raises(ValueError, match="layer 1's intermediate.dense is a Sequential"):
        pruned_ops.optimize(replaced)
    for change, message in (
        (
            lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.ReLU()),
            "intermediate_act_fn is a ReLU, not the GELUActivation",
        ),
        (
            lambda layer: setattr(layer.output, "LayerNorm", nn.Identity()),
            "output.LayerNorm is a Identity, not the LayerNorm",
        ),
        (lambda layer: setattr(layer, "forward", lambda x: x), "forward of its encoder.layer.1 was replaced"),
    ):
        changed = stock_model()
        change(changed.bert.encoder.layer[1])
        with pytest.raises(ValueError, match=message):
            pruned_ops.optimize(changed)
    hooked = stock_model()
    hooked.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="encoder.layer.0.output.dense has forward hooks"):
        pruned_ops.optimize(hooked)


def test_training_and_loading_are_refused(model: Any) -> None:
    fast = pruned_ops.optimize(model)
    with pytest.raises(RuntimeError, match="inference-only.*restore"):
        fast.train()
    with pytest.raises(RuntimeError, match="restore.*loading"):
        fast.load_state_dict({}, strict=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"inputs_embeds": randn(0, 2, 9, 64), "input_ids": None}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
        ({"encoder_hidden_states": randn(0, 2, 9, 64)}, "encoder_hidden_states"),
        (
            {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(2).long()},
            "start_positions",
        ),
        ({"attention_mask": torch.zeros(2, 1, 9, 9)}, "attention_mask has shape"),
        ({"attention_mask": torch.full((2, 9), -1e4)}, "other than 0 and 1"),
    ],
)
def test_inputs_refused_by_name(extra: dict[str, Any], message: str) -> None:
    fast = pruned_ops.optimize(stock_model())
    with pytest.raises(ValueError, match=message):
        fast(**{**padded_batch((9, 4)), **extra})


@pytest.mark.parametrize("fast", [False, True])
def test_too_long_and_out_of_range(model: Any, fast: bool) -> None:
    if not fast and not isinstance(model, PrunedPreTrainedModel):
        pytest.skip("a stock model's own errors are not ours")
    if fast:
        pruned_ops.optimize(model)
    longest = 80 - (model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0)
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises(
        ValueError, match=f"{longest + 1} tokens; the model's position table allows {longest}"
    ):
        model(input_ids=torch.full((1, longest + 1), 7))
    for bad in (-1, 100):
        with pytest.raises(IndexError, match=f"input_ids holds {bad}; its table has 100 rows"):
            model(input_ids=torch.tensor([[3, bad]]))
