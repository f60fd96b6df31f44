"""Data2VecText: RoBERTa under its own name."""

from __future__ import annotations

from dataclasses import replace

from pruned_ops.models.families.description import Stock
from pruned_ops.models.families.roberta import ROBERTA

DATA2VEC_TEXT = replace(
    ROBERTA,
    name="Data2VecText",
    stock=(Stock("Data2VecText", "data2vec-text", "RobertaTokenizerFast"),),
    prefix="data2vec_text",
)
