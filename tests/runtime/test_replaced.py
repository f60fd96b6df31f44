"""What is changed in an optimised encoder after `optimize` is right, or refused by name: never ignored."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import head_models
import pruned_ops
from family_models import FAMILIES, batch, largest_difference, outputs, stock
from inputs import MODELS, logits, padded_batch, stock_model
from pruned_ops.runtime.replaced import ReplacedModule


class Adapter(nn.Module):
    """A bottleneck beside a linear, as adapter libraries put it in the linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight * 2


def hook(*_: Any) -> None:
    """A forward hook."""


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook of a linear": lambda bert: bert.encoder.layer[1].output.dense.register_forward_hook(hook),
    "hook before a layer": lambda bert: bert.encoder.layer[0].register_forward_pre_hook(hook),
    "hook of the stack": lambda bert: bert.encoder.register_forward_hook(hook),
    "hook of the embeddings": lambda bert: bert.embeddings.register_forward_hook(hook),
    "hook of a table": lambda bert: bert.embeddings.word_embeddings.register_forward_hook(hook),
    "adapter": lambda bert: setattr(
        bert.encoder.layer[1].output, "dense", Adapter(bert.encoder.layer[1].output.dense)
    ),
    "new submodule": lambda bert: bert.encoder.layer[0].output.add_module("adapter", nn.Linear(64, 64)),
    "new layer": lambda bert: bert.encoder.layer.append(copy.deepcopy(bert.encoder.layer[0])),
    "layer put between": lambda bert: bert.encoder.layer.insert(0, bert.encoder.layer[1]),
    "layer in another's place": lambda bert: bert.encoder.layer.__setitem__(0, bert.encoder.layer[1]),
    "no last layer": lambda bert: bert.encoder.layer.__delitem__(-1),
    "forward of an object": lambda bert: setattr(bert.encoder.layer[1], "forward", lambda x, *_: x),
    "method of an object": lambda bert: setattr(bert.encoder.layer[1], "feed_forward_chunk", lambda x: x),
    "class of an object": lambda bert: setattr(bert.encoder.layer[1], "__class__", nn.Identity),
    "eps": lambda bert: setattr(bert.encoder.layer[1].output.LayerNorm, "eps", 1.0),
    "weight": lambda bert: setattr(
        bert.encoder.layer[1].output.dense, "weight", nn.Parameter(torch.ones(64, 96))
    ),
    "bias": lambda bert: bert.encoder.layer[1].output.dense.register_parameter("bias", None),
    "parametrization": lambda bert: parametrize.register_parametrization(
        bert.encoder.layer[1].output.dense, "weight", Doubled()
    ),
    "other embeddings": lambda bert: setattr(bert, "embeddings", copy.deepcopy(bert.embeddings)),
    "other table": lambda bert: bert.set_input_embeddings(nn.Embedding(100, 64)),
    "other stack": lambda bert: setattr(bert, "encoder", nn.Identity()),
    "other pooler": lambda bert: setattr(bert, "pooler", nn.Identity()),
    "other config": lambda bert: setattr(bert, "config", copy.deepcopy(bert.config)),
    "other weights for one call": lambda bert: torch.func.functional_call(
        bert, {"encoder.layer.1.output.dense.weight": torch.ones(64, 96)}, (torch.ones(1, 4).long(),)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_would_be_ignored_is_refused(change: str) -> None:
    model, batch = stock_model(), padded_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(pruned_ops.optimize(model), batch)
    with pytest.raises(RuntimeError, match=r"pruned_ops\.restore\(model\)"):
        CHANGES[change](model.bert)
    assert torch.equal(logits(model, batch), expected)
    after = pruned_ops.restore(model).state_dict()
    assert [type(module) for module in model.modules()] == [type(m) for m in stock_model().modules()]
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda parameter: parameter.mul_(1.5),
    "other data": lambda parameter: setattr(parameter, "data", parameter.detach() * 1.5),
    "to its data": lambda parameter: parameter.data.mul_(1.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("stem", FAMILIES)
def test_no_write_to_a_weight_is_ignored(stem: str, write: str) -> None:
    """It is refused; or the outputs are those of a plain model with this weight, as of the embeddings."""
    fast, inputs = pruned_ops.optimize(stock(stem, "")), batch("right")
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    taken = []
    for name, parameter in fast.named_parameters():
        with torch.no_grad():
            try:
                WRITES[write](parameter)
            except RuntimeError as refusal:
                assert "restore" in str(refusal) or "inference tensor" in str(refusal)
                continue
            plain = stock(stem, "")
            plain.get_parameter(name).mul_(1.5)
        assert largest_difference(outputs(fast, inputs), outputs(plain, inputs)) < 1e-4, name
        with torch.no_grad():
            parameter.copy_(before[name])
        taken.append(name)
    assert taken and all(name.startswith(("embeddings", "pooler")) for name in taken)
    after = pruned_ops.restore(fast).state_dict()
    assert all(type(parameter) is nn.Parameter for parameter in fast.parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_after_restore_changes_are_taken() -> None:
    model, batch = pruned_ops.restore(pruned_ops.optimize(stock_model())), padded_batch()
    before = logits(model, batch)
    assert not any(isinstance(module, ReplacedModule) for module in model.modules())
    assert all(type(m._parameters) is dict and type(m._modules) is dict for m in model.modules())
    output = model.bert.encoder.layer[1].output
    output.dense = Adapter(output.dense)
    assert not torch.equal(logits(model, batch), before)
    with pytest.raises(ValueError, match="layer 1's output.dense is a Adapter"):
        pruned_ops.optimize(model)


def test_the_forward_of_a_class_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pruned_ops.optimize(stock_model()), padded_batch()
    kind = type(stock_model().bert.encoder.layer[0].intermediate)
    expected = logits(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: x)
        with pytest.raises(RuntimeError, match=f"another forward for the class of this {kind.__name__}"):
            logits(model, batch)
    assert torch.equal(logits(model, batch), expected)


def test_hooks_of_the_encoder_itself_run_and_see_all_states() -> None:
    """The head then runs on what the hook gives, also where it changes the states."""
    model, batch = pruned_ops.optimize(stock_model()), padded_batch()
    real = batch["attention_mask"].bool()
    before, seen = logits(model, batch), []

    def double(module: Any, arguments: Any, output: Any) -> Any:
        seen.append(output.last_hidden_state.shape)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    handle = model.bert.register_forward_hook(double)
    found = logits(model, batch)
    assert seen == [(*batch["input_ids"].shape, 64)]
    bias = model.qa_outputs.bias.detach()
    torch.testing.assert_close(found[real] - bias, 2 * (before[real] - bias), rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(logits(model, batch), before)


def test_hooks_that_the_encoder_and_its_pooler_had_go_on_running() -> None:
    model, batch = head_models.stock("bert", "sequence"), padded_batch((9, 4))
    for module in (model.bert, model.bert.pooler, model.bert.pooler.dense):
        module.register_forward_pre_hook(lambda *_: ran.append(1))
    model.bert.pooler.register_forward_hook(lambda *call: 2 * call[2])
    ran: list[int] = []
    with torch.no_grad():
        expected = model(**batch).logits
        optimised = pruned_ops.optimize(model)(**batch).logits
    torch.testing.assert_close(optimised, expected, atol=2e-5, rtol=1e-5)
    assert len(ran) == 6


def test_tables_may_be_replaced() -> None:
    """The embeddings' own weights are read at every forward."""
    model, twin, batch = pruned_ops.optimize(stock_model()), stock_model(), padded_batch()
    table = nn.Parameter(torch.randn(100, 64))
    for changed in (model, twin):
        changed.bert.embeddings.word_embeddings.weight = table
        changed.bert.embeddings.LayerNorm.eps = 0.5
    found = logits(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], logits(twin, batch)[real], atol=2e-5, rtol=1e-5)
    model.bert.embeddings.LayerNorm.eps = 0.25
    assert not torch.equal(found, logits(model, batch))


def test_what_changes_nothing_is_allowed() -> None:
    model, batch = pruned_ops.optimize(stock_model()), padded_batch()
    expected = logits(model, batch)
    layer = model.bert.encoder.layer[0]
    layer.note = "mine"
    layer.output.dense = layer.output.dense
    layer.output.dropout.p = 0.3
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.eval().requires_grad_(False).to("cpu")
    assert type(layer).__name__ == "BertLayer" and isinstance(layer.output.dense, nn.Linear)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", MODELS)
def test_copies_refuse_and_are_restored_too(kind: str, copied: Callable[[Any], Any]) -> None:
    model = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    twin = copied(pruned_ops.optimize(model))
    assert torch.equal(logits(twin, batch), logits(model, batch))
    modules = [module for module in twin.modules() if isinstance(module, ReplacedModule)]
    assert len(modules) > 10
    with pytest.raises(RuntimeError, match="restore"):
        modules[-1].register_forward_hook(hook)
    assert [type(p) for p in twin.parameters()] == [type(p) for p in model.parameters()]
    plain = pruned_ops.restore(twin)
    assert not any(isinstance(module, ReplacedModule) for module in plain.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert [type(m) for m in plain.modules()] == [type(m) for m in MODELS[kind]().modules()]
