"""No weight is lost: optimize and restore that fail at any step, shared weights, inference mode, saving."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForQuestionAnswering, BertModel

import pruned_ops
from family_models import ANSWERS, pruned
from inputs import MODELS, logits, padded_batch, pruned_model, stock_model
from int8_anywhere import int8_anywhere
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.packed_encoder import OptimisedEncoder, PackedEncoder
from thorough import EVERYTHING


class FailAt(TorchDispatchMode):
    """Raises an error at the n-th op that torch runs inside, as where there is no memory left for it."""

    def __init__(self, number: int, error: type[Exception]) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_is(model: nn.Module, before: dict[str, Tensor], identities: list[int]) -> None:
    """The model is plain, with its own parameters and their values bit for bit."""
    assert not any(isinstance(module, OptimisedEncoder) for module in model.modules())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def failures(run: Callable[[], Any], error: type[Exception], after: Callable[[], None]) -> int:
    """Let `run` fail at its first op, its second and so on, until it succeeds: the number of the op before.
    From the 40th on it fails at every seventh op, because layers repeat; in `make test-all` at every one."""
    number = 0
    while True:
        number += 1 if EVERYTHING or number < 40 else 7
        try:
            with FailAt(number, error):
                run()
        except (ValueError, error):  # ValueError: the refusal of a model that could not be looked at
            after()
        else:
            return number - 1


@pytest.mark.parametrize(("kind", "error"), [("stock-bert", RuntimeError), ("pruned-roberta", MemoryError)])
def test_optimize_that_fails_at_any_step_gives_the_model_back(kind: str, error: type[Exception]) -> None:
    model = MODELS[kind]().train()
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    batch = padded_batch(pad_token_id=model.config.pad_token_id)

    def check() -> None:
        assert_is(model, before, identities)
        assert model.training and "engine" not in model.__dict__ and "encode_many" not in model.__dict__

    assert failures(lambda: pruned_ops.optimize(model), error, check) > 50
    expected = logits(pruned_ops.optimize(MODELS[kind]()), batch)
    assert torch.equal(logits(model, batch), expected)  # and then it succeeds
    pruned_ops.restore(model)
    check()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_restore_that_fails_at_any_step_leaves_the_model_optimised(
    model: Any, error: type[Exception]
) -> None:
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = logits(pruned_ops.optimize(model), batch)

    def check() -> None:
        assert torch.equal(logits(model, batch), expected)

    assert failures(lambda: pruned_ops.restore(model), error, check) > 5
    assert_is(model, before, identities)


def test_a_move_that_fails_gives_the_plain_model_back() -> None:
    model = stock_model()
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    for number in range(1, 200, 7):
        pruned_ops.optimize(model)
        with FailAt(number, MemoryError):
            try:
                model.to("cpu")
            except MemoryError:
                pass
        pruned_ops.restore(model)
        assert_is(model, before, identities)


def test_int8_that_fails_gives_the_model_back() -> None:
    model = stock_model()
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    try:
        pruned_ops.restore(pruned_ops.optimize(model, dtype="int8"))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    for number in (1, 300, 500, 700, 1000, 1500, 2000):
        with FailAt(number, MemoryError):
            try:
                pruned_ops.optimize(model, dtype="int8", calibration=[padded_batch()])
            except (MemoryError, ValueError):
                assert_is(model, before, identities)
        pruned_ops.restore(model)
        assert_is(model, before, identities)


def test_a_part_that_was_optimised_before_stays_so_where_the_whole_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, other = stock_model(), stock_model(seed=1).train()
    both, batch = nn.ModuleList([part, other]), padded_batch()
    before, identities = state(other), [id(parameter) for parameter in other.parameters()]
    expected = logits(pruned_ops.optimize(part), batch)

    def fail(*_: Any) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(PackedEncoder, "release", fail)
        with pytest.raises(MemoryError, match="injected"):
            pruned_ops.optimize(both)
    assert isinstance(part.bert, OptimisedEncoder) and hasattr(part, "encode_many")
    assert torch.equal(logits(part, batch), expected)
    assert_is(other, before, identities)
    assert both.training and not part.training and all(module.training for module in other.modules())


def test_a_part_stays_in_int8_where_the_whole_fails() -> None:
    """The calibration of both, which changes what runs in int8, ends at a model without a forward."""
    part, batch = stock_model(), padded_batch()
    both = nn.ModuleList([part, stock_model(seed=1)])
    with int8_anywhere():
        expected = logits(pruned_ops.optimize(part, dtype="int8"), batch)
        stack = part.bert.packed.encoder
        linears, losses = stack.int8_linears, part.int8_losses
        with pytest.raises(NotImplementedError):
            pruned_ops.optimize(both, dtype="int8", calibration=[{}])
        assert part.bert.packed.encoder is stack and stack.int8_linears == linears
        assert part.int8_losses is losses and torch.equal(logits(part, batch), expected)


def dropped(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:2]


def without_bias(model: Any) -> None:
    layer = model.bert.encoder.layer[1].output
    layer.LayerNorm = nn.LayerNorm(64, eps=1e-12, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped, "it has 2 layers and its config says 3: set config.num_hidden_layers = 2"),
        (without_bias, "layer 1's output.LayerNorm has no bias"),
    ],
)
def test_a_refused_model_keeps_its_weights(change: Any, message: str) -> None:
    model = stock_model()
    change(model)
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        pruned_ops.optimize(model)
    assert_is(model, before, identities)
    pruned_ops.restore(model)
    assert_is(model, before, identities)


@pytest.mark.parametrize("kind", ["pruned_bert", "pruned_mpnet"])
def test_a_pruned_model_without_a_layer_runs_once_its_config_says_so(kind: str) -> None:
    """What the refusal names is enough, and all of it is needed."""
    model = pruned(kind, ANSWERS)
    layers = find_encoder(model).encoder.layer
    del layers[0]
    fields = ["layer_shapes", *(["head_indices"] if kind == "pruned_mpnet" else [])]
    message = (
        f"it has {len(layers)} layers and its config says {len(layers) + 1}: set config.num_hidden_layers = "
        f"{len(layers)}, and config.{' and config.'.join(fields)} to their entries of those that are left"
    )
    with pytest.raises(ValueError, match=message):
        pruned_ops.optimize(model)
    model.config.num_hidden_layers = len(layers)
    for name in fields:
        with pytest.raises(ValueError, match=f"cannot be made from its config .*{name}"):
            pruned_ops.optimize(model)
        setattr(model.config, name, getattr(model.config, name)[1:])
    batch = padded_batch()
    real, expected = batch["attention_mask"].bool(), logits(model, batch)
    found = logits(pruned_ops.optimize(model), batch)
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-5)


def share_layer(model: Any) -> None:
    model.bert.encoder.layer[2] = model.bert.encoder.layer[0]


def share_weight(model: Any) -> None:
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight


def share_query_and_key(model: Any) -> None:
    attention = model.bert.encoder.layer[1].attention.self
    attention.query.weight = attention.key.weight


def share_outside(model: Any) -> None:
    model.other = nn.Linear(64, 64)
    model.other.weight = model.bert.encoder.layer[1].attention.self.value.weight


@pytest.mark.parametrize("change", [share_layer, share_weight, share_query_and_key, share_outside])
def test_shared_weights(change: Any) -> None:
    """They are laid out and given back; whatever else holds them computes with their values meanwhile."""
    model = stock_model()
    change(model)
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)
    other = model.other(torch.ones(1, 64)) if hasattr(model, "other") else None
    fast = pruned_ops.optimize(model)
    torch.testing.assert_close(logits(fast, batch)[real], expected[real], atol=2e-5, rtol=1e-5)
    if other is not None:
        assert torch.equal(model.other(torch.ones(1, 64)), other)
    pruned_ops.restore(fast)
    assert_is(model, before, identities)
    assert torch.equal(logits(model, batch), expected)


def test_a_shared_layer_is_laid_out_once() -> None:
    model = stock_model()
    share_layer(model)
    stack = pruned_ops.optimize(model).bert.packed.encoder
    assert stack.layers[2].ffn.up.weight is stack.layers[0].ffn.up.weight
    if stack.runs_in_one_call:
        weights = stack.laid_out.weights
        assert [one.data_ptr() for one in weights[:3]] == [one.data_ptr() for one in weights[24:27]]


def test_an_encoder_of_two_models() -> None:
    """Both run packed, and either restores it."""
    one, other = stock_model(), stock_model(seed=1)
    other.bert = one.bert
    before, identities = state(one), [id(parameter) for parameter in one.parameters()]
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    expected = [logits(model, batch) for model in (one, other)]
    pruned_ops.optimize(one)
    torch.testing.assert_close(logits(other, batch)[real], expected[1][real], atol=2e-5, rtol=1e-5)
    assert pruned_ops.optimize(other) is other
    for model, logits_before in zip((one, other), expected, strict=True):
        found = logits(model, batch)
        torch.testing.assert_close(found[real], logits_before[real], atol=2e-5, rtol=1e-5)
        assert (found[~real] == torch.finfo(torch.float32).min).all()
    pruned_ops.restore(other)
    assert_is(one, before, identities)
    for model, logits_before in zip((one, other), expected, strict=True):
        assert torch.equal(logits(model, batch), logits_before)
    pruned_ops.restore(one)
    assert_is(one, before, identities)


@pytest.mark.parametrize("loaded", [False, True])
def test_inference_mode(model: Any, loaded: bool) -> None:
    """Optimised in it, the model runs and is restored outside; also where it was made in it."""
    if loaded:
        with torch.inference_mode():
            model = copy.deepcopy(model)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    with torch.inference_mode():
        before = state(model)
        expected = logits(model, batch)
        pruned_ops.optimize(model)
        inside = logits(model, batch)
    outside = logits(model, batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(inside[real], expected[real], atol=2e-5, rtol=1e-5)
    assert torch.equal(inside, outside)
    pruned_ops.restore(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, batch), expected)


def test_an_output_with_a_graph_keeps_its_weights() -> None:
    """The gradients of a loss that was computed before optimize are those of the model."""
    model, batch = stock_model(), padded_batch((9, 4))
    twin = copy.deepcopy(model)
    twin(**batch).start_logits.sum().backward()
    loss = model(**batch).start_logits.sum()
    gradient_of = model.bert.embeddings.word_embeddings.weight
    pruned_ops.optimize(model)
    (gradient,) = torch.autograd.grad(loss, [model.qa_outputs.weight])
    torch.testing.assert_close(gradient, twin.qa_outputs.weight.grad)
    del loss, gradient, gradient_of
    gc.collect()
    logits(model, batch)
    assert not model.bert.packed._waiting  # what nobody reads any more is released


def test_a_bare_encoder_is_optimised_in_place(tmp_path: Path) -> None:
    encoder = stock_model().bert
    batch = padded_batch((9, 4))
    real = batch["attention_mask"].bool()
    before, identities = state(encoder), [id(parameter) for parameter in encoder.parameters()]
    with torch.no_grad():
        expected = encoder(**batch).last_hidden_state
    assert pruned_ops.optimize(encoder) is encoder
    assert pruned_ops.optimize(encoder) is encoder and type(encoder).__name__ == "BertModel"
    with torch.no_grad():
        found = encoder(**batch).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-5)
    encoder.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.architectures == ["BertModel"]
    again = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())
    assert pruned_ops.restore(encoder) is encoder
    assert_is(encoder, before, identities)


def test_an_optimised_model_saves_its_own_weights(model: Any, tmp_path: Path) -> None:
    before = state(model)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = logits(model, batch)
    fast = pruned_ops.optimize(model)
    found = fast.state_dict()
    assert list(found) == list(before)
    assert all(torch.equal(found[name], before[name]) for name in before)
    fast.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batch), expected)
    torch.save(fast.bert if hasattr(fast, "bert") else fast.roberta, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert isinstance(whole, OptimisedEncoder)
    with torch.no_grad():
        assert torch.equal(whole(**batch).last_hidden_state, fast.base_model(**batch).last_hidden_state)


def test_released_weights_read_as_they_are_and_refuse_writes() -> None:
    model = stock_model()
    layer = model.bert.encoder.layer[1]
    x = torch.ones(1, 3, 64)
    with torch.no_grad():
        expected = layer.attention.self.query(x), layer.output.dense.weight.sum()
        pruned_ops.optimize(model)
        weight: Any = layer.attention.self.query.weight
        assert torch.equal(layer.attention.self.query(x), expected[0])
        assert torch.equal(layer.output.dense.weight.sum(), expected[1])
        assert weight.shape == (64, 64) and weight.dtype == torch.float32 and "64, 64" in repr(weight)
        for write in (
            lambda: weight.mul_(2),
            lambda: weight.__setitem__(0, 1),
            lambda: nn.init.zeros_(weight),
            lambda: weight.data.mul_(2),
            lambda: setattr(weight, "data", torch.zeros(64, 64)),
            lambda: torch.add(weight, 1, out=weight),
            lambda: layer.half(),
        ):
            with pytest.raises(RuntimeError, match="restore|inference tensor"):
                write()
        with pytest.raises(RuntimeError, match="restore"):
            torch._foreach_mul_([torch.ones(1), weight], 2)
        mean, values = torch.ones(64, 64), weight.clone()
        mean.mul_(0.5).add_(weight)  # others are written to, as a mean over models is
        assert torch.equal(mean, values + 0.5) and torch.equal(mean.copy_(weight), values)
        assert torch.equal(torch.add(weight, 1, out=mean), values + 1)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock_model().parameters())


def test_a_pruned_layer_without_anything() -> None:
    model = pruned_model(shapes=[pruned_ops.LayerShape(0, 0)] * 2)
    before, identities = state(model), [id(parameter) for parameter in model.parameters()]
    pruned_ops.restore(pruned_ops.optimize(model))
    assert_is(model, before, identities)
