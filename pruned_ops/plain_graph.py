"""The graph that other runtimes are given: a question-answering BERT or RoBERTa in plain operators.

Hugging Face's own forward exports worse: its mask is a maze of Where and Expand that no runtime's attention
fusion matches, and layers with 0 heads become products of width 0, which OpenVINO computes wrongly. Here the
mask is one subtraction, every layer's own head count is a constant, and what was pruned away is not there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pruned_ops.inputs import default_position_ids
from pruned_ops.natural_questions import PrunedBertForNaturalQuestions
from pruned_ops.packed_encoder import model_shape


class PlainBert(nn.Module):
    """Ids, mask and token types (batch, seqlen) -> start and end logits (batch, seqlen) and, from a model
    that has them, answer type logits (batch, types). Weights are shared with the model.

    Attention is spelled out, not scaled_dot_product_attention, which the exporters spell out less simply.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        base, config = model.base_model, model.config
        self.embeddings, self.layers, self.head = base.embeddings, base.encoder.layer, model.qa_outputs
        self.activation = ACT2FN[config.hidden_act]
        self.shape = model_shape(base)
        self.padding_idx: int | None = config.pad_token_id if "roberta" in config.model_type else None
        self.answer_types = (
            model.answer_type_outputs if isinstance(model, PrunedBertForNaturalQuestions) else None
        )
        # A model of one type adds the same row everywhere, and its tokenizer gives no types.
        types = ("token_type_ids",) if config.type_vocab_size > 1 else ()
        self.inputs = ("input_ids", "attention_mask", *types)
        kinds = () if self.answer_types is None else ("answer_type_logits",)
        self.outputs = ("start_logits", "end_logits", *kinds)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        mask = attention_mask.to(torch.float32)
        # -10000 closes a key as surely as the lowest float does: exp(-10000) is 0.
        closed = (1.0 - mask[:, None, None, :]) * -10000.0
        x = self._embed(input_ids, token_type_ids)
        for layer, shape in zip(self.layers, self.shape.layers, strict=True):
            parts = dict(layer.attention.named_children())
            context = parts["output"].dense.bias  # all that 0 heads leave
            if shape.num_heads:
                context = parts["output"].dense(self._attend(parts["self"], x, shape.num_heads, closed))
            x = parts["output"].LayerNorm(context + x)
            inner = layer.output.dense.bias
            if shape.ffn_width:
                up = dict(layer.intermediate.named_children())["dense"]
                inner = layer.output.dense(self.activation(up(x)))
            x = layer.output.LayerNorm(inner + x)
        start, end = self.head(x).unbind(-1)
        return (start, end) if self.answer_types is None else (start, end, self.answer_types(_first(x, mask)))

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        tables = self.embeddings
        if self.padding_idx is None:
            positions = tables.position_embeddings.weight[: input_ids.size(1)]
        else:
            batch_size, seqlen = input_ids.shape
            at = default_position_ids(input_ids, batch_size, seqlen, input_ids.device, self.padding_idx)
            positions = tables.position_embeddings(at)
        types = tables.token_type_embeddings.weight[0]
        if token_type_ids is not None:
            types = tables.token_type_embeddings(token_type_ids)
        return tables.LayerNorm(tables.word_embeddings(input_ids) + types + positions)

    def _attend(self, part: Any, x: Tensor, num_heads: int, closed: Tensor) -> Tensor:
        head_dim = self.shape.head_dim
        heads = (x.size(0), x.size(1), num_heads, head_dim)
        query, key, value = (
            linear(x).view(heads).transpose(1, 2) for linear in (part.query, part.key, part.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim) + closed
        context = torch.softmax(scores, -1) @ value
        return context.transpose(1, 2).reshape(x.size(0), x.size(1), num_heads * head_dim)


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first real token; zeros where it has none.

    A product with a row of zeros and a one: runtimes differ in how they index, not in how they multiply.
    """
    from_the_end = mask * torch.arange(mask.size(1), 0, -1, device=mask.device)
    chosen = (from_the_end == from_the_end.amax(1, keepdim=True)).to(mask.dtype) * mask
    return (chosen[:, None, :] @ x).squeeze(1)
