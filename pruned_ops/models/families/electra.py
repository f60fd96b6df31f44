"""ELECTRA: BERT's layers behind embeddings that may be narrower, and a GELU in the head that labels texts."""

from __future__ import annotations

from dataclasses import replace

from pruned_ops.models.families.bert import BERT
from pruned_ops.models.families.description import Stock, TextHeadNames

ELECTRA = replace(
    BERT,
    name="ELECTRA",
    stock=(Stock("Electra", "electra", "ElectraTokenizerFast"),),
    prefix="electra",
    text_head=TextHeadNames(
        "classifier.dense", "classifier.out_proj", "gelu", input_dropout="classifier_dropout"
    ),
    words_head=("generator_predictions", "generator_lm_head"),
    words_rows=("generator_lm_head",),
    has_pooler=False,
    projection="embeddings_project",
)
