"""Which encoders the packed one can take the place of, and the shapes that they have."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

from pruned_ops.models.encoder import PrunedBertModel, PrunedRobertaModel
from pruned_ops.shape import LayerShape, ModelShape

ENCODERS = (BertModel, RobertaModel, XLMRobertaModel, CamembertModel, PrunedBertModel, PrunedRobertaModel)
QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


def model_shape(encoder: Any) -> ModelShape:
    """The shape of a stock or pruned encoder, from its config."""
    config = encoder.config
    if isinstance(encoder, PrunedBertModel):
        return config.shape
    dense = LayerShape(config.num_attention_heads, config.intermediate_size)
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelShape((dense,) * config.num_hidden_layers, config.hidden_size, head_dim)


def stock_parts(stock: nn.Module) -> dict[str, Any]:
    """A stock or pruned layer's modules by name (the pruned ones keep theirs in ModuleDicts)."""
    return {name: module for name, module in stock.named_modules() if name}


def find_encoder(model: nn.Module) -> Any:
    """The one BERT or RoBERTa encoder inside `model`; ValueError where there is none, or more than one."""
    found = [module for module in model.modules() if type(module) in ENCODERS]
    if len(found) != 1:
        known = ", ".join(encoder.__name__ for encoder in ENCODERS)
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} encoders of {known}; exactly one is needed"
        )
    return found[0]
