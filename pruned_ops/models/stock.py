"""The encoder inside a model: which ones are known, where it is, and the shape that it has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

from pruned_ops.models.encoder import PrunedBertModel, PrunedRobertaModel
from pruned_ops.shape import LayerShape, ModelShape

ENCODERS = (BertModel, RobertaModel, XLMRobertaModel, CamembertModel, PrunedBertModel, PrunedRobertaModel)
QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


def find_encoder(model: nn.Module) -> Any:
    """The one BERT or RoBERTa encoder inside `model`, or `model` itself where it is one.

    Errors: ValueError where there is none, or more than one."""
    encoders = [module for module in model.modules() if type(module) in ENCODERS]
    if len(encoders) != 1:
        known = ", ".join(encoder.__name__ for encoder in ENCODERS)
        raise ValueError(
            f"{type(model).__name__} contains {len(encoders)} encoders of {known}; exactly one is needed"
        )
    return encoders[0]


def model_shape(model: nn.Module) -> ModelShape:
    """The shape of the one stock or pruned encoder inside `model`, as its config describes it.

    Errors: ValueError as from `find_encoder`."""
    return encoder_shape(find_encoder(model))


def encoder_shape(encoder: Any) -> ModelShape:
    """The shape of an encoder, as its config describes it."""
    config = encoder.config
    if isinstance(encoder, PrunedBertModel):
        return config.shape
    dense = LayerShape(config.num_attention_heads, config.intermediate_size)
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelShape((dense,) * config.num_hidden_layers, config.hidden_size, head_dim)


def stock_parts(layer: nn.Module) -> dict[str, Any]:
    """The modules of a stock or pruned layer by name (the pruned ones keep theirs in ModuleDicts)."""
    return {name: module for name, module in layer.named_modules() if name}
