"""How the weights of a stack lie while it runs: on a CPU as panels for one call, on a GPU aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.layers.kinds import BERT_KIND, StackKind
from pruned_ops.layers.released import placeholder
from pruned_ops.ops.panels import (
    PART_TENSORS,
    from_bf16_panels,
    from_int8_panels,
    from_panels,
    gated_out,
    to_head_panels,
    ungated_rows,
)
from pruned_ops.ops.registry import given_up

# Bytes. A GPU's widest loads and its tensor descriptors need the address of a matrix and of each of its rows
# to be a multiple of this.
ALIGNMENT = 16


class LayerPart(Protocol):
    """Half a layer, attention or FFN: two linears and a LayerNorm (`layers/parts.py` has both), which the
    first attention may lack."""

    norm: nn.LayerNorm | None
    kind: StackKind

    @property
    def hidden_act(self) -> str | None:
        """The FFN's activation; None for attention."""

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]: ...

    @property
    def encoder_part(self) -> int: ...

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """What a stack's weights were laid out for.

    keep_weights: the linears keep their own weights beside the copy that is laid out.
    int8: the names of the linears that run in int8. bfloat16: whether the others run in bfloat16.
    keep_fp32: the linears keep the weights that bfloat16 rounds.
    """

    keep_weights: bool
    int8: frozenset[str]
    bfloat16: bool = False
    keep_fp32: bool = True


class PanelWeights:
    """The weights of consecutive parts as panels. Calling it runs those parts in one call of `ops.encoder`.

    lay_out: a linear -> its panels and its bias, as `ops.encoder` takes them. The panels hold the weights as
    they are now; the LayerNorms' parameters are shared with the parts.
    A linear's own weight is not needed beside its panels where they hold the same numbers: where it runs in
    fp32, where its own weight is int8 already, or where its numbers are bfloat16 numbers. keep_fp32=False
    takes the rounded numbers for its own in any case.
    kind: the ways in which the stack differs from BERT's. final_norm: the LayerNorm after the last part.
    """

    def __init__(
        self,
        parts: Sequence[LayerPart],
        head_dim: int,
        lay_out: Callable[[nn.Linear], tuple[Tensor, Tensor]],
        keep_fp32: bool = True,
        kind: StackKind = BERT_KIND,
        final_norm: nn.LayerNorm | None = None,
    ) -> None:
        self.head_dim, self.kind = head_dim, kind
        norms = [part.norm for part in parts if part.norm is not None]
        self.eps = norms[0].eps if norms else final_norm.eps if final_norm is not None else 0.0
        self._by_position = OfParts.made(parts, head_dim) if kind.reads_positions else None
        self._final_norm = None if final_norm is None else torch.stack(_norm_tensors(final_norm))
        self.widths: list[int] = []
        self.weights: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        self._is_exact: list[bool] = []
        self._is_gated: list[bool] = []
        for part in parts:
            self.widths.append(part.encoder_part)
            for linear in part.linears:
                panels, bias = lay_out(linear)
                self.weights += [panels, bias]
                self._shapes.append((linear.out_features, linear.in_features))
                is_gated = kind.gated and part.hidden_act is not None and linear is part.linears[0]
                self._is_gated.append(is_gated)
                self._is_exact.append(_holds(panels, linear.weight, keep_fp32, is_gated))
            self.weights += _norm_tensors(part.norm)
        self.holds_narrow = any(weight.dtype != torch.float32 for weight in self.weights)

    @staticmethod
    def refuse(parts: Sequence[LayerPart]) -> str | None:
        """The reason why these parts cannot run in one call; None if they can."""
        if all(kernel.backend.missing is not None for kernel in ops.encoder.kernels.values()):
            return "no backend that is here runs several parts in one call"
        for part in parts:
            if part.hidden_act not in (None, "gelu"):
                return f"the FFN's activation is {part.hidden_act}, one call computes gelu"
        norms = [part.norm for part in parts if part.norm is not None]
        for norm in norms:
            if norm.weight.dtype != torch.float32 or norm.weight.device.type != "cpu":
                return "one call runs float32 weights on the CPU"
            if norm.eps != norms[0].eps:
                return "the parts' LayerNorms differ in eps"
        return None

    @property
    def can_run_preferred(self) -> bool:
        """False if a backend was asked for by name that lacks `ops.encoder`: such a backend needs the weights
        as nn.Linear has them (`weight_of`). int8 and bfloat16 weights exist as panels only, so with them this
        is True, and the op raises the error."""
        return self.holds_narrow or ops.encoder.can_run_preferred()

    def weight_of(self, part: int, linear: int) -> Tensor:
        """A copy of the weight (out, in) of one of a part's two linears, as its panels hold it: int8, or fp32
        of fp32 and bfloat16."""
        panels = self.weights[PART_TENSORS * part + 2 * linear]
        out, inputs = self._shapes[2 * part + linear]
        return _weight_in(panels, out, inputs, self._is_gated[2 * part + linear])

    def scales_of(self, part: int, linear: int) -> Tensor | None:
        """The scales (out,) of one of a part's two linears; None where it runs in fp32."""
        panels, bias = self.weights[PART_TENSORS * part + 2 * linear :][:2]
        if panels.is_floating_point():
            return None
        is_gated = self._is_gated[2 * part + linear]
        return ungated_rows(bias[1], self._shapes[2 * part + linear][0] // 2) if is_gated else bias[1]

    def read(self, part: int, linear: int, name: str) -> Tensor:
        """The tensor in which a linear's weight or bias is read, as `name` says."""
        return self.weights[PART_TENSORS * part + 2 * linear + (name == "bias")]

    def holds_alone(self, part: int, linear: int) -> bool:
        """Whether a linear's own weight is not needed beside this layout."""
        return self._is_exact[2 * part + linear]

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first: int = 0,
        last: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`, and after the
        very last part through the final norm. positions: as `ops.attention` takes them."""
        last = len(self.widths) if last is None else last
        weights = self.weights[PART_TENSORS * first : PART_TENSORS * last]
        arguments = (x, cu_seqlens, max_seqlen, weights, self.widths[first:last], self.head_dim, self.eps)
        if self.kind == BERT_KIND:
            return ops.encoder(*arguments)
        by_position: tuple[Any, ...] = (None, None, None, None)
        relative: tuple[Tensor | None, ...] = ()
        if self._by_position is not None:
            by_position = (positions, *self._by_position.between(first, last))
            relative = self._by_position.relative_between(first, last)
        final_norm = self._final_norm if last == len(self.widths) else None
        flags = self.kind.norm_first, self.kind.gated
        return ops.encoder(*arguments, *flags, *by_position, final_norm, *relative)


@dataclass(frozen=True)
class OfParts:
    """What the attentions among some parts do with positions, as `ops.encoder` takes it: its `rotary` and
    `windows`, the rows of `position_bias` of each part (None of an FFN), its `position_keys`,
    `position_queries` and `distance_rows`, and the number of heads before each part."""

    rotary: Tensor | None
    windows: list[int]
    biases: list[Tensor | None]
    keys: Tensor | None
    queries: Tensor | None
    distance_rows: Tensor | None
    heads_before: list[int]

    @classmethod
    def made(cls, parts: Sequence[Any], head_dim: int) -> OfParts:
        """Of attentions and FFNs."""
        rotary, windows = cpu_zeros(len(parts), head_dim // 2), [-1] * len(parts)
        biases: list[Tensor | None] = [None] * len(parts)
        heads = [part.encoder_part if part.hidden_act is None else 0 for part in parts]
        attentions = [part for part in parts if part.hidden_act is None]
        for i, part in enumerate(parts):
            if part.hidden_act is not None:
                continue
            frequencies = part.by_position.frequencies(head_dim)
            if frequencies is not None:
                rotary[i] = frequencies
            window = part.by_position.window
            windows[i] = -1 if window is None else window
            if part.position_bias is not None:
                biases[i] = part.position_bias.detach()
        terms = attentions[0].kind.disentangled if attentions else None
        return cls(
            rotary if bool(rotary.any()) else None,
            windows,
            biases,
            _panels_of_heads([part.position_key for part in attentions]),
            _panels_of_heads([part.position_query for part in attentions]),
            None if terms is None else terms.distance_rows,
            list(accumulate(heads, initial=0)),
        )

    def between(self, first: int, last: int) -> tuple[Tensor | None, list[int], Tensor | None]:
        """For the parts from `first` to before `last`."""
        rotary = None if self.rotary is None else self.rotary[first:last]
        biases = [bias for bias in self.biases[first:last] if bias is not None]
        return rotary, self.windows[first:last], torch.cat(biases) if biases else None

    def relative_between(self, first: int, last: int) -> tuple[Tensor | None, ...]:
        """The keys, queries and rows of distances for the parts from `first` to before `last`."""
        if self.distance_rows is None:
            return ()
        heads = slice(self.heads_before[first], self.heads_before[last])
        keys, queries = (None if every is None else every[heads] for every in (self.keys, self.queries))
        return keys, queries, self.distance_rows


def _panels_of_heads(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The rows (heads, rows, head_dim) of several attentions as panels, one after the other."""
    present_rows = [of_attention.detach() for of_attention in rows if of_attention is not None]
    return to_head_panels(torch.cat(present_rows)) if present_rows else None


def cpu_zeros(*size: int) -> Tensor:
    """Make zeros as the CPU's kernels take them, whatever dtype and device are the process's defaults."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")


def _norm_tensors(norm: nn.LayerNorm | None) -> list[Tensor]:
    """The weight and the bias of a LayerNorm as `ops.encoder` takes them: empty where there is none."""
    if norm is None:
        return [cpu_zeros(0), cpu_zeros(0)]
    weight = norm.weight.detach()
    return [weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()]


def _weight_in(panels: Tensor, out: int, inputs: int, is_gated: bool) -> Tensor:
    """The weight (out, in) that panels hold, contiguous. is_gated: in the order of `gated_rows`."""
    rows = gated_out(out // 2) if is_gated else out
    if panels.dtype == torch.bfloat16:
        weight = from_bf16_panels(panels, rows, inputs)
    elif panels.is_floating_point():
        weight = from_panels(panels, rows)
    else:
        weight = from_int8_panels(panels, rows, inputs).contiguous()
    return ungated_rows(weight, out // 2) if is_gated else weight


def _holds(panels: Tensor, weight: Tensor, keep_fp32: bool, is_gated: bool) -> bool:
    """Whether a linear's own weight can be made of its panels again, or shall be."""
    if panels.dtype == torch.bfloat16 and keep_fp32:
        return torch.equal(_weight_in(panels, weight.size(0), weight.size(1), is_gated), weight)
    return weight.is_floating_point() == panels.is_floating_point()


class AlignedWeights:
    """The weights of consecutive parts as a GPU's kernels read them fastest. Calling it runs those parts op
    by op.

    Every matrix and every row of it begins at a multiple of ALIGNMENT bytes; FFN widths in between are filled
    up with zero channels, which add exactly 0. A weight that lies so already is not copied.
    final_norm: the LayerNorm after the last part.
    """

    can_run_preferred = True  # every backend's ops take these weights

    def __init__(self, parts: Sequence[LayerPart], final_norm: nn.LayerNorm | None = None) -> None:
        self.parts = parts
        self._final_norm = final_norm
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.biases: list[Tensor | None] = []
        for part in parts:
            first, second = part.linears
            fill = 0 if part.hidden_act is None else -second.in_features % _channels(second.weight)
            # A gated FFN's units have a row in each half.
            halves = 2 if _is_gated(part) else 1
            rows = first.bias
            if rows is None and part.hidden_act == "gelu":  # the op takes one: made here, once
                rows = first.weight.new_zeros(first.out_features)
            self.biases.append(None if rows is None else _filled(rows.detach(), halves, fill))
            first_weight = _filled(first.weight.detach(), halves, fill)
            self.weights.append((_aligned(first_weight), _aligned(second.weight.detach(), columns=fill)))

    @staticmethod
    def refuse(parts: Sequence[LayerPart]) -> str | None:
        """The reason why these parts' weights stay as they are; None if aligning them helps."""
        if not parts or parts[0].linears[1].weight.device.type != "cuda":
            return "only a GPU's kernels ask for aligned weights"
        return None

    def weight_of(self, part: int, linear: int) -> Tensor:
        """The weight (out, in) of one of a part's two linears, without the channels that fill it up; a copy
        where they lie between others."""
        first, second = self.parts[part].linears
        aligned = self.weights[part][linear]
        if linear:
            return aligned[:, : second.in_features]
        if not _is_gated(self.parts[part]) or aligned.size(0) == first.out_features:
            return aligned[: first.out_features]
        return torch.cat([half[: second.in_features] for half in aligned.chunk(2)])

    def read(self, part: int, linear: int, name: str) -> Tensor:
        """The tensor in which a linear's weight or bias is read, as `name` says."""
        if name == "weight":
            return self.weights[part][linear]
        bias = self.parts[part].linears[1].bias if linear else self.biases[part]
        assert bias is not None  # nobody reads a bias that is not there
        return bias

    def holds_alone(self, part: int, linear: int) -> bool:
        """Whether the weight of a linear lies here as a copy."""
        return self.weights[part][linear].data_ptr() != self.parts[part].linears[linear].weight.data_ptr()

    def __call__(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first: int = 0,
        last: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`, and after the
        very last part through the final norm. positions: as `ops.attention` takes them."""
        last = len(self.parts) if last is None else last
        for i in range(first, last):
            weights = self.weights[i]
            # What an earlier part computed is read by this one alone. Traced code keeps to the ops' schemas.
            is_ours = i > first and not torch.compiler.is_compiling()
            with given_up(x) if is_ours else nullcontext():
                x = self.parts[i].compute(
                    x, cu_seqlens, max_seqlen, weights[0], self.biases[i], weights[1], positions
                )
        return x if self._final_norm is None or last < len(self.parts) else self._final_norm(x)


def _is_gated(part: LayerPart) -> bool:
    """Whether a part is an FFN with two rows of its first linear for each unit."""
    return part.kind.gated and part.hidden_act is not None


def _channels(weight: Tensor) -> int:
    """FFN widths are filled up to a multiple of this many channels.

    Triton stores and loads 16 bytes at once only where a size is known to be a multiple of 16 numbers; with
    8 halves more, it writes 2 bytes at a time. In halves, tiles are 64 channels wide or more in any case."""
    return 64 if weight.element_size() == 2 else 16


def _filled(rows: Tensor, halves: int, fill: int) -> Tensor:
    """Rows of a weight or numbers of a bias, with `fill` zeros appended to each half, or to the only one."""
    if not fill:
        return rows
    zeros = rows.new_zeros(fill, *rows.shape[1:])
    return torch.cat([part for half in rows.chunk(halves) for part in (half, zeros)])


def _aligned(weight: Tensor, columns: int = 0) -> Tensor:
    """The weight with so many zero columns appended; the weight itself if it is aligned already."""
    if columns:
        return F.pad(weight, (0, columns))
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


def release(linears: Sequence[nn.Linear]) -> None:
    """Free the memory of the linears' weights. They keep their shapes and read as NaN, until they are given
    values again."""
    weights = [(linear.weight, linear.weight.data, placeholder(linear.weight)) for linear in linears]
    try:
        for weight, _, nothing in weights:  # after all of them are there
            if nothing is not None:
                weight.data = nothing
    except BaseException:
        for weight, values, _ in weights:
            weight.data = values
        raise
