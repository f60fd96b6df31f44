"""MPNet: BERT's layers under other names, with RoBERTa's positions, and a bias by relative position that all
layers share. It has no token types."""

from __future__ import annotations

from pruned_ops.layers.kinds import StackKind
from pruned_ops.models.families.description import Family, LayerNames, RelativeBias, Stock
from pruned_ops.models.families.roberta import ROBERTA

BIAS = RelativeBias("encoder.relative_attention_bias", buckets=32, reach=128)
MPNET = Family(
    name="MPNet",
    stock=(Stock("MPNet", "mpnet", "MPNetTokenizerFast"),),
    prefix="mpnet",
    layers="encoder.layer",
    layer=LayerNames(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
        attention_norm="attention.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        ffn_norm="output.LayerNorm",
    ),
    text_head=ROBERTA.text_head,
    words_head=ROBERTA.words_head,
    words_rows=ROBERTA.words_rows,
    hands_on=False,
    positions_from_padding=True,
    relative_bias=BIAS,
    stack_kind=lambda config: StackKind(bias_reach=BIAS.reach),
    # Its modules take 1 for the padding, and 32 buckets, whatever the config says.
    constants={"type_vocab_size": 0, "classifier_dropout": None, "pad_token_id": 1},
    fixed={"relative_attention_num_buckets": 32},
)
