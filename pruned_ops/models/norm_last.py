"""The padded, trainable layer of pruned models whose LayerNorms come last, as BERT's do."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from pruned_ops.layers.parts import PrunedLinear
from pruned_ops.models.configuration import PrunedConfig
from pruned_ops.models.modules import put
from pruned_ops.shape import LayerShape


class NormLastLayer(GradientCheckpointingLayer):
    """One layer with its own number of heads and FFN width, under its publisher's parameter names:
    (batch, seqlen, hidden_size) -> the same.

    Under gradient checkpointing it keeps its input alone, and is computed again in the backward pass."""

    def __init__(self, config: PrunedConfig, shape: LayerShape) -> None:
        super().__init__()
        family = config.family
        self.num_heads, self.head_dim = shape.num_heads, config.head_dim
        self.names, hidden, width = family.layer, config.hidden_size, shape.num_heads * config.head_dim
        eps = family.value(config, "layer_norm_eps")
        for name in self.names.qkv:
            put(self, name, PrunedLinear(hidden, width))
        put(self, self.names.attention_output, PrunedLinear(width, hidden))
        put(self, self.names.attention_norm, nn.LayerNorm(hidden, eps=eps))
        put(self, self.names.up, PrunedLinear(hidden, shape.ffn_width))
        put(self, self.names.down, PrunedLinear(shape.ffn_width, hidden))
        put(self, self.names.ffn_norm, nn.LayerNorm(hidden, eps=eps))
        self.activation = ACT2FN[family.value(config, "hidden_act")]
        self.attention_dropout = nn.Dropout(family.value(config, "attention_probs_dropout_prob"))
        self.dropout = nn.Dropout(family.value(config, "hidden_dropout_prob"))
        self.drops_context = family.drops_context

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        """additive_mask: what is added to the scores, (batch or 1, heads or 1, seqlen or 1, seqlen)."""
        return self._after_attention(x, self._context(x, additive_mask))

    def _after_attention(self, x: Tensor, context: Tensor) -> Tensor:
        """The rest of the layer, from its input and the context of its heads on."""
        names, part = self.names, self.get_submodule
        attended = part(names.attention_output)(context)
        x = part(names.attention_norm)((self.dropout(attended) if self.drops_context else attended) + x)
        inner = self.activation(part(names.up)(x))
        return part(names.ffn_norm)(self.dropout(part(names.down)(inner)) + x)

    def _context(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        """Multi-head attention: (batch, seqlen, hidden_size) -> (batch, seqlen, num_heads * head_dim)."""
        if self.num_heads == 0:
            return x.new_zeros(*x.shape[:2], 0)
        query, key, value = self._heads(x)
        dropout = self.attention_dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=additive_mask, dropout_p=dropout
        )
        return context.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, (batch, num_heads, seqlen, head_dim) each."""
        heads = (*x.shape[:2], self.num_heads, self.head_dim)
        return [self.get_submodule(name)(x).view(heads).transpose(1, 2) for name in self.names.qkv]
