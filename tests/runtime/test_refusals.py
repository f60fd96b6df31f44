"""What optimize refuses, by name: models it would not compute as they are, inputs, training, saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, pipeline

import pruned_ops
from inputs import logits, padded_batch, randn, stock_model
from pruned_ops.models.encoder import PrunedPreTrainedModel
from tiny_tokenizers import word_tokenizer


def test_a_refusal_leaves_everything_as_it_was() -> None:
    good, bad = stock_model().bert.train(), stock_model(hidden_act="tanh").bert
    both = nn.ModuleList([good, bad])
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    with pytest.raises(ValueError, match="optimize cannot take 1, a BertModel: hidden_act is 'tanh'"):
        pruned_ops.optimize(both)
    assert both[0] is good and good.training and all(p.requires_grad for p in both.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.state_dict().items())


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no encoder that is known here found in AlbertModel"):
        pruned_ops.optimize(
            AlbertModel(AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16))
        )
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
        (
            lambda layer: setattr(layer, "feed_forward_chunk", lambda x: x),
            "feed_forward_chunk of its encoder.layer.1 was replaced",
        ),
    ):
        changed = stock_model()
        change(changed.bert.encoder.layer[1])
        with pytest.raises(ValueError, match=message):
            pruned_ops.optimize(changed)
    hooked = stock_model()
    hooked.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="encoder.layer.0.output.dense has forward hooks"):
        pruned_ops.optimize(hooked)


class Lora(nn.Linear):
    """Stands in for an adapter library's linear."""

    __module__ = "peft.tuners.lora.layer"


class Quantised(nn.Linear):
    """Stands in for a quantisation library's linear."""

    __module__ = "bitsandbytes.nn.modules"


class MyBert(BertModel):
    """A subclass that may change anything."""


def with_dense(kind: type[nn.Linear]) -> Any:
    """A model with a linear of this class in the place of one of its own."""
    model = stock_model()
    output = model.bert.encoder.layer[1].output
    output.dense = kind(output.dense.in_features, output.dense.out_features)
    return model


def parametrized() -> Any:
    model = stock_model()
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[1].output.dense)
    return model


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a string": (
        lambda: "folder/of-a-model",
        r"takes a model, and 'folder/of-a-model' is a string: load it first, for example "
        r"AutoModelForQuestionAnswering.from_pretrained\('folder/of-a-model'\)",
    ),
    "nothing": (lambda: None, "takes a model, a torch.nn.Module, and this is a NoneType"),
    "a class": (lambda: BertModel, "this is the class BertModel: make or load a model of it first"),
    "a pipeline": (
        lambda: pipeline("feature-extraction", model=stock_model().bert, tokenizer=word_tokenizer(90)),
        "this is a FeatureExtractionPipeline around one: call optimize on its .model, which is changed in",
    ),
    "a subclass": (
        lambda: nn.ModuleDict({"mine": MyBert(stock_model().config)}),
        "mine, a MyBert, is a subclass of BertModel, and what it changes would not be computed: .* set its "
        "__class__ to BertModel first",
    ),
    "a linear of peft": (
        lambda: with_dense(Lora),
        r"layer 1's output.dense is a Lora, .*merge the adapter first, model = model.merge_and_unload\(\)",
    ),
    "a quantised linear": (
        lambda: with_dense(Quantised),
        r"layer 1's output.dense is a Quantised, .*load the model without it \(optimize\(.*int8",
    ),
    "a parametrized linear": (
        parametrized,
        "layer 1's output.dense is a ParametrizedLinear, .*remove_parametrizations makes it plain again",
    ),
    "no text model": (lambda: nn.Linear(2, 2), "no encoder that is known here found in Linear; .*BertModel"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_model_to_optimize_is_named_with_the_way_out(kind: str) -> None:
    make, message = WRONG[kind]
    wrong = make()
    with pytest.raises(ValueError, match=message) as refusal:
        pruned_ops.optimize(wrong)
    assert "\n" not in str(refusal.value)


def test_the_ways_out_lead_out() -> None:
    mine = MyBert(stock_model().config).eval()
    mine.__class__ = BertModel
    pruned_ops.optimize(mine)
    model = parametrized()
    dense = model.bert.encoder.layer[1].output.dense
    nn.utils.parametrize.remove_parametrizations(dense, "weight")
    pruned_ops.optimize(model)


def test_a_real_lora_before_and_after_it_is_merged() -> None:
    """On an adapted model, on one that is optimised already, and on the merged one."""
    peft = pytest.importorskip("peft", reason="peft is not installed: Lora above stands in for it")
    settings = peft.LoraConfig(r=2, target_modules=["query", "output.dense"], init_lora_weights=False)
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    model = peft.get_peft_model(stock_model(), settings).eval()
    with pytest.raises(
        ValueError,
        match=r"layer 0's attention.self.query is a peft.tuners.lora.layer.Linear, .*merge the adapter first",
    ):
        pruned_ops.optimize(model)
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        logits(pruned_ops.optimize(merged), batch)[real], expected[real], atol=1e-4, rtol=1e-4
    )
    fast = pruned_ops.optimize(stock_model())
    before = logits(fast, batch)
    with pytest.raises(RuntimeError, match=r"another query.*pruned_ops\.restore\(model\) first"):
        peft.get_peft_model(fast, settings)
    assert torch.equal(logits(fast, batch), before)


def test_training_and_loading_are_refused(model: Any) -> None:
    fast = pruned_ops.optimize(model)
    with pytest.raises(RuntimeError, match="inference-only.*restore"):
        fast.train()
    with pytest.raises(RuntimeError, match="restore.*loading"):
        fast.load_state_dict({}, strict=False)


@pytest.mark.parametrize("method", ["forward", "feed_forward_chunk", "__init__"])
def test_methods_set_in_a_class_are_refused_but_for_the_one_that_made_the_module(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library `kernels` sets the `__init__` of classes of transformers, where it is installed."""
    model, kind = stock_model(), type(stock_model().bert.encoder.layer[0])
    own = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *args, **kwargs: own(self, *args, **kwargs))
    if method == "__init__":
        assert pruned_ops.optimize(model) is model
    else:
        with pytest.raises(ValueError, match=f"the {method} of BertLayer, the class of its encoder.layer.0"):
            pruned_ops.optimize(model)


def test_an_encoder_that_would_learn_nothing_does_not_ask_to_be_trained(model: Any) -> None:
    """In evaluation mode a training would pass it by in silence. A head on it can be trained alone."""
    asked = [parameter.requires_grad for parameter in model.parameters()]
    fast = pruned_ops.optimize(model)
    weight = fast.base_model.encoder.layer[0].output.dense.weight
    for ask in (
        fast.requires_grad_,
        lambda: weight.requires_grad_(requires_grad=True),
        lambda: setattr(weight, "requires_grad", True),
    ):
        with pytest.raises(RuntimeError, match=r"no gradient: call pruned_ops\.restore\(model\) before tr"):
            ask()
        assert not weight.requires_grad
    fast.base_model.requires_grad_(False)
    weight.requires_grad = False
    states = fast.base_model(**padded_batch())[0]
    head = nn.Linear(states.size(-1), 2)
    head(states).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.any()
    assert [parameter.requires_grad for parameter in pruned_ops.restore(fast).parameters()] == asked
    fast.requires_grad_(True)


def test_a_cache_of_keys_is_nothing_to_an_encoder() -> None:
    """Transformers' own encoders take the argument, and do without."""
    stock, batch = stock_model().bert, padded_batch()
    expected = stock(**batch, use_cache=True)
    states = pruned_ops.optimize(stock)(**batch, use_cache=True)[0]
    assert type(expected).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states[real], expected[0][real], atol=1e-4, rtol=1e-4)


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
