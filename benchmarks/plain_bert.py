"""The graph that other runtimes are given: a question-answering BERT or RoBERTa in plain operators.

Hugging Face's own forward exports worse: its mask is a maze of Where and Expand that no runtime's attention
fusion matches, and layers with 0 heads become products of width 0, which OpenVINO computes wrongly. Here the
mask is one subtraction, every layer's own head count is a constant, and what was pruned away is not there.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pruned_ops.packed_encoder import model_shape

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("start_logits", "end_logits")
# ONNX Runtime's and OpenVINO's fusions know these operators best; 17 has LayerNormalization.
OPSET = 17


class PlainBert(nn.Module):
    """Ids and mask (batch, seqlen), right-padded -> start and end logits (batch, seqlen). Weights are shared.

    Attention is spelled out, not scaled_dot_product_attention, which the exporters spell out less simply.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        base, config = model.base_model, model.config
        self.embeddings, self.layers, self.head = base.embeddings, base.encoder.layer, model.qa_outputs
        self.activation = ACT2FN[config.hidden_act]
        self.shape = model_shape(base)
        # RoBERTa counts positions from behind its padding index.
        self.first_position = config.pad_token_id + 1 if "roberta" in config.model_type else 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.embeddings
        positions = tables.position_embeddings.weight[self.first_position :][: input_ids.size(1)]
        x = tables.word_embeddings(input_ids) + tables.token_type_embeddings.weight[0] + positions
        x = tables.LayerNorm(x)
        # -10000 closes a key as surely as the lowest float does: exp(-10000) is 0.
        closed = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -10000.0
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
        return start, end

    def _attend(self, part: Any, x: Tensor, num_heads: int, closed: Tensor) -> Tensor:
        head_dim = self.shape.head_dim
        heads = (x.size(0), x.size(1), num_heads, head_dim)
        query, key, value = (
            linear(x).view(heads).transpose(1, 2) for linear in (part.query, part.key, part.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim) + closed
        context = torch.softmax(scores, -1) @ value
        return context.transpose(1, 2).reshape(x.size(0), x.size(1), num_heads * head_dim)


def exported(model: Any, folder: Path) -> Path:
    """The model as an ONNX file in `folder`, with dynamic batch and sequence axes; one that is there is used.

    By torch's TorchScript exporter: ONNX Runtime's fusions find no attention in the graphs of the newer one.
    """
    path = folder / "model.onnx"
    if path.exists():
        return path
    ids = torch.ones(3, 20, dtype=torch.long)
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that this exporter is the older one; sizes that it traces are meant
        torch.onnx.export(
            PlainBert(model).eval(),
            (ids, ids),
            str(partial),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "batch", 1: "seqlen"} for name in INPUTS + OUTPUTS},
        )
    partial.rename(path)
    return path


def fingerprint(model: Any) -> str:
    """A name for exactly these weights, this config, torch and exporter: what a cached file is reused for."""
    found = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode())
    found.update(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]
