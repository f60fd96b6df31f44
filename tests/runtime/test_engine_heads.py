"""The graphs end with the logits where the head is one that we know; others run after them, and are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel

import pruned_ops
from counting import CustomHead
from head_models import MODELS, fields, pruned, stock
from inputs import padded_batch, stock_model
from pruned_ops.layers.weights import AlignedWeights, PanelWeights
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.known_heads import packed_head
from pruned_ops.runtime.packed_encoder import PackedEncoder
from pruned_ops.runtime.packed_heads import SpanHead
from stand_in_graphs import StandIn, ids_of, with_engine


def same(found: Any, expected: Any) -> None:
    assert fields(found).keys() == fields(expected).keys() and fields(found)
    for name, value in fields(expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_come_out_of_the_graph(kind: str) -> None:
    """The same as eagerly, padding included, and as tuples; no hidden states leave a graph."""
    model = MODELS[kind]()
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = pruned_ops.optimize(model)(**batch)
    recorder = StandIn()
    fast, engine = with_engine(model, recorder=recorder)
    same(fast(**batch), expected)
    for found, one in zip(fast(**batch, return_dict=False), fields(expected).values(), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    assert engine.stats.replays == 2 and engine.stats.captures == 1 and not engine.stats.outside
    widths = [output.size(-1) for output in recorder.outputs if output is not None]
    assert widths and max(widths) <= 5 < model.config.hidden_size


@pytest.mark.parametrize("kind", MODELS)
def test_eager_and_padded_logits_are_the_models_own(kind: str) -> None:
    """Optimised, with the head on packed rows and with a head that is not known, against the padded model."""
    model = MODELS[kind]()
    batch = ids_of([20, 3, 11])
    batch["input_ids"] += model.config.pad_token_id * (1 - batch["attention_mask"])
    with torch.no_grad():
        expected = fields(model(**batch))
        fast = pruned_ops.optimize(model)
        on_rows = fields(fast(**batch))
        name, linear = next(
            (n, m) for n, m in fast.named_modules() if type(m) is nn.Linear and "pool" not in n
        )
        linear.register_forward_hook(lambda *_: None)
        padded = fields(fast(**batch))
    real = batch["attention_mask"].bool()
    for key, value in expected.items():
        found, other = on_rows[key], padded[key]
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
        per_token = value.shape[:2] == real.shape
        pairs = (found[real], value[real]) if per_token else (found, value)
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["natural-questions", "stock-bert-sequence", "pruned-roberta-token"])
def test_large_batches_are_split_and_put_together(kind: str) -> None:
    """Texts of no token at either end are kept."""
    model = MODELS[kind]()
    batch = padded_batch((0, 30, 8, 25, 40, 1, 0), model.config.pad_token_id)
    expected = pruned_ops.optimize(model)(**batch)
    fast, engine = with_engine(model, max_tokens=40)
    same(fast(**batch), expected)
    assert engine.stats.replays == 4 and engine.stats.tokens == 104


def test_warm_up_captures_the_heads_too() -> None:
    fast, engine = with_engine(stock("bert", "token"))
    assert engine.warm_up([(10, 7), (30,)]) == 2
    fast(**ids_of([10, 7]))
    fast(**ids_of([30]))
    assert engine.stats.captures == 2 and engine.stats.replays == 2 and not engine.stats.outside


def test_a_head_that_changes_is_seen() -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([9, 4])
    first = fast(**batch).start_logits
    fast.qa_outputs = nn.Linear(64, 2)  # another linear
    second = fast(**batch).start_logits
    assert not torch.allclose(first, second)
    fast.qa_outputs.weight.data = torch.zeros(2, 64)  # other numbers, elsewhere
    assert torch.allclose(fast(**batch).start_logits[0], fast.qa_outputs.bias[0].detach())
    assert engine.stats.invalidated == 2 and not engine.stats.outside


def doubled(_: nn.Module, __: Any, pooled: torch.Tensor) -> torch.Tensor:
    """A hook that changes what it sees: the texts' rows, and not the empty ones beside a graph."""
    assert len(pooled) == 2
    return 2 * pooled


def changed_parts(fast: Any, change: str) -> None:
    if change == "another module":
        fast.classifier = nn.Sequential(fast.classifier)
    elif change == "a hook":
        fast.classifier.register_forward_hook(lambda *_: None)
    elif change == "a hooked pooler":
        fast.base_model.pooler.register_forward_pre_hook(lambda *_: None)
    elif change == "a hooked activation":
        fast.base_model.pooler.activation.register_forward_hook(lambda *_: None)
    elif change == "a hooked dropout":
        fast.dropout.register_forward_hook(doubled)
    elif change == "another activation":
        fast.base_model.pooler.activation = nn.Identity()
    else:
        fast.forward = fast.forward  # as accelerate's hooks do


@pytest.mark.parametrize(
    "change",
    [
        *("another module", "a hook", "a hooked pooler", "a hooked activation", "a hooked dropout"),
        *("another activation", "another forward"),
    ],
)
def test_heads_that_are_not_as_their_class_makes_them_run_outside(change: str) -> None:
    model = stock("bert", "sequence")
    batch = ids_of([9, 4])
    expected = pruned_ops.optimize(model)(**batch)
    fast, engine = with_engine(model)
    changed_parts(fast, change)
    if change == "another activation":
        expected = pruned_ops.optimize(fast)(**batch)
    if change == "a hooked dropout":
        bias = fast.classifier.bias
        expected.logits = 2 * (expected.logits - bias) + bias
    same(fast(**batch), expected)
    same(fast(**batch), expected)
    assert engine.stats.outside == {"BertForSequenceClassification": engine.stats.replays}
    assert engine.stats.replays >= 2


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_another_activation_of_a_pruned_classifier_counts(kind: str) -> None:
    model, fast = pruned(kind, "sequence"), pruned_ops.optimize(pruned(kind, "sequence"))
    batch = ids_of([9, 4])
    before = fast(**batch).logits
    model.activation = fast.activation = nn.Identity()
    assert not torch.allclose(fast(**batch).logits, before)
    same(fast(**batch), model(**batch))


def test_dropout_that_is_on_stays_the_models_own() -> None:
    fast, engine = with_engine(stock("bert", "token"))
    fast.dropout.train()
    fast(**ids_of([9]))
    assert engine.stats.outside == {"BertForTokenClassification": 1}


def test_heads_of_others_run_outside_and_are_named() -> None:
    """A head of one's own around an encoder, and a subclass with a forward of its own."""
    own = CustomHead(BertModel(stock_model().config).eval()).eval()
    batch = ids_of([9, 4])
    with torch.no_grad():
        expected = own(**batch)
    fast = pruned_ops.optimize(own)
    encoder = fast.inner["encoder"].packed
    encoder.engine = fast.engine = Engine(encoder, recorder=StandIn())
    torch.testing.assert_close(fast(**batch), expected, rtol=1e-4, atol=1e-5)
    assert fast.engine.stats.outside == {"CustomHead": 1} and fast.engine.stats.replays == 1

    class Doubled(type(stock_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.start_logits = 2 * found.start_logits
            return found

    assert packed_head(Doubled(stock_model().config)) is None
    assert isinstance(packed_head(stock_model()), SpanHead)


def test_other_integers_are_taken() -> None:
    fast, engine = with_engine(stock_model())
    batch = ids_of([9, 4])
    expected = fast(**batch)
    same(fast(**{name: tensor.int() for name, tensor in batch.items()}), expected)
    assert engine.stats.replays == 2


def test_a_layer_is_five_launches_of_ops_and_at_most_seven_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph records of each layer on a GPU: a GEMM, and four ops (their kernels: test_triton)."""
    monkeypatch.setattr(AlignedWeights, "refuse", staticmethod(lambda parts: None))
    monkeypatch.setattr(PanelWeights, "refuse", staticmethod(lambda parts: "not now"))
    fast = pruned_ops.optimize(stock_model())
    encoder: PackedEncoder = fast.base_model.packed
    inputs = [torch.ones(12, dtype=torch.int64)] * 3
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.no_grad(), Calls() as calls:
        encoder.compute(inputs, cu_seqlens, 7, encoder.heads[0])
    layer = ["addmm", "attention", "linear_add_layer_norm", "linear_gelu", "linear_add_layer_norm"]
    layers = layer * fast.config.num_hidden_layers
    assert calls.names == ["embed_layer_norm", *layers, "addmm"]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops called that launch something: views and bare allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("detach", "empty"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
