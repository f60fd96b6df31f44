"""The encoder inside a model: which ones are known, where it is, and the shape that it has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

from pruned_ops.models.encoder import PrunedBertModel, PrunedRobertaModel
from pruned_ops.shape import LayerShape, ModelShape

ENCODERS = (BertModel, RobertaModel, XLMRobertaModel, CamembertModel, PrunedBertModel, PrunedRobertaModel)
QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


# Where a model with several encoders keeps the name of the one that is meant.
_CHOSEN = "_pruned_ops_encoder"


def encoders_of(model: nn.Module) -> dict[str, Any]:
    """The known encoders inside `model` by their names ("" where it is one itself)."""
    return {name: module for name, module in model.named_modules() if type(module) in ENCODERS}


def choose_encoder(model: nn.Module, name: str) -> Any:
    """Let `find_encoder` find the encoder of this name in a model that contains several, and in its copies.

    Returns the encoder. Errors: ValueError, with the names that there are, where it is none of them."""
    encoders = encoders_of(model)
    if name not in encoders:
        known = ", ".join(encoders) or "none"
        raise ValueError(
            f"{type(model).__name__} has no encoder {name!r}; the names of its encoders: {known}"
        )
    model.__dict__[_CHOSEN] = name
    return encoders[name]


def chosen_name(model: nn.Module) -> str | None:
    """The name that was given to `choose_encoder`; None where it was not called."""
    return model.__dict__.get(_CHOSEN)


def find_encoder(model: nn.Module) -> Any:
    """The one BERT or RoBERTa encoder inside `model`, or `model` itself where it is one; of several, the one
    that `choose_encoder` named.

    Errors: ValueError where there is none, or more than one and none was named."""
    encoders = encoders_of(model)
    chosen = chosen_name(model)
    if chosen is not None:
        if chosen not in encoders:
            raise ValueError(
                f"the encoder {chosen!r} of {type(model).__name__} is optimised, or was replaced"
            )
        return encoders[chosen]
    if len(encoders) > 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(encoders)} encoders, {', '.join(encoders)}: name the one "
            "that is meant (encoder=...)"
        )
    if not encoders:
        known = ", ".join(encoder.__name__ for encoder in ENCODERS)
        raise ValueError(f"{type(model).__name__} contains no encoder; one of {known} is needed")
    return next(iter(encoders.values()))


def running_encoder(model: nn.Module) -> Any:
    """The encoder that `find_encoder` finds, also where it is optimised, or the first of several."""
    name = chosen_name(model)
    if name is not None:
        return model.get_submodule(name)
    for module in model.modules():
        if isinstance(module, ENCODERS):
            return module
    return find_encoder(model)  # which says what is missing


def config_of(model: nn.Module) -> Any:
    """The model's config, or its encoder's where it has none of its own."""
    config = getattr(model, "config", None)
    return running_encoder(model).config if config is None else config


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
