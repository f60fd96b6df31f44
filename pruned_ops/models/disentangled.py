"""Disentangled attention (He et al. 2021) in plain torch: the padded, trainable layer, and the embeddings of
distances that all layers of an encoder turn into keys and queries by their own linears."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops.models.configuration import PrunedConfig
from pruned_ops.models.families.known import family_of
from pruned_ops.models.modules import put
from pruned_ops.models.norm_last import NormLastLayer
from pruned_ops.shape import LayerShape


class DisentangledLayer(NormLastLayer):
    """One layer whose attention multiplies queries by keys of their distance, and keys by queries of their
    distance. Its forward takes the states of distances, of `relative_states`, after the mask."""

    def __init__(self, config: PrunedConfig, shape: LayerShape) -> None:
        super().__init__(config, shape)
        kind = config.family.kind(config).disentangled
        assert kind is not None  # `pruned_layers` makes this one for such kinds alone
        self.kind = kind

    def forward(self, x: Tensor, additive_mask: Tensor | None, relative: Tensor | None = None) -> Tensor:
        """relative: (rows, hidden_size), as `relative_states` gives them."""
        assert relative is not None
        return self._after_attention(x, self._disentangled(x, additive_mask, self.dropout(relative)))

    def _disentangled(self, x: Tensor, additive_mask: Tensor | None, relative: Tensor) -> Tensor:
        """(batch, seqlen, hidden_size) -> the context (batch, seqlen, num_heads * head_dim)."""
        if self.num_heads == 0:
            return self._context(x, additive_mask)
        query, key, value = self._heads(x)
        linears = self.get_submodule(self.names.query), self.get_submodule(self.names.key)
        of_distances = self.kind.by_distance(relative, *linears, self.head_dim)
        row = self.kind.rows_between(x.size(1), x.device).expand(*query.shape[:3], -1)
        scores, scale = None, (self.head_dim * (1 + self.kind.products)) ** -0.5
        if of_distances[0] is not None:
            scores = (query @ of_distances[0].transpose(1, 2)).gather(-1, row)
        if of_distances[1] is not None:
            products = (key @ of_distances[1].transpose(1, 2)).gather(-1, row.transpose(-1, -2))
            scores = products.transpose(-1, -2) + (0.0 if scores is None else scores)
        assert scores is not None  # there is one of the two at least
        scores = scores * scale if additive_mask is None else scores * scale + additive_mask
        dropout = self.attention_dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, scores, dropout, scale=scale)
        return context.transpose(1, 2).flatten(2)


def add_relative_embeddings(encoder: nn.Module, config: PrunedConfig) -> None:
    """Add the embeddings of distances to an encoder, and their LayerNorm, where its config has them."""
    kind, names = config.family.kind(config).disentangled, config.family.relative_embeddings
    if kind is None or names is None:
        return
    put(encoder, names.table, nn.Embedding(kind.rows, config.hidden_size))
    if names.normed(config):
        eps = config.family.value(config, "layer_norm_eps")
        put(encoder, names.norm, nn.LayerNorm(config.hidden_size, eps))


def relative_states(encoder: Any) -> Tensor | None:
    """The states of distances (rows, hidden_size) of an encoder, stock or pruned, in the publisher's order;
    None for an encoder without them."""
    family = family_of(encoder.config)
    names = family.relative_embeddings
    if names is None or family.kind(encoder.config).disentangled is None:
        return None
    weight: Tensor = encoder.get_submodule(names.table).weight
    norm = relative_norm(encoder)
    return weight if norm is None else norm(weight)


def relative_norm(encoder: Any) -> Any:
    """The LayerNorm of the embeddings of distances; None for an encoder without it."""
    family = family_of(encoder.config)
    names = family.relative_embeddings
    if names is None or family.kind(encoder.config).disentangled is None or not names.normed(encoder.config):
        return None
    return encoder.get_submodule(names.norm)
