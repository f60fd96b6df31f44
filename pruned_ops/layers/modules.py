"""The layers of a pruned post-LN encoder as modules over ops: packed tokens in, packed tokens out, inference
only.

Each layer has its own number of heads and FFN width, zero included. Use them in a model of your own, or let
`optimize` put them into a Hugging Face model. The linear and norm modules inside hold the parameters; the
ops compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import AlignedParts, PackedParts, release
from pruned_ops.ops.panels import pack_int8, pack_panels
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

    hidden_act: str | None = None

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.head_dim = head_dim
        width = num_heads * head_dim
        self.qkv = Projection(hidden_size, 3 * width)
        self.output = Projection(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second."""
        return self.qkv, self.output

    @property
    def encoder_width(self) -> int:
        """As `ops.encoder` counts it: the number of heads."""
        return self.output.in_features // self.head_dim

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return self.compute(x, cu_seqlens, max_seqlen, self.qkv.weight, self.qkv.bias, self.output.weight)

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor,
        second_weight: Tensor,
    ) -> Tensor:
        """forward, with what lies packed elsewhere."""
        qkv = F.linear(x, first_weight, first_bias)
        context = ops.attention(qkv, cu_seqlens, max_seqlen, self.head_dim)
        return ops.linear_add_layer_norm(
            context, second_weight, self.output.bias, x, self.norm.weight, self.norm.bias, self.norm.eps
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
        self.hidden_act: str = hidden_act
        self.up = Projection(hidden_size, ffn_width)
        self.down = Projection(ffn_width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second."""
        return self.up, self.down

    @property
    def encoder_width(self) -> int:
        """As `ops.encoder` counts it: -1 - the FFN width."""
        return -1 - self.down.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, None, 0, self.up.weight, self.up.bias, self.down.weight)

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor,
        second_weight: Tensor,
    ) -> Tensor:
        """forward, with what lies packed elsewhere, as an attention takes it; the lengths do not matter."""
        if self.hidden_act == "gelu":
            inner = ops.linear_gelu(x, first_weight, first_bias)
        else:
            inner = ACTIVATIONS[self.hidden_act](F.linear(x, first_weight, first_bias))
        return ops.linear_add_layer_norm(
            inner, second_weight, self.down.bias, x, self.norm.weight, self.norm.bias, self.norm.eps
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
        self.layers: Any = nn.ModuleList(
            PrunedLayer(shape.hidden_size, shape.head_dim, layer, eps, hidden_act) for layer in shape.layers
        )
        self.shape, self.head_dim = shape, shape.head_dim
        self._packed: PackedParts | AlignedParts | None = None
        self._packing: tuple[bool, frozenset[str]] | None = None  # what `pack` was told; None if it was not

    @property
    def parts(self) -> list[PrunedAttention | PrunedFFN]:
        """Each layer's attention and FFN, in the order in which they run."""
        return [part for layer in self.layers for part in (layer.attention, layer.ffn)]

    @property
    def linear_names(self) -> list[str]:
        """Every linear's name in this module, as layers.0.attention.qkv."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]

    @property
    def is_packed(self) -> bool:
        """Whether all layers run as one call, unless a backend is asked for that cannot."""
        return isinstance(self._packed, PackedParts)

    @property
    def packed(self) -> PackedParts | AlignedParts | None:
        """The weights in the layout that `pack` brought them into."""
        return self._packed

    @property
    def running_shape(self) -> ModelShape:
        """The shape that the kernels see: FFN widths may be filled up (`AlignedParts`)."""
        if not isinstance(self._packed, AlignedParts):
            return self.shape
        widths = [second.size(1) for _, second in self._packed.weights[1::2]]
        layers = zip(self.shape.layers, widths, strict=True)
        return replace(
            self.shape, layers=tuple(LayerShape(layer.num_heads, width) for layer, width in layers)
        )

    @property
    def int8_linears(self) -> frozenset[str]:
        """The names of the linears that run in int8."""
        return self._packing[1] if self.is_packed and self._packing is not None else frozenset()

    def pack(self, keep_weights: bool = True, int8: Collection[str] = ()) -> None:
        """Bring the weights, as they are now, into the layout in which all layers run as one call, or that a
        GPU's kernels ask for; where neither is wanted, nothing changes. Moving or casting the module tries
        again.

        keep_weights=False keeps the packed ones only: the linears' weights are NaN until `unpack`.
        int8: names (of `linear_names`) that are to run in int8; their weights are kept.
        Errors: ValueError for a name that is none.
        """
        unknown = set(int8) - set(self.linear_names)
        if unknown:
            raise ValueError(f"there is no linear {', '.join(sorted(unknown))}; see linear_names")
        self.unpack()
        self._packing = keep_weights, frozenset(int8)
        if AlignedParts.refuse(self.parts) is None:
            self._packed = AlignedParts(self.parts, keep_weights)
        if PackedParts.refuse(self.parts) is not None:
            return
        quantised = {id(self.get_submodule(name)) for name in int8}

        def packed(linear: nn.Linear) -> tuple[Tensor, Tensor]:
            bias = linear.bias.detach()
            if id(linear) in quantised:
                panels, scales = pack_int8(linear.weight)
                return panels, torch.stack([bias, scales])
            panels = pack_panels(linear.weight.detach())
            if not keep_weights:
                release(linear.weight)
            return panels, bias

        self._packed = PackedParts(self.parts, self.head_dim, packed)

    def unpack(self) -> None:
        """Undo `pack`."""
        packed, packing = self._packed, self._packing
        self._packed = self._packing = None
        if packed is not None and packing is not None and not packing[0]:
            packed.give_back(self.parts)

    def _apply(self, *args: Any, **kwargs: Any) -> PrunedEncoder:
        packing = self._packing
        self.unpack()
        super()._apply(*args, **kwargs)
        if packing is not None:
            self.pack(*packing)
        return self

    def forward(self, x: Tensor, batch: PackedBatch, collect: list[Tensor] | None = None) -> Tensor:
        """(tokens, hidden_size) -> the same; each layer's output is appended to `collect` if given."""
        return self.run(x, batch.cu_seqlens, batch.max_seqlen, collect)

    def run(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, collect: list[Tensor] | None = None
    ) -> Tensor:
        """forward, with the lengths alone."""
        packed, lengths = self._packed, (cu_seqlens, max_seqlen)
        if packed is not None and collect is None and packed.runs:
            return packed(x, *lengths)
        for i, layer in enumerate(self.layers):
            if packed is None:
                x = layer(x, *lengths)
            elif packed.runs:
                x = packed(x, *lengths, 2 * i, 2 * i + 2)
            else:  # a backend is asked for whose ops take weights as they are
                for j, part in enumerate((layer.attention, layer.ffn)):
                    first, second = packed.weights_of(2 * i + j)
                    x = part.compute(x, *lengths, first, part.linears[0].bias, second)
            if collect is not None:
                collect.append(x)
        return x
