"""Which encoders the packed one can take the place of, and the shapes that they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.camembert.modeling_camembert import CamembertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from pruned_ops import ops
from pruned_ops.layers.modules import ACTIVATIONS, Projection
from pruned_ops.models.encoder import PrunedEmbeddings
from pruned_ops.models.modeling import PrunedBertModel, PrunedRobertaModel
from pruned_ops.shape import LayerShape, ModelShape

ENCODERS = (BertModel, RobertaModel, XLMRobertaModel, CamembertModel, PrunedBertModel, PrunedRobertaModel)
QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_EMBEDDINGS = (BertEmbeddings, RobertaEmbeddings, XLMRobertaEmbeddings, CamembertEmbeddings, PrunedEmbeddings)
_CAPTURING = "transformers.utils.output_capturing"


def model_shape(encoder: Any) -> ModelShape:
    """The shape of a stock or pruned encoder, from its config."""
    config = encoder.config
    if isinstance(encoder, PrunedBertModel):
        return config.shape
    dense = LayerShape(config.num_attention_heads, config.intermediate_size)
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelShape((dense,) * config.num_hidden_layers, config.hidden_size, head_dim)


def refuse(encoder: Any, int8: bool = False) -> str | None:
    """Why the packed encoder cannot take this one's place; None if it can."""
    config = encoder.config
    if int8:
        reasons = [
            kernel.backend.missing or kernel.refuse(torch.empty(0, dtype=torch.int8))
            for kernel in ops.encoder.kernels.values()
        ]
        if all(reasons):
            return "; ".join(reason for reason in reasons if reason)
        if (encoder.dtype, encoder.device.type, config.hidden_act) != (torch.float32, "cpu", "gelu"):
            return (
                f"int8 takes a float32 model on the CPU whose activation is gelu; this is {encoder.dtype} on "
                f"{encoder.device} with {config.hidden_act}"
            )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder, or has cross-attention"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return (
            f"position_embedding_type is {config.position_embedding_type!r}, only absolute "
            f"positions are computed"
        )
    if config.hidden_act != "gelu" and config.hidden_act not in ACTIVATIONS:
        return f"hidden_act is {config.hidden_act!r}; gelu, {', '.join(ACTIVATIONS)} are computed"
    for name, module in encoder.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in module.__dict__:
            return f"the forward of its {name or 'encoder'} was replaced, and would not run"
        # transformers' own hooks collect hidden states for its own forward, which does not run here.
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return f"its {name or 'encoder'} has forward hooks, which would not run (gates still attached?)"
    if type(encoder.embeddings) not in _EMBEDDINGS:
        return f"its embeddings are a {type(encoder.embeddings).__name__}, not the model's own"
    for i, layer in enumerate(encoder.encoder.layer):
        parts = stock_parts(layer)
        activation = parts.get("activation", parts.get("intermediate.intermediate_act_fn"))
        if type(activation) is not type(ACT2FN[config.hidden_act]):
            found = type(activation).__name__
            return f"layer {i}'s activation is a {found}, not the config's {config.hidden_act}"
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            if type(parts[name]) is not nn.LayerNorm or parts[name].eps != config.layer_norm_eps:
                return f"layer {i}'s {name} is not the nn.LayerNorm that the config describes"
        for name in (*QKV, "attention.output.dense", "intermediate.dense", "output.dense"):
            if type(parts[name]) not in (nn.Linear, Projection) or parts[name].bias is None:
                return (
                    f"layer {i}'s {name} is a {type(parts[name]).__name__}; a plain Linear with "
                    f"bias is needed"
                )
    return None


def stock_parts(stock: nn.Module) -> dict[str, Any]:
    """A stock or pruned layer's modules by name (the pruned ones keep theirs in ModuleDicts)."""
    return {name: module for name, module in stock.named_modules() if name}
