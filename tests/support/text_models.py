"""Small models of sentence-transformers with a tokenizer, made in a folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from inputs import shake
from tiny_tokenizers import word_tokenizer

WORDS = 400
_SIZES = {
    "vocab_size": WORDS + 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_KINDS = {
    "SentenceTransformer": BertModel,
    "CrossEncoder": BertForSequenceClassification,
    "SparseEncoder": BertForMaskedLM,
}


def text_folder(folder: Path, kind: str = "SentenceTransformer", **fields: Any) -> str:
    """A checkpoint of transformers, of a random model of the kind that this class of sentence-transformers
    reads, with a tokenizer whose words are w0 to w399."""
    torch.manual_seed(0)
    config = BertConfig(**{**_SIZES, "num_labels": 1, **fields})
    shake(_KINDS[kind](config).eval(), 0).save_pretrained(folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


def sentences(lengths: list[int], seed: int = 0) -> list[str]:
    """Texts of so many words each."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(length)) for length in lengths]
