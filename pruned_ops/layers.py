"""The layers of a pruned post-LN encoder as modules over ops: packed tokens in, packed tokens out, inference
only.

Each layer has its own number of heads and FFN width, zero included. Use them in a model of your own, or let
`optimize` put them into a Hugging Face model. The linear and norm modules inside hold the parameters; the
ops compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.packing import PackedBatch
from pruned_ops.shape import LayerShape, ModelShape

# What the runtime computes besides the exact GELU, for which there is a fused op.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


class Projection(nn.Linear):
    """nn.Linear whose width may be 0 on either side, which nn.Linear initialises with a warning."""

    def reset_parameters(self) -> None:
        if self.weight.numel():
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)


class PrunedAttention(nn.Module):
    """Self-attention with any number of heads, then LayerNorm(projected context + input).

    (tokens, hidden_size) -> (tokens, hidden_size). The query, key and value weights are one matrix, q|k|v.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.head_dim = head_dim
        width = num_heads * head_dim
        self.qkv = Projection(hidden_size, 3 * width)
        self.output = Projection(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        context = ops.attention(qkv, cu_seqlens, max_seqlen, self.head_dim)
        return ops.linear_add_layer_norm(
            context, self.output.weight, self.output.bias, x, self.norm.weight, self.norm.bias, self.norm.eps
        )


class PrunedFFN(nn.Module):
    """The FFN of any width, then LayerNorm(its output + its input). (tokens, hidden_size) -> the same."""

    def __init__(
        self, hidden_size: int, ffn_width: int, eps: float = 1e-12, hidden_act: str = "gelu"
    ) -> None:
        super().__init__()
        if hidden_act != "gelu" and hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {hidden_act!r} is not supported; gelu, {', '.join(ACTIVATIONS)} are"
            )
        self.hidden_act = hidden_act
        self.up = Projection(hidden_size, ffn_width)
        self.down = Projection(ffn_width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden_act == "gelu":
            inner = ops.linear_gelu(x, self.up.weight, self.up.bias)
        else:
            inner = ACTIVATIONS[self.hidden_act](F.linear(x, self.up.weight, self.up.bias))
        return ops.linear_add_layer_norm(
            inner, self.down.weight, self.down.bias, x, self.norm.weight, self.norm.bias, self.norm.eps
        )


class PrunedLayer(nn.Module):
    """One encoder layer: attention, then FFN."""

    def __init__(
        self, hidden_size: int, head_dim: int, shape: LayerShape, eps: float = 1e-12, hidden_act: str = "gelu"
    ) -> None:
        super().__init__()
        self.attention = PrunedAttention(hidden_size, shape.num_heads, head_dim, eps)
        self.ffn = PrunedFFN(hidden_size, shape.ffn_width, eps, hidden_act)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return self.ffn(self.attention(x, cu_seqlens, max_seqlen))


class PrunedEncoder(nn.Module):
    """A stack of layers of different shapes over a packed batch."""

    def __init__(self, shape: ModelShape, eps: float = 1e-12, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            PrunedLayer(shape.hidden_size, shape.head_dim, layer, eps, hidden_act) for layer in shape.layers
        )

    def forward(self, x: Tensor, batch: PackedBatch, collect: list[Tensor] | None = None) -> Tensor:
        """(tokens, hidden_size) -> the same; each layer's output is appended to `collect` if given."""
        for layer in self.layers:
            x = layer(x, batch.cu_seqlens, batch.max_seqlen)
            if collect is not None:
                collect.append(x)
        return x


def fuse_rows(parts: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter that holds the rows of all `parts`, which become views of it: no weight is kept twice."""
    fused = nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
    start = 0
    for part in parts:
        part.data = fused.data[start : start + part.size(0)]
        start += part.size(0)
    return fused


def split_rows(fused: nn.Parameter, parts: Sequence[nn.Parameter]) -> None:
    """Undo `fuse_rows`: give each part rows of its own, with the device and dtype that `fused` has now."""
    start = 0
    for part in parts:
        part.data = fused.detach()[start : start + part.size(0)].clone()
        start += part.size(0)
