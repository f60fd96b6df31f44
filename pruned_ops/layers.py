"""The layers of a pruned post-LN encoder as modules over ops: packed tokens in, packed tokens out, inference
only.

Each layer has its own number of heads and FFN width, zero included. Use them in a model of your own, or let
`optimize` put them into a Hugging Face model. The linear and norm modules inside hold the parameters; the
ops compute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.packing import PackedBatch
from pruned_ops.panels import pack_int8, pack_panels, unpack_panels
from pruned_ops.reference import PART_TENSORS
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

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second."""
        return self.qkv, self.output

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return self.compute(x, cu_seqlens, max_seqlen, self.qkv.weight, self.output.weight)

    def compute(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first_weight: Tensor, second_weight: Tensor
    ) -> Tensor:
        """forward, with the linears' weights from elsewhere."""
        qkv = F.linear(x, first_weight, self.qkv.bias)
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
        self.hidden_act = hidden_act
        self.up = Projection(hidden_size, ffn_width)
        self.down = Projection(ffn_width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second."""
        return self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.up.weight, self.down.weight)

    def compute(self, x: Tensor, first_weight: Tensor, second_weight: Tensor) -> Tensor:
        """forward, with the linears' weights from elsewhere."""
        if self.hidden_act == "gelu":
            inner = ops.linear_gelu(x, first_weight, self.up.bias)
        else:
            inner = ACTIVATIONS[self.hidden_act](F.linear(x, first_weight, self.up.bias))
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


class PackedParts:
    """Attention and FFN parts in a row as one call (`ops.encoder`), their weights in its layout.

    pack: a linear -> its panels and bias. The norms are the parts' own; the weights are as they were when
    this was made."""

    def __init__(
        self,
        parts: Sequence[PrunedAttention | PrunedFFN],
        head_dim: int,
        pack: Callable[[nn.Linear], tuple[Tensor, Tensor]],
    ) -> None:
        self.head_dim = head_dim
        self.eps = parts[0].norm.eps if parts else 0.0
        self.widths: list[int] = []
        self.weights: list[Tensor] = []
        for part in parts:
            inner = part.linears[1].in_features
            self.widths.append(inner // head_dim if isinstance(part, PrunedAttention) else -1 - inner)
            for linear in part.linears:
                self.weights += pack(linear)
            self.weights += [part.norm.weight.detach(), part.norm.bias.detach()]

    @staticmethod
    def refuse(parts: Sequence[PrunedAttention | PrunedFFN]) -> str | None:
        """Why these parts cannot run in one call; None if they can."""
        if all(kernel.backend.missing is not None for kernel in ops.encoder.kernels.values()):
            return "no backend that is here runs several parts in one call"
        for part in parts:
            if isinstance(part, PrunedFFN) and part.hidden_act != "gelu":
                return f"the FFN's activation is {part.hidden_act}, one call computes gelu"
            if part.norm.weight.dtype != torch.float32 or part.norm.weight.device.type != "cpu":
                return "one call runs float32 weights on the CPU"
            if part.norm.eps != parts[0].norm.eps:
                return "the parts' LayerNorms differ in eps"
        return None

    @property
    def is_fp32(self) -> bool:
        """Whether no weight is int8."""
        return all(weight.is_floating_point() for weight in self.weights)

    def unpacked(self, part: int) -> tuple[Tensor, Tensor]:
        """Copies of the weights of a part's two linears, (out, in) each, where they are fp32."""
        first, bias, second, second_bias, *_ = self.weights[PART_TENSORS * part : PART_TENSORS * (part + 1)]
        return unpack_panels(first, bias.size(0)), unpack_panels(second, second_bias.size(0))

    def __call__(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first: int = 0, last: int | None = None
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`."""
        last = len(self.widths) if last is None else last
        weights = self.weights[PART_TENSORS * first : PART_TENSORS * last]
        return ops.encoder(
            x, cu_seqlens, max_seqlen, weights, self.widths[first:last], self.head_dim, self.eps
        )


class PrunedEncoder(nn.Module):
    """A stack of layers of different shapes over a packed batch."""

    def __init__(self, shape: ModelShape, eps: float = 1e-12, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            PrunedLayer(shape.hidden_size, shape.head_dim, layer, eps, hidden_act) for layer in shape.layers
        )
        self.head_dim = shape.head_dim
        self._packed: PackedParts | None = None
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
        return self._packed is not None

    @property
    def int8_linears(self) -> frozenset[str]:
        """The names of the linears that run in int8."""
        return self._packing[1] if self.is_packed and self._packing is not None else frozenset()

    def pack(self, keep_weights: bool = True, int8: Collection[str] = ()) -> None:
        """Bring the weights, as they are now, into the layout in which all layers run as one call; where no
        backend can, nothing changes. Moving or casting the module tries again.

        keep_weights=False keeps the packed ones only: the linears' weights are NaN until `unpack`.
        int8: names (of `linear_names`) that are to run in int8; their weights are kept.
        Errors: ValueError for a name that is none.
        """
        unknown = set(int8) - set(self.linear_names)
        if unknown:
            raise ValueError(f"there is no linear {', '.join(sorted(unknown))}; see linear_names")
        self.unpack()
        self._packing = keep_weights, frozenset(int8)
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
        if packed is None or packing is None or packing[0]:
            return
        for i, part in enumerate(self.parts):
            for j, linear in enumerate(part.linears):
                panels, bias = packed.weights[PART_TENSORS * i + 2 * j :][:2]
                if panels.is_floating_point():
                    linear.weight.data = unpack_panels(panels, bias.size(0))

    def _apply(self, *args: Any, **kwargs: Any) -> PrunedEncoder:
        packing = self._packing
        self.unpack()
        super()._apply(*args, **kwargs)
        if packing is not None:
            self.pack(*packing)
        return self

    def forward(self, x: Tensor, batch: PackedBatch, collect: list[Tensor] | None = None) -> Tensor:
        """(tokens, hidden_size) -> the same; each layer's output is appended to `collect` if given."""
        packed, lengths = self._packed, (batch.cu_seqlens, batch.max_seqlen)
        if packed is not None and collect is None and ops.encoder.is_had():
            return packed(x, *lengths)
        for i, layer in enumerate(self.layers):
            if packed is None:
                x = layer(x, *lengths)
            elif ops.encoder.is_had() or not packed.is_fp32:
                x = packed(x, *lengths, 2 * i, 2 * i + 2)
            else:  # a backend is asked for whose ops take weights as they are
                x = layer.attention.compute(x, *lengths, *packed.unpacked(2 * i))
                x = layer.ffn.compute(x, *packed.unpacked(2 * i + 1))
            if collect is not None:
                collect.append(x)
        return x


def release(parameter: Tensor) -> None:
    """Free a parameter's memory but not its shape: it reads as NaN until it gets values again."""
    parameter.data = parameter.data.new_full((1,), torch.nan).expand(parameter.shape)


def fuse_rows(parts: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter that holds the rows of all `parts`, which are released: no weight is kept twice."""
    fused = nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=False)
    for part in parts:
        release(part)
    return fused


def split_rows(fused: nn.Parameter, parts: Sequence[nn.Parameter]) -> None:
    """Undo `fuse_rows`: each part's rows again, with the device and dtype that `fused` has now."""
    start = 0
    for part in parts:
        part.data = fused.detach()[start : start + part.size(0)].clone()
        start += part.size(0)
