"""sentence-transformers around an optimised encoder: the same embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import pruned_ops
from pruned_ops.ops.registry import record
from tiny_tokenizers import word_tokenizer, words

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed"
)


def test_embeddings_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=96, **sizes)).save_pretrained(tmp_path)
    word_tokenizer(96).save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    texts = [words(3), words(40), "", words(11)]
    expected = model.encode(texts, convert_to_tensor=True)
    with record() as ran:
        found = pruned_ops.optimize(model).encode(texts, convert_to_tensor=True)
    assert "embed_layer_norm" in ran
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = pruned_ops.restore(model).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
