"""The layers of a pruned encoder as modules over packed tokens, for inference only.

Each layer has its own number of heads and FFN width, and either may be 0. Use them in a model of your own, or
let `optimize` put them into a Hugging Face model. The linear and norm modules inside hold the parameters; the
ops compute.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops.layers.int8 import SCALE
from pruned_ops.layers.kinds import BERT_KIND, PLAIN, ByPosition, StackKind
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.parts import PrunedAttention, PrunedFFN
from pruned_ops.layers.released import placeholder
from pruned_ops.layers.weights import AlignedWeights, Layout, PanelWeights, cpu_zeros, release
from pruned_ops.ops.panels import (
    gated_rows,
    int8_panels,
    quantize,
    to_bf16_panels,
    to_int8_panels,
    to_panels,
)
from pruned_ops.shape import LayerShape, ModelShape


class PrunedLayer(nn.Module):
    """One encoder layer: attention, then FFN. kind, by_position, first_norm: see `kinds`."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        shape: LayerShape,
        eps: float = 1e-12,
        hidden_act: str = "gelu",
        kind: StackKind = BERT_KIND,
        by_position: ByPosition = PLAIN,
        first_norm: bool = True,
    ) -> None:
        super().__init__()
        self.attention = PrunedAttention(
            hidden_size, shape.num_heads, head_dim, eps, kind, by_position, first_norm
        )
        self.ffn = PrunedFFN(hidden_size, shape.ffn_width, eps, hidden_act, kind)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor | None = None
    ) -> Tensor:
        return self.ffn(self.attention(x, cu_seqlens, max_seqlen, positions))


def _panels_of(linear: nn.Linear, int8: bool, bfloat16: bool, gated: bool) -> tuple[Tensor, ...]:
    """A linear's panels and, in int8, the scales after them. gated: it is the first of a gated FFN."""
    order = gated_rows if gated else _as_it_is
    weight = order(linear.weight.detach())
    if not int8:
        return (to_bf16_panels(weight) if bfloat16 else to_panels(weight),)
    if weight.is_floating_point():
        return to_int8_panels(weight)
    return int8_panels(weight), order(linear.get_parameter(SCALE).detach())


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


_OWN_WEIGHTS = Layout(keep_weights=True, int8=frozenset())


def _weight_in_layout(linear: nn.Linear, name: str, layout: Layout) -> Tensor:
    """The weight (out, in) that a checkpoint of this layout would hold: rounded where it runs in int8, and
    where bfloat16 rounds it for good. name: from `linear_names`."""
    weight = linear.weight.detach()
    if not weight.is_floating_point():
        scales = linear.get_parameter(SCALE).detach()
        return weight.to(scales.dtype) * scales[:, None]
    if name in layout.int8:
        values, row_scales = quantize(weight)
        return values * row_scales
    return weight.bfloat16().to(weight.dtype) if layout.bfloat16 and not layout.keep_fp32 else weight


class PrunedEncoder(nn.Module):
    """A stack of layers of different shapes over a packed batch. kind: the ways in which it differs from
    BERT's. Errors: ValueError for a kind that is not computed.

    relative (rows, hidden_size): the states of distances, of a kind that is disentangled. Where they are set,
    `pack` makes every attention's `position_key` and `position_query` of them and of its weights, as these
    run; else both are the caller's to set."""

    def __init__(
        self,
        shape: ModelShape,
        eps: float = 1e-12,
        hidden_act: str = "gelu",
        kind: StackKind = BERT_KIND,
    ) -> None:
        super().__init__()
        biases = kind.attention_bias and kind.ffn_bias and kind.norm_bias
        if not kind.norm_first and not (biases and kind.first_norm):
            raise ValueError("layers whose LayerNorms come last are computed with all biases and norms only")
        self.layers: Any = nn.ModuleList(
            PrunedLayer(
                shape.hidden_size,
                shape.head_dim,
                layer,
                eps,
                hidden_act,
                kind,
                kind.of_layer(i),
                i > 0 or kind.first_norm,
            )
            for i, layer in enumerate(shape.layers)
        )
        self.final_norm: nn.LayerNorm | None = (
            nn.LayerNorm(shape.hidden_size, eps, bias=kind.norm_bias) if kind.final_norm else None
        )
        self.shape, self.head_dim, self.kind = shape, shape.head_dim, kind
        self.relative: nn.Parameter | None = None
        self._laid_out: PanelWeights | AlignedWeights | None = None
        self._layout: Layout | None = None  # None until `pack` is called

    @property
    def parts(self) -> list[PrunedAttention | PrunedFFN]:
        """The attention and the FFN of every layer, in the order in which they run."""
        return [part for layer in self.layers for part in (layer.attention, layer.ffn)]

    @property
    def linear_names(self) -> list[str]:
        """The names of all linears in this module, such as "layers.0.attention.qkv"."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]

    @property
    def runs_in_one_call(self) -> bool:
        """Whether all layers run as one op call, unless a backend is asked for that lacks the op."""
        return isinstance(self._laid_out, PanelWeights)

    @property
    def laid_out(self) -> PanelWeights | AlignedWeights | None:
        """The weights in the layout that `pack` chose; None where the linears' own weights are used."""
        return self._laid_out

    @property
    def running_shape(self) -> ModelShape:
        """The shape that the kernels see, in which `AlignedWeights` may have filled FFN widths up."""
        if not isinstance(self._laid_out, AlignedWeights):
            return self.shape
        widths = [second.size(1) for _, second in self._laid_out.weights[1::2]]
        layers = zip(self.shape.layers, widths, strict=True)
        return replace(
            self.shape, layers=tuple(LayerShape(layer.num_heads, width) for layer, width in layers)
        )

    @property
    def int8_linears(self) -> frozenset[str]:
        """The names of the linears that run in int8."""
        return self._layout.int8 if self.runs_in_one_call and self._layout is not None else frozenset()

    @property
    def runs_in_bfloat16(self) -> bool:
        """Whether the linears run in bfloat16, but for those that run in int8."""
        return self.runs_in_one_call and self._layout is not None and self._layout.bfloat16

    def pack(
        self,
        keep_weights: bool = True,
        int8: Collection[str] = (),
        bfloat16: bool = False,
        keep_fp32: bool = True,
    ) -> None:
        """Lay the weights out as the kernels of their device want them.

        On a CPU they become panels, with which all layers run in one call; on a GPU they are aligned. Where
        neither layout applies, the linears' own weights are used. The layout holds the weights as they are
        now; it is made anew when the module is moved or cast. So is what attentions multiply by distance.
        keep_weights=False releases the linears' own weights, which read as NaN until `unpack`.
        int8: the names (from `linear_names`) of the linears that shall run in int8; they keep their weights,
        unless these are int8 themselves (with `weight_scale` beside them, see `layers.int8.Int8Linear`). Such
        linears run in int8 in any case.
        bfloat16: whether the other linears run in bfloat16. Where that rounds a weight the linear keeps its
        own, unless keep_fp32=False gives it up for the rounded one.
        Errors: ValueError for a name that is not in `linear_names`.
        """
        unknown = set(int8) - set(self.linear_names)
        if unknown:
            raise ValueError(f"there is no linear {', '.join(sorted(unknown))}; see linear_names")
        if self._layout is not None and not self._layout.keep_weights:
            self.unpack()
        stored = {
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
        }
        layout = Layout(keep_weights, frozenset(int8) | stored, bfloat16, keep_fp32)
        held = [(layer.attention.position_key, layer.attention.position_query) for layer in self.layers]
        self._place_distances(layout)
        try:
            laid_out = self._lay_out(layout)
        except BaseException:
            for layer, rows in zip(self.layers, held, strict=True):
                layer.attention.position_key, layer.attention.position_query = rows
            raise
        # All weights are laid out before the first is released, so that an error leaves them as they were.
        self._laid_out, self._layout = laid_out, layout
        if laid_out is not None and not keep_weights:
            try:
                release([linear for i, j, linear in self._linears() if laid_out.holds_alone(i, j)])
            except BaseException:
                self._laid_out = self._layout = None
                self._place_distances(_OWN_WEIGHTS)
                raise

    @torch.no_grad()
    def _place_distances(self, layout: Layout) -> None:
        """Make what every attention multiplies by distance of its weights in this layout, so that both change
        together."""
        if self.relative is None or self.kind.disentangled is None:
            return
        if PanelWeights.refuse(self.parts) is not None:
            layout = _OWN_WEIGHTS  # nothing is narrow but in panels
        for i, layer in enumerate(self.layers):
            qkv = layer.attention.qkv
            by_distance = self.by_distance(i, _weight_in_layout(qkv, f"layers.{i}.attention.qkv", layout))
            for name, rows in zip(("position_key", "position_query"), by_distance, strict=True):
                if rows is not None:
                    setattr(layer.attention, name, nn.Parameter(rows.contiguous(), requires_grad=False))

    def by_distance(self, layer: int, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """A layer's keys and queries by distance, (num_heads, rows, head_dim) each, with this weight of its
        `qkv`; None for those that it has not, both where the stack has no states of distances."""
        kind, bias = self.kind.disentangled, self.layers[layer].attention.qkv.bias
        if self.relative is None or kind is None:
            return None, None
        biases = (None, None, None) if bias is None else bias.tensor_split(3)
        query, key, _ = (
            partial(F.linear, weight=rows, bias=of_rows)
            for rows, of_rows in zip(weight.tensor_split(3), biases, strict=True)
        )
        return kind.by_distance(self.relative, query, key, self.head_dim)

    def _linears(self) -> Iterator[tuple[int, int, nn.Linear]]:
        """Every linear, after the number of its part and its own number in it."""
        for i, part in enumerate(self.parts):
            for j, linear in enumerate(part.linears):
                yield i, j, linear

    def _lay_out(self, layout: Layout) -> PanelWeights | AlignedWeights | None:
        if PanelWeights.refuse(self.parts) is None:
            return self._panels(layout)
        refusal = AlignedWeights.refuse(self.parts)
        return AlignedWeights(self.parts, self.final_norm) if refusal is None else None

    def _panels(self, layout: Layout) -> PanelWeights:
        quantised = {id(self.get_submodule(name)) for name in layout.int8}
        gated = {layer.ffn.up for layer in self.layers} if self.kind.gated else set[nn.Linear]()
        # A weight that two linears share lies there once.
        laid_out: dict[tuple[int, bool], tuple[Tensor, ...]] = {}

        def lay_out(linear: nn.Linear) -> tuple[Tensor, Tensor]:
            key = (id(linear.weight), id(linear) in quantised)
            is_gated = linear in gated
            if key not in laid_out:
                laid_out[key] = _panels_of(linear, key[1], layout.bfloat16, is_gated)
            panels, *scales = laid_out[key]
            bias = cpu_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
            bias = gated_rows(bias) if is_gated else bias
            return panels, torch.stack([bias, *scales]) if scales else bias

        return PanelWeights(self.parts, self.head_dim, lay_out, layout.keep_fp32, self.kind, self.final_norm)

    def plain(self, part: int, linear: int, name: str) -> Tensor:
        """The weight (out, in), or the bias or the scales (out,) of a linear, as `name` says, wherever the
        values lie."""
        module, laid_out, layout = self.parts[part].linears[linear], self._laid_out, self._layout
        if name != "weight" or laid_out is None or layout is None or layout.keep_weights:
            return module.get_parameter(name).detach()
        return (
            laid_out.weight_of(part, linear) if laid_out.holds_alone(part, linear) else module.weight.detach()
        )

    def read(self, part: int, linear: int, name: str) -> Tensor:
        """The tensor in which the kernels read the weight or the bias of a linear, as `name` says."""
        if self._laid_out is not None:
            return self._laid_out.read(part, linear, name)
        return self.parts[part].linears[linear].get_parameter(name)

    def unpack(self) -> None:
        """Undo `pack`: the linears hold and use their own weights again."""
        weights = [(linear, weight.contiguous()) for linear, weight in self._released()]
        for linear, weight in weights:
            linear.weight.data = weight
        self._laid_out = self._layout = None
        self._place_distances(_OWN_WEIGHTS)

    def _released(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        """The linears whose own weights `pack` released, with the weights as they are laid out."""
        laid_out, layout = self._laid_out, self._layout
        if laid_out is not None and layout is not None and not layout.keep_weights:
            for i, j, linear in self._linears():
                if laid_out.holds_alone(i, j):
                    yield linear, laid_out.weight_of(i, j)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedEncoder:
        """Make a copy in which a released weight has no memory either: a parameter's own copy would have
        as much as its shape says."""
        for linear, _ in self._released():
            nothing = placeholder(linear.weight)
            if nothing is not None:
                memo[id(linear.weight)] = nn.Parameter(nothing, requires_grad=False)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, *args: Any, **kwargs: Any) -> PrunedEncoder:
        layout = self._layout
        self.unpack()
        super()._apply(*args, **kwargs)
        if layout is not None:
            self.pack(layout.keep_weights, layout.int8, layout.bfloat16, layout.keep_fp32)
        return self

    def forward(
        self,
        x: Tensor,
        batch: PackedBatch,
        collect: list[Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(tokens, hidden_size) -> the same. Each layer's output is appended to `collect` if it is given; the
        last one's is what the final norm makes of it. positions int32 (tokens,): as `ops.attention` takes
        them."""
        return self.run(x, batch.cu_seqlens, batch.max_seqlen, collect, positions)

    def run(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        collect: list[Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The forward pass for a caller that has only the lengths of the batch."""
        laid_out = self._laid_out
        if laid_out is not None and collect is None and laid_out.can_run_preferred:
            return laid_out(x, cu_seqlens, max_seqlen, positions=positions)
        for i in range(len(self.layers)):
            x = self._run_layer(i, laid_out, x, cu_seqlens, max_seqlen, positions)
            if collect is not None:
                collect.append(x)
        return x

    def _run_layer(
        self,
        i: int,
        laid_out: PanelWeights | AlignedWeights | None,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        positions: Tensor | None,
    ) -> Tensor:
        layer = self.layers[i]
        if laid_out is not None and laid_out.can_run_preferred:
            return laid_out(x, cu_seqlens, max_seqlen, first=2 * i, last=2 * i + 2, positions=positions)
        if laid_out is None:
            x = layer(x, cu_seqlens, max_seqlen, positions)
        else:
            # The backend that was asked for has no op for this layout: its ops get plain (out, in) weights.
            for j, part in enumerate((layer.attention, layer.ffn), start=2 * i):
                first, second = laid_out.weight_of(j, 0), laid_out.weight_of(j, 1)
                x = part.compute(x, cu_seqlens, max_seqlen, first, part.linears[0].bias, second, positions)
        is_last = i + 1 == len(self.layers)
        return x if self.final_norm is None or not is_last else self.final_norm(x)
