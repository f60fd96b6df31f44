"""BERT, whose names the other families' files are written in."""

from __future__ import annotations

from pruned_ops.models.families.description import Family, LayerNames, Stock, TextHeadNames

BERT = Family(
    name="BERT",
    stock=(Stock("Bert", "bert", "BertTokenizerFast"),),
    prefix="bert",
    layers="encoder.layer",
    layer=LayerNames(
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        ffn_norm="output.LayerNorm",
    ),
    text_head=TextHeadNames(first=None, last="classifier"),
    words_head=("cls",),
    words_rows=("cls.predictions", "cls.predictions.decoder"),
)
