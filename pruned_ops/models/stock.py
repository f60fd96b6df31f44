"""The encoder inside a model: which ones are known, where it is, its parts, and the shape that it has."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import transformers
from torch import nn

from pruned_ops.models.disentangled import relative_norm
from pruned_ops.models.encoder import PRUNED_ENCODERS, PrunedBertModel
from pruned_ops.models.families.description import LayerNames
from pruned_ops.models.families.known import STOCK_ENCODERS, family_of, stock_encoder
from pruned_ops.shape import LayerShape, ModelShape

# The names of the classes of all encoders that are known.
ENCODER_NAMES = (*STOCK_ENCODERS, *(kind.__name__ for kind in PRUNED_ENCODERS.values()))


def is_encoder(module: object) -> bool:
    """Whether this is an encoder that is known, stock or pruned: of such a class, not of a subclass."""
    return is_encoder_class(type(module))


def is_encoder_class(kind: type[Any]) -> bool:
    """Whether this is the class of an encoder that is known, stock or pruned."""
    return stock_encoder(kind) is not None or kind in PRUNED_ENCODERS.values()


def encoder_class(name: str) -> type[Any] | None:
    """The class of a known encoder, by its own name; None for another name."""
    if name in STOCK_ENCODERS:
        return getattr(transformers, name)
    return next((kind for kind in PRUNED_ENCODERS.values() if kind.__name__ == name), None)


# The attribute of an encoder's class that says that the encoder is optimised.
OPTIMISED = "is_optimised"
# Where a model with several encoders keeps the name of the one that is meant.
_CHOSEN = "_pruned_ops_encoder"


def encoders_of(model: nn.Module) -> dict[str, Any]:
    """The known encoders inside `model` by their names ("" where it is one itself)."""
    return {name: module for name, module in model.named_modules() if is_encoder(module)}


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
    """The one known encoder inside `model`, or `model` itself where it is one; of several, the one
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
        raise ValueError(_refuse_without(model))
    return next(iter(encoders.values()))


def _refuse_without(model: nn.Module) -> str:
    """Why there is no encoder to be found in a model."""
    name = type(model).__name__
    if any(getattr(type(module), OPTIMISED, False) for module in model.modules()):
        return f"the encoder of this {name} is optimised: pruned_ops.restore(model) makes it what it was"
    return refuse_subclass(model) or (
        f"{name} contains no encoder; one of {', '.join(ENCODER_NAMES)} is needed"
    )


def refuse_subclass(model: nn.Module) -> str | None:
    """Why an encoder inside `model` that is of a subclass of a known one is not taken; None where there is no
    such."""
    for name, module in model.named_modules():
        base = next(filter(is_encoder_class, type(module).__mro__), None)
        if base is not None and not is_encoder(module):
            return (
                f"{f'{name}, ' if name else ''}a {type(module).__name__}, is a subclass of {base.__name__}, "
                "and what it changes would not be computed: if it changes nothing in the forward, set its "
                f"__class__ to {base.__name__} first"
            )
    return None


def running_encoder(model: nn.Module) -> Any:
    """The encoder that `find_encoder` finds, also where it is optimised, or the first of several."""
    name = chosen_name(model)
    if name is not None:
        return model.get_submodule(name)
    for module in model.modules():
        if any(map(is_encoder_class, type(module).__mro__)):
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
    family = family_of(config)
    kind = family.kind(config)
    dense = LayerShape(config.num_attention_heads, family.value(config, "intermediate_size"))
    head_dim = config.hidden_size // config.num_attention_heads
    layers = (dense,) * config.num_hidden_layers
    return ModelShape(layers, config.hidden_size, head_dim, kind.gated, kind.has_biases, kind.windows)


@dataclass(frozen=True)
class LayerParts:
    """The linears and LayerNorms of one layer, stock or pruned, whatever they are called there; the fields
    are those of `LayerNames`."""

    query: Any
    key: Any
    value: Any
    attention_output: Any
    attention_norm: Any
    up: Any
    down: Any
    ffn_norm: Any

    @property
    def qkv(self) -> tuple[Any, ...]:
        """The linears whose outputs are the heads', in the order in which the kernels take them."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))


def layer_list(encoder: Any) -> Any:
    """The list of an encoder's layers, as its publisher's modules."""
    return encoder.get_submodule(family_of(encoder.config).layers)


def layers_of(encoder: Any) -> list[LayerParts]:
    """The parts of every layer of an encoder. Errors: AttributeError where one of them is not there."""
    names = family_of(encoder.config).layer
    parts = [(field.name, getattr(names, field.name)) for field in fields(LayerNames)]
    return [
        LayerParts(**{part: layer.get_submodule(name) for part, name in parts})
        for layer in layer_list(encoder)
    ]


def words_of(encoder: Any) -> Any:
    """The table of the words' embeddings."""
    return encoder.embeddings.get_submodule(family_of(encoder.config).embeddings.words)


def projection_of(encoder: Any) -> Any:
    """The linear between embeddings and layers; None where they are equally wide."""
    name = family_of(encoder.config).projection
    return None if name is None else encoder._modules.get(name)


def tuple_keeps_pooler(encoder: Any) -> bool:
    """Whether the tuple that an encoder returns has None in the place of a pooler that it lacks, so that what
    follows is where the heads look for it. The publisher's classes that have an argument return_dict make the
    tuple so; in the others' and in ours there is nothing that is None."""
    kind = type(encoder)
    makes_tuple = (
        stock_encoder(kind) is not None and "return_dict" in inspect.signature(kind.forward).parameters
    )
    return makes_tuple and family_of(encoder.config).has_pooler


def hidden_norms(encoder: Any) -> list[Any]:
    """The LayerNorms whose outputs are hidden states: one after the embeddings, unless a projection makes the
    hidden states of them, one after embeddings of distances, and two in each layer."""
    family = family_of(encoder.config)
    first = [encoder.embeddings.get_submodule(family.embeddings.norm)]
    norms = [] if projection_of(encoder) is not None else first
    norms += [norm for norm in (relative_norm(encoder),) if norm is not None]
    return norms + [norm for layer in layers_of(encoder) for norm in (layer.attention_norm, layer.ffn_norm)]
