"""attn_implementation="pruned_ops" in stock models of transformers: eager's logits, on our kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    MPNetConfig,
    MPNetModel,
    RemBertConfig,
    RemBertModel,
    ViTConfig,
)

import pruned_ops
from inputs import READY, padded_batch, pruned_model, stock_model
from pruned_ops.ops.registry import record, use_backend
from pruned_ops.runtime.attention_interface import REGISTERED, attention

needs_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="transformers 4's BERT asks no attention interface",
)


@needs_5
@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_stock_models_say_the_same(kind: str, backend: str) -> None:
    model = stock_model(kind)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)
        model.set_attn_implementation("pruned_ops")
        with use_backend(backend), record() as ran:
            found = model(**batch)
    assert ran["attention"] == {backend: model.config.num_hidden_layers}
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][real], expected[name][real], rtol=1e-4, atol=1e-5)


@needs_5
@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (
            DistilBertConfig(vocab_size=96, dim=64, n_heads=4, n_layers=2, hidden_dim=96),
            {"input_ids": torch.arange(5, 45).view(2, 20)},
        ),
        (
            ViTConfig(
                hidden_size=64,
                num_attention_heads=4,
                num_hidden_layers=2,
                intermediate_size=96,
                image_size=32,
            ),
            {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
        ),
    ],
    ids=["distilbert", "vit"],
)
def test_other_encoders_too(config: Any, inputs: dict[str, Tensor]) -> None:
    """Loaded by the name, as a user would: nothing of theirs is known here."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("pruned_ops")
        with record() as ran:
            found = model(**inputs).last_hidden_state
    assert sum(ran["attention"].values()) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_5
def test_what_is_refused() -> None:
    heads = torch.randn(2, 4, 5, 16)
    causal = torch.nn.Module()
    causal.is_causal = True  # type: ignore[assignment]
    plain = torch.nn.Module()
    for module, key, settings, why in (
        (causal, heads, {}, "causal"),
        (plain, heads[:, :2], {}, "query is"),
        (plain, heads, {"scaling": 1.0}, "scaling is 1.0"),
        (plain, heads, {"dropout": 0.1}, r"dropout is 0.1; call model.eval\(\)"),
        (plain, heads, {"sliding_window": 4}, "sliding_window"),
    ):
        with pytest.raises(ValueError, match=why):
            attention(module, heads, key, key, None, **settings)
    model = stock_model()
    model.set_attn_implementation("pruned_ops")
    with pytest.raises(ValueError, match=r"is \(1, 1, 4, 4\), ones and zeros"):
        model(torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 1, 4, 4))
    assert pruned_ops.optimize(model).base_model is not None  # its own attention is not asked any more


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IGNORING: dict[str, Callable[[], Any]] = {
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "deberta": lambda: DebertaModel(DebertaConfig(**SIZES)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**SIZES)),
    "rembert": lambda: RemBertModel(RemBertConfig(**SIZES, input_embedding_size=32)),
    "ours": lambda: pruned_model().bert,
}


@pytest.mark.parametrize("kind", IGNORING)
def test_models_that_would_ignore_the_name_are_refused(kind: str) -> None:
    """transformers itself would take the name, and run the model's own attention."""
    model = IGNORING[kind]()
    before = model.config._attn_implementation
    why = "does not ask for its attention by name" if REGISTERED else "is for transformers 5"
    with pytest.raises(ValueError, match=f"attn_implementation='pruned_ops' cannot be used here: .*{why}"):
        model.set_attn_implementation("pruned_ops")
    with pytest.raises(ValueError, match=f"cannot be used here: .*{why}"):
        model.set_attn_implementation({"": "pruned_ops"})
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match=f"cannot be used here: .*{why}"):
        type(model)._from_config(copy.deepcopy(model.config), attn_implementation="pruned_ops")
    model.set_attn_implementation("eager")


def test_a_model_inside_another_is_refused_too() -> None:
    """The outer one has no attention of its own."""
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        RemBertConfig(**SIZES, input_embedding_size=32),
        RemBertConfig(**SIZES, input_embedding_size=32, is_decoder=True, add_cross_attention=True),
    )
    model = transformers.EncoderDecoderModel(config)
    with pytest.raises(ValueError, match="cannot be used here"):
        model.set_attn_implementation("pruned_ops")
    with pytest.raises(ValueError, match="cannot be used here"):
        model.set_attn_implementation({"encoder": "pruned_ops"})
