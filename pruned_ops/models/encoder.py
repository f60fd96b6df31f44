"""The padded, trainable layers of the pruned models: plain torch modules with BERT's own parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig
from transformers.activations import ACT2FN

from pruned_ops.layers.modules import Projection
from pruned_ops.models.configuration import PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.inputs import default_position_ids
from pruned_ops.shape import LayerShape


class PrunedEmbeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised: ids (batch, seqlen) -> (..,
    hidden_size)."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig) -> None:
        super().__init__()
        self.roberta = isinstance(config, RobertaConfig)
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            padding_idx=config.pad_token_id if self.roberta else None,
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        source = input_ids if input_ids is not None else inputs_embeds
        assert source is not None  # check_inputs saw to it
        batch_size, seqlen = source.shape[:2]
        if position_ids is None:
            position_ids = default_position_ids(
                input_ids, batch_size, seqlen, source.device, self.padding_idx if self.roberta else None
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros((batch_size, seqlen), dtype=torch.long, device=source.device)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        total = inputs_embeds + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(total + self.position_embeddings(position_ids)))


class PrunedSelfAttention(nn.Module):
    """Multi-head attention with this layer's own number of heads: (batch, seqlen, hidden) -> (.., width)."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig, shape: LayerShape) -> None:
        super().__init__()
        self.num_heads, self.head_dim = shape.num_heads, config.head_dim
        width = shape.num_heads * config.head_dim
        self.query = Projection(config.hidden_size, width)
        self.key = Projection(config.hidden_size, width)
        self.value = Projection(config.hidden_size, width)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        if self.num_heads == 0:
            return x.new_zeros(*x.shape[:2], 0)
        heads = (*x.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (
            part(x).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=additive_mask, dropout_p=dropout
        )
        return context.transpose(1, 2).flatten(2)


class PrunedOutput(nn.Module):
    """LayerNorm(dense(x) + residual): what follows both the attention and the FFN."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig, width: int) -> None:
        super().__init__()
        self.dense = Projection(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class PrunedLayerModule(nn.Module):
    """One layer with BERT's parameter names (attention.self, attention.output, intermediate, output)."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig, shape: LayerShape) -> None:
        super().__init__()
        width = shape.num_heads * config.head_dim
        self.attention = nn.ModuleDict(
            {"self": PrunedSelfAttention(config, shape), "output": PrunedOutput(config, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": Projection(config.hidden_size, shape.ffn_width)})
        self.output = PrunedOutput(config, shape.ffn_width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, additive_mask), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class PrunedEncoderModule(nn.Module):
    """The stack of layers, named `layer.N` as BERT's."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(PrunedLayerModule(config, shape) for shape in config.shape.layers)

    def forward(self, x: Tensor, additive_mask: Tensor | None, collect: list[Tensor] | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, additive_mask)
            if collect is not None:
                collect.append(x)
        return x


class PrunedPooler(nn.Module):
    """BERT's pooler: (batch, seqlen, hidden_size) -> (batch, hidden_size), of the first position."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))
