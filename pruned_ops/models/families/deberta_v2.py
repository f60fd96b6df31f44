"""DeBERTa-v2 and v3: BERT's layers with disentangled attention, whose distances have embeddings that all
layers share. There may be no table of positions, and no token types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pruned_ops.layers.kinds import Disentangled, StackKind
from pruned_ops.models.families.bert import BERT
from pruned_ops.models.families.description import Family, RelativeEmbeddings, Stock, TextHeadNames

TO_POSITIONS, TO_CONTENT = "c2p", "p2c"
LEAST_BUCKETS = 4


def is_normed(config: Any) -> bool:
    """Whether a LayerNorm comes after the embeddings of distances."""
    named = str(getattr(config, "norm_rel_ebd", "none")).lower().split("|")
    return "layer_norm" in (name.strip() for name in named)


def disentangled(config: Any) -> Disentangled | None:
    """What the attentions of a config multiply by distance; None where they are BERT's."""
    if not config.relative_attention:
        return None
    types = config.pos_att_type or ()
    buckets, farthest = getattr(config, "position_buckets", -1), config.max_relative_positions
    return Disentangled(
        TO_POSITIONS in types,
        TO_CONTENT in types,
        max(0, buckets),
        config.max_position_embeddings if farthest < 1 else farthest,
    )


def refuse(config: Any) -> str | None:
    """Why the model of a config is not computed; None if it is."""
    if getattr(config, "conv_kernel_size", 0) > 0:
        return f"conv_kernel_size is {config.conv_kernel_size}, and convolutions are not computed"
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "embedding_size", width) != width:
        return f"embedding_size is {config.embedding_size}, only that of hidden_size ({width}) is computed"
    head_dim = getattr(config, "attention_head_size", width // heads)
    if config.model_type == DEBERTA_V2.stock[0].model_type and head_dim != width // heads:
        return f"attention_head_size is {head_dim}, only hidden_size / num_attention_heads is computed"
    terms = disentangled(config)
    if terms is None:
        named = {"pos_att_type": config.pos_att_type, "norm_rel_ebd": is_normed(config)}
        present_names = [name for name, value in named.items() if value]
        return f"{present_names[0]} is given without relative_attention" if present_names else None
    return _refuse_terms(config, terms)


def _refuse_terms(config: Any, terms: Disentangled) -> str | None:
    if not terms.products:
        return f"pos_att_type is {config.pos_att_type}, {TO_POSITIONS} or {TO_CONTENT} is needed"
    if not getattr(config, "share_att_key", False):
        return "share_att_key is False, only True is computed: distances go through the layers' own linears"
    middle = terms.buckets // 2
    if terms.buckets and (terms.buckets % 2 or terms.buckets < LEAST_BUCKETS):
        return f"position_buckets is {terms.buckets}, an even number from {LEAST_BUCKETS} on is needed"
    if terms.buckets and terms.farthest - 1 <= middle:
        return (
            f"position_buckets is {terms.buckets}, half of which has to be less than the farthest distance, "
            f"{terms.farthest} - 1 (max_relative_positions)"
        )
    return None


DEBERTA_V2 = Family(
    name="DeBERTa",
    stock=(Stock("DebertaV2", "deberta-v2", "DebertaV2TokenizerFast"),),
    prefix="deberta",
    layers=BERT.layers,
    layer=replace(
        BERT.layer,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
    ),
    text_head=TextHeadNames(
        "pooler.dense", "classifier", "gelu", dropout="cls_dropout", input_dropout="pooler_dropout"
    ),
    words_head=BERT.words_head,
    words_rows=BERT.words_rows,
    hands_on=False,
    has_pooler=False,
    positions_field="position_biased_input",
    may_lack_types=True,
    relative_embeddings=RelativeEmbeddings("encoder.rel_embeddings", "encoder.LayerNorm", is_normed),
    stack_kind=lambda config: StackKind(disentangled=disentangled(config)),
    refuses=refuse,
    constants={"classifier_dropout": None},
    fixed={"pooler_hidden_act": "gelu"},
)
