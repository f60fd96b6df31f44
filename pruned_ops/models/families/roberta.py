"""RoBERTa: BERT's layers, with positions that are counted from the padding's id, and two linears in the head
that labels texts. XLM-R and CamemBERT are RoBERTa with vocabularies of their own."""

from __future__ import annotations

from dataclasses import replace

from pruned_ops.models.families.bert import BERT
from pruned_ops.models.families.description import Stock, TextHeadNames

ROBERTA = replace(
    BERT,
    name="RoBERTa",
    stock=(
        Stock("Roberta", "roberta", "RobertaTokenizerFast"),
        Stock("XLMRoberta", "xlm-roberta", "XLMRobertaTokenizerFast"),
        Stock("Camembert", "camembert", "CamembertTokenizerFast"),
    ),
    prefix="roberta",
    text_head=TextHeadNames("classifier.dense", "classifier.out_proj", input_dropout="classifier_dropout"),
    words_head=("lm_head",),
    words_rows=("lm_head", "lm_head.decoder"),
    positions_from_padding=True,
)
