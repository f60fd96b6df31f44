"""The families that are known, and which of them a config or one of the publisher's classes belongs to.

The publisher's classes are told by their names, so that none of them is imported before a model of it is
there."""

from __future__ import annotations

from typing import Any

from pruned_ops.models.families.bert import BERT
from pruned_ops.models.families.data2vec_text import DATA2VEC_TEXT
from pruned_ops.models.families.deberta_v2 import DEBERTA_V2
from pruned_ops.models.families.description import STOCK_HEADS, Family
from pruned_ops.models.families.distilbert import DISTILBERT
from pruned_ops.models.families.electra import ELECTRA
from pruned_ops.models.families.ernie import ERNIE
from pruned_ops.models.families.modernbert import MODERNBERT
from pruned_ops.models.families.mpnet import MPNET
from pruned_ops.models.families.roberta import ROBERTA

FAMILIES = (BERT, ROBERTA, DISTILBERT, ERNIE, DATA2VEC_TEXT, ELECTRA, MPNET, MODERNBERT, DEBERTA_V2)
# By the model type of a stock or pruned config.
BY_TYPE: dict[str, Family] = {kind: family for family in FAMILIES for kind in family.model_types}
# The names of the publishers' encoder classes.
STOCK_ENCODERS: dict[str, Family] = {
    f"{stock.stem}Model": family for family in FAMILIES for stock in family.stock
}
_STOCK_HEADS: dict[str, tuple[Family, str]] = {
    f"{stock.stem}For{head}": (family, head)
    for family in FAMILIES
    for stock in family.stock
    for head in STOCK_HEADS
}
# Where transformers keeps its own models.
_PUBLISHERS = "transformers.models."


def family_of(config: Any) -> Family:
    """The family of a stock or pruned config. Errors: ValueError that names another model type."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in BY_TYPE:
        raise ValueError(f"it is a {kind!r} model; one of {', '.join(BY_TYPE)} is needed")
    return BY_TYPE[kind]


def stock_encoder(kind: type[Any]) -> Family | None:
    """The family of one of the publishers' encoder classes; None for another class."""
    return STOCK_ENCODERS.get(kind.__name__) if kind.__module__.startswith(_PUBLISHERS) else None


def stock_head(kind: type[Any]) -> tuple[Family, str] | None:
    """The family and the head (such as "QuestionAnswering") of one of the publishers' classes with a head
    that is known; None for another class."""
    return _STOCK_HEADS.get(kind.__name__) if kind.__module__.startswith(_PUBLISHERS) else None
