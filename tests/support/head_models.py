"""Small models under every head, stock and pruned, that tests of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

import pruned_ops
from inputs import ODD_SHAPES, pruned_model, shake, stock_model
from pruned_ops.models.heads import PrunedBertForNaturalQuestions

CONFIGS: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, pruned_ops.PrunedBertConfig),
    "roberta": (RobertaConfig, pruned_ops.PrunedRobertaConfig),
}
# The stock class, ours, and the Auto class that loads ours.
CLASSES: dict[tuple[str, str], tuple[Any, Any, Any]] = {
    ("bert", "sequence"): (
        BertForSequenceClassification,
        pruned_ops.PrunedBertForSequenceClassification,
        AutoModelForSequenceClassification,
    ),
    ("bert", "token"): (
        BertForTokenClassification,
        pruned_ops.PrunedBertForTokenClassification,
        AutoModelForTokenClassification,
    ),
    ("roberta", "sequence"): (
        RobertaForSequenceClassification,
        pruned_ops.PrunedRobertaForSequenceClassification,
        AutoModelForSequenceClassification,
    ),
    ("roberta", "token"): (
        RobertaForTokenClassification,
        pruned_ops.PrunedRobertaForTokenClassification,
        AutoModelForTokenClassification,
    ),
}
KINDS, HEADS = ("bert", "roberta"), ("sequence", "token")
SIZES = {
    "vocab_size": 100, "max_position_embeddings": 80, "initializer_range": 0.2, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DENSE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def stock(kind: str, head: str) -> Any:
    torch.manual_seed(0)
    types = {"type_vocab_size": 2 if kind == "bert" else 1}
    return shake(CLASSES[kind, head][0](CONFIGS[kind][0](**SIZES, **DENSE, **types)).eval(), 0)


def pruned(kind: str, head: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind][1](**SIZES, hidden_size=90, head_dim=16, layer_shapes=list(ODD_SHAPES))
    return shake(CLASSES[kind, head][1](config).eval(), 0)


def natural_questions() -> Any:
    torch.manual_seed(0)
    config = pruned_ops.PrunedBertConfig(
        hidden_size=90, head_dim=16, layer_shapes=list(ODD_SHAPES), vocab_size=100,
        max_position_embeddings=80, initializer_range=0.2,
    )  # fmt: skip
    return shake(PrunedBertForNaturalQuestions(config).eval(), 0)


# A model for every head.
MODELS: dict[str, Callable[[], Any]] = {
    "natural-questions": natural_questions,
    "question-answering": stock_model,
    "pruned-question-answering": pruned_model,
    **{f"stock-{kind}-{head}": lambda k=kind, h=head: stock(k, h) for kind, head in CLASSES},  # type: ignore[misc]
    **{f"pruned-{kind}-{head}": lambda k=kind, h=head: pruned(k, h) for kind in KINDS for head in HEADS},  # type: ignore[misc]
}


def fields(output: Any) -> dict[str, Tensor]:
    """The logits in a model's output, by name."""
    return {name: value for name, value in output.items() if name.endswith("logits")}
