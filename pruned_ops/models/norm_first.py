"""The padded, trainable layer of pruned models whose LayerNorms come first: rotary positions, windows and
gated FFNs, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from pruned_ops.layers.kinds import ByPosition
from pruned_ops.layers.parts import PrunedLinear
from pruned_ops.models.configuration import PrunedConfig
from pruned_ops.models.modules import put
from pruned_ops.shape import LayerShape


class NormFirstLayer(GradientCheckpointingLayer):
    """One layer with its own number of heads and FFN width, under its publisher's parameter names:
    (batch, seqlen, hidden_size) -> the same.

    One linear makes query, key and value, and one both products of a gated FFN. Under gradient checkpointing
    the layer keeps its input alone, and is computed again in the backward pass."""

    def __init__(self, config: PrunedConfig, shape: LayerShape, number: int) -> None:
        super().__init__()
        family, kind = config.family, config.family.kind(config)
        self.names, self.by_position = family.layer, kind.of_layer(number)
        self.num_heads, self.head_dim = shape.num_heads, config.head_dim
        hidden, width, units = config.hidden_size, shape.num_heads * config.head_dim, shape.ffn_width
        eps = family.value(config, "layer_norm_eps")
        has_norm = number > 0 or kind.first_norm
        norm = nn.LayerNorm(hidden, eps, bias=kind.norm_bias) if has_norm else nn.Identity()
        put(self, self.names.attention_norm, norm)
        put(self, self.names.query, PrunedLinear(hidden, 3 * width, kind.attention_bias))
        put(self, self.names.attention_output, PrunedLinear(width, hidden, kind.attention_bias))
        put(self, self.names.ffn_norm, nn.LayerNorm(hidden, eps, bias=kind.norm_bias))
        put(self, self.names.up, PrunedLinear(hidden, 2 * units, kind.ffn_bias))
        put(self, self.names.down, PrunedLinear(units, hidden, kind.ffn_bias))
        self.activation = ACT2FN[family.value(config, "hidden_act")]
        self.attention_dropout = nn.Dropout(family.value(config, "attention_probs_dropout_prob"))
        self.dropout = nn.Dropout(family.value(config, "hidden_dropout_prob"))

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        names, part = self.names, self.get_submodule
        context = self._context(part(names.attention_norm)(x), additive_mask)
        x = x + self.attention_dropout(part(names.attention_output)(context))
        gate, up = part(names.up)(part(names.ffn_norm)(x)).chunk(2, -1)
        return x + part(names.down)(self.dropout(self.activation(gate) * up))

    def _context(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        """Multi-head attention: (batch, seqlen, hidden_size) -> (batch, seqlen, num_heads * head_dim)."""
        if self.num_heads == 0:
            return x.new_zeros(*x.shape[:2], 0)
        qkv = self.get_submodule(self.names.query)(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        query, key, value = qkv.transpose(1, 3).unbind(2)
        query, key = turned(self.by_position, query, key)
        mask = with_window(self.by_position, additive_mask, x)
        dropout = self.attention_dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2)


def turned(by_position: ByPosition, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key (batch, heads, seqlen, head_dim), rotated by their places."""
    frequencies = by_position.frequencies(query.size(-1))
    if frequencies is None:
        return query, key
    places = torch.arange(query.size(-2), device=query.device, dtype=torch.float32)
    angles = places[:, None] * frequencies.to(query.device)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    return turn(query), turn(key)


def with_window(by_position: ByPosition, additive_mask: Tensor | None, x: Tensor) -> Any:
    """The additive mask for states x (batch, seqlen, ...), with -infinity outside the window of each query,
    which is always in its own; the mask as it is where there is no window."""
    if by_position.window is None:
        return additive_mask
    places = torch.arange(x.size(1), device=x.device)
    outside = (places[None, :] - places[:, None]).abs() > by_position.window
    window = x.new_zeros(outside.shape).masked_fill(outside, -torch.inf)
    return window if additive_mask is None else additive_mask + window
