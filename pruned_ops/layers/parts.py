"""Attention and FFN as modules over packed tokens, for inference only: the parts of a layer.

The linear and norm modules inside hold the parameters; the ops compute.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.files import shown
from pruned_ops.layers.kinds import BERT_KIND, PLAIN, ByPosition, StackKind
from pruned_ops.ops.panels import attention_part, ffn_part
from pruned_ops.ops.registry import given_up, is_given_up

# The activations that the runtime computes besides the exact GELU, which is fused into an op.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


def refuse_activation(hidden_act: str) -> str | None:
    """Why the runtime cannot compute this activation; None if it can."""
    if hidden_act == "gelu" or hidden_act in ACTIVATIONS:
        return None
    return f"hidden_act is {shown(hidden_act)}; gelu, {', '.join(ACTIVATIONS)} are supported"


class PrunedLinear(nn.Linear):
    """An nn.Linear that may have 0 inputs or outputs; nn.Linear itself would warn when it is initialised."""

    def reset_parameters(self) -> None:
        if self.weight.numel():
            super().reset_parameters()
        elif self.bias is not None:
            nn.init.zeros_(self.bias)


class _Part(nn.Module):
    """Half a layer, attention or FFN: what comes between its input and its inner rows, and what follows."""

    norm: nn.LayerNorm | None

    def __init__(self, hidden_size: int, eps: float, kind: StackKind, has_norm: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(hidden_size, eps, bias=kind.norm_bias) if has_norm else None

    def _taken(self, x: Tensor) -> Tensor:
        """What the first linear takes of the part's input."""
        if not self.kind.norm_first or self.norm is None:
            return x
        return F.layer_norm(x, (x.size(-1),), self.norm.weight, self.norm.bias, self.norm.eps)

    def _added(self, inner: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The part's output: the second linear of the inner rows, added to its input x (into x where the
        caller has given it up)."""
        if self.kind.norm_first:
            if bias is None and not torch.compiler.is_compiling() and is_given_up(x):
                return x.addmm_(inner, weight.t())
            return x + F.linear(inner, weight, bias)
        assert self.norm is not None and bias is not None  # `PrunedEncoder` sees to that
        return ops.linear_add_layer_norm(
            inner, weight, bias, x, self.norm.weight, self.norm.bias, self.norm.eps
        )


class PrunedAttention(_Part):
    """Self-attention with any number of heads, followed by LayerNorm(projected context + input).

    (tokens, hidden_size) -> (tokens, hidden_size). The query, key and value weights are one matrix, q|k|v.
    kind, by_position, has_norm: the ways in which it may differ; see `kinds`. position_bias (num_heads,
    2 * reach + 1), position_key and position_query (num_heads, rows, head_dim), where there are any: see
    `ops.attention`. The latter are made of other weights, and are no parameters that a model has.
    """

    hidden_act: str | None = None
    rotary: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-12,
        kind: StackKind = BERT_KIND,
        by_position: ByPosition = PLAIN,
        has_norm: bool = True,
    ) -> None:
        super().__init__(hidden_size, eps, kind, has_norm)
        self.head_dim, self.by_position = head_dim, by_position
        width = num_heads * head_dim
        self.qkv = PrunedLinear(hidden_size, 3 * width, kind.attention_bias)
        self.output = PrunedLinear(width, hidden_size, kind.attention_bias)
        reach = kind.bias_reach
        self.position_bias = None if reach is None else nn.Parameter(torch.zeros(num_heads, 2 * reach + 1))
        terms, self.position_key, self.position_query = kind.disentangled, None, None
        if terms is not None and terms.to_positions:
            self.position_key = nn.Parameter(torch.zeros(num_heads, terms.rows, head_dim))
        if terms is not None and terms.to_content:
            self.position_query = nn.Parameter(torch.zeros(num_heads, terms.rows, head_dim))
        # In fp32, whatever dtype the weights have.
        self.register_buffer("rotary", by_position.frequencies(head_dim), persistent=False)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The linear before attention and the one after it."""
        return self.qkv, self.output

    @property
    def encoder_part(self) -> int:
        """What stands for this part among the `widths` of `ops.encoder`."""
        return attention_part(self.output.in_features // self.head_dim)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor | None = None
    ) -> Tensor:
        weights = self.qkv.weight, self.qkv.bias, self.output.weight
        return self.compute(x, cu_seqlens, max_seqlen, *weights, positions)

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The forward pass on weights that do not lie in the linears. positions int32 (tokens,): see
        `ops.attention`."""
        qkv = F.linear(self._taken(x), first_weight, first_bias)
        # Nobody reads q|k|v again: query and key may be rotated in it. Traced code keeps to the op's schema.
        is_ours = self.rotary is not None and not torch.compiler.is_compiling()
        with given_up(qkv) if is_ours else nullcontext():
            context = ops.attention(
                qkv, cu_seqlens, max_seqlen, self.head_dim, *self.given_positions(positions)
            )
        return self._added(context, second_weight, self.output.bias, x)

    def given_positions(
        self, positions: Tensor | None, by_distance: tuple[Tensor | None, Tensor | None] | None = None
    ) -> tuple[Any, ...]:
        """The arguments of `ops.attention` for what depends on positions; none where nothing does.
        by_distance: instead of the own `position_key` and `position_query`."""
        if not self.kind.reads_positions:
            return ()
        self.place_rotary()
        position_arguments = positions, self.rotary, self.by_position.window, self.position_bias
        terms = self.kind.disentangled
        if terms is None:
            return position_arguments
        distance_rows = terms.distance_rows.to(self.qkv.weight.device)
        key, query = (self.position_key, self.position_query) if by_distance is None else by_distance
        return *position_arguments, key, query, distance_rows

    def place_rotary(self) -> None:
        """Move the frequencies to where the weights are, which may have been set after the module was made:
        a CUDA graph must not copy them from the host."""
        if self.rotary is not None and self.rotary.device != self.qkv.weight.device:
            self.rotary = self.rotary.to(self.qkv.weight.device)

    def _apply(self, *args: Any, **kwargs: Any) -> PrunedAttention:
        super()._apply(*args, **kwargs)
        self.rotary = self.by_position.frequencies(self.head_dim)  # exact, where the others were cast
        self.place_rotary()
        return self


class PrunedFFN(_Part):
    """An FFN of any width, followed by LayerNorm(its output + its input).

    (tokens, hidden_size) -> (tokens, hidden_size). kind: the ways in which it may differ; see `kinds`. The
    first linear of a gated FFN has two rows for each unit, as `ops.linear_geglu` takes them.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_width: int,
        eps: float = 1e-12,
        hidden_act: str = "gelu",
        kind: StackKind = BERT_KIND,
    ) -> None:
        refusal = refuse_activation(hidden_act)
        if refusal is not None:
            raise ValueError(refusal)
        super().__init__(hidden_size, eps, kind)
        self.hidden_act: str = hidden_act
        self.up = PrunedLinear(hidden_size, 2 * ffn_width if kind.gated else ffn_width, kind.ffn_bias)
        self.down = PrunedLinear(ffn_width, hidden_size, kind.ffn_bias)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The linear before the activation and the one after it."""
        return self.up, self.down

    @property
    def encoder_part(self) -> int:
        """What stands for this part among the `widths` of `ops.encoder`."""
        return ffn_part(self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, None, 0, self.up.weight, self.up.bias, self.down.weight)

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The forward pass on weights that do not lie in the linears. cu_seqlens, max_seqlen and positions
        are not used; the signature is PrunedAttention's."""
        inner = self._inner(self._taken(x), first_weight, first_bias)
        return self._added(inner, second_weight, self.down.bias, x)

    def _inner(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.hidden_act == "gelu":
            bias = x.new_zeros(weight.size(0)) if bias is None else bias
            return (ops.linear_geglu if self.kind.gated else ops.linear_gelu)(x, weight, bias)
        return self.activated(F.linear(x, weight, bias))

    def activated(self, products: Tensor) -> Tensor:
        """The inner rows (tokens, ffn_width), of the first linear's products."""
        activation = F.gelu if self.hidden_act == "gelu" else ACTIVATIONS[self.hidden_act]
        if not self.kind.gated:
            return activation(products)
        gate, up = products.chunk(2, -1)
        return activation(gate) * up
