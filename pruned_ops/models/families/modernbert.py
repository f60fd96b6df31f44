"""ModernBERT: layers that norm first, gated FFNs, rotary positions, and a window in two layers of three."""

from __future__ import annotations

from typing import Any

from pruned_ops.layers.kinds import ByPosition, StackKind
from pruned_ops.models.families.description import (
    EmbeddingNames,
    Family,
    LayerNames,
    PredictionHeadNames,
    Stock,
    TextHeadNames,
)

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def layer_types(config: Any) -> list[str]:
    """GLOBAL or LOCAL for each layer. transformers 5's configs list them; those of transformers 4 say how
    many layers there are from one that is global to the next."""
    listed = getattr(config, "layer_types", None)
    if listed is not None:
        return list(listed)
    every = config.global_attn_every_n_layers
    return [LOCAL if i % every else GLOBAL for i in range(config.num_hidden_layers)]


def rotary_base(config: Any, layer_type: str) -> float:
    """The base of the wavelengths of rotary positions in the layers of a type."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        return float(parameters[layer_type]["rope_theta"])
    local = config.local_rope_theta
    return float(config.global_rope_theta if layer_type == GLOBAL or local is None else local)


def stack_kind(config: Any) -> StackKind:
    """The ways in which the layers of a config differ from BERT's. A window of 128 means that a key is at
    most 64 away, either way, in transformers 4 and 5 alike."""
    by_position = {
        GLOBAL: ByPosition(rotary_base(config, GLOBAL)),
        LOCAL: ByPosition(rotary_base(config, LOCAL), config.local_attention // 2),
    }
    return StackKind(
        norm_first=True,
        first_norm=False,
        final_norm=True,
        gated=True,
        attention_bias=config.attention_bias,
        ffn_bias=config.mlp_bias,
        norm_bias=config.norm_bias,
        by_position=tuple(by_position[kind] for kind in layer_types(config)),
    )


def refuse(config: Any) -> str | None:
    """Why the layers of a config are not computed; None if they are."""
    unknown = sorted(set(layer_types(config)) - {GLOBAL, LOCAL})
    if unknown:
        return f"layer_types has {', '.join(unknown)}, only {GLOBAL} and {LOCAL} are computed"
    scaled = {"rope_scaling": getattr(config, "rope_scaling", None)}
    for kind, parameters in (getattr(config, "rope_parameters", None) or {}).items():
        scaled[f"rope_parameters of {kind}"] = parameters
    for name, parameters in scaled.items():
        if parameters and parameters.get("rope_type", parameters.get("type", "default")) != "default":
            return f"{name} is {parameters}, only rotary positions of the default type are computed"
    if config.hidden_size // config.num_attention_heads % 2:
        return "an odd number of channels in each head has no rotary positions"
    return None


MODERNBERT = Family(
    name="ModernBERT",
    stock=(Stock("ModernBert", "modernbert", "PreTrainedTokenizerFast"),),
    prefix="model",
    layers="layers",
    layer=LayerNames(
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        attention_norm="attn_norm",
        up="mlp.Wi",
        down="mlp.Wo",
        ffn_norm="mlp_norm",
    ),
    final_norm="final_norm",
    embeddings=EmbeddingNames(words="tok_embeddings", positions=None, norm="norm"),
    text_head=TextHeadNames(first="head.dense", last="classifier"),
    embeddings_dropout="embedding_dropout",
    answers_dropout="classifier_dropout",
    answers_head="classifier",
    prediction_head=PredictionHeadNames("head", "classifier_pooling"),
    words_head=("head", "decoder"),
    words_rows=("decoder",),
    has_pooler=False,
    fields={
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    constants={"type_vocab_size": 0},
    stack_kind=stack_kind,
    refuses=refuse,
)
