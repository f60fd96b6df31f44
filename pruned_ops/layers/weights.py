"""How the weights of a stack lie while it runs: on a CPU as panels for one call, on a GPU aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.layers.released import placeholder
from pruned_ops.ops.panels import PART_TENSORS, from_bf16_panels, from_int8_panels, from_panels
from pruned_ops.ops.registry import given_up

# Bytes. A GPU's widest loads and its tensor descriptors need the address of a matrix and of each of its rows
# to be a multiple of this.
ALIGNMENT = 16


class LayerPart(Protocol):
    """Half a layer, attention or FFN: two linears and a LayerNorm (`layers/modules.py` has both)."""

    norm: nn.LayerNorm

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
        first_bias: Tensor,
        second_weight: Tensor,
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
    """

    def __init__(
        self,
        parts: Sequence[LayerPart],
        head_dim: int,
        lay_out: Callable[[nn.Linear], tuple[Tensor, Tensor]],
        keep_fp32: bool = True,
    ) -> None:
        self.head_dim = head_dim
        self.eps = parts[0].norm.eps if parts else 0.0
        self.widths: list[int] = []
        self.weights: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        self._is_exact: list[bool] = []
        for part in parts:
            self.widths.append(part.encoder_part)
            for linear in part.linears:
                panels, bias = lay_out(linear)
                self.weights += [panels, bias]
                self._shapes.append((linear.out_features, linear.in_features))
                self._is_exact.append(_holds(panels, linear.weight, keep_fp32))
            self.weights += [part.norm.weight.detach(), part.norm.bias.detach()]
        self.holds_narrow = any(weight.dtype != torch.float32 for weight in self.weights)

    @staticmethod
    def refuse(parts: Sequence[LayerPart]) -> str | None:
        """The reason why these parts cannot run in one call; None if they can."""
        if all(kernel.backend.missing is not None for kernel in ops.encoder.kernels.values()):
            return "no backend that is here runs several parts in one call"
        for part in parts:
            if part.hidden_act not in (None, "gelu"):
                return f"the FFN's activation is {part.hidden_act}, one call computes gelu"
            if part.norm.weight.dtype != torch.float32 or part.norm.weight.device.type != "cpu":
                return "one call runs float32 weights on the CPU"
            if part.norm.eps != parts[0].norm.eps:
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
        if panels.dtype == torch.bfloat16:
            return from_bf16_panels(panels, out, inputs)
        if panels.is_floating_point():
            return from_panels(panels, out)
        return from_int8_panels(panels, out, inputs).contiguous()

    def scales_of(self, part: int, linear: int) -> Tensor | None:
        """The scales (out,) of one of a part's two linears; None where it runs in fp32."""
        panels, bias = self.weights[PART_TENSORS * part + 2 * linear :][:2]
        return None if panels.is_floating_point() else bias[1]

    def read(self, part: int, linear: int, name: str) -> Tensor:
        """The tensor in which a linear's weight or bias is read, as `name` says."""
        return self.weights[PART_TENSORS * part + 2 * linear + (name == "bias")]

    def holds_alone(self, part: int, linear: int) -> bool:
        """Whether a linear's own weight is not needed beside this layout."""
        return self._is_exact[2 * part + linear]

    def __call__(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first: int = 0, last: int | None = None
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`."""
        last = len(self.widths) if last is None else last
        weights = self.weights[PART_TENSORS * first : PART_TENSORS * last]
        return ops.encoder(
            x, cu_seqlens, max_seqlen, weights, self.widths[first:last], self.head_dim, self.eps
        )


def _holds(panels: Tensor, weight: Tensor, keep_fp32: bool) -> bool:
    """Whether a linear's own weight can be made of its panels again, or shall be."""
    if panels.dtype == torch.bfloat16 and keep_fp32:
        return torch.equal(from_bf16_panels(panels, *weight.shape), weight)
    return weight.is_floating_point() == panels.is_floating_point()


class AlignedWeights:
    """The weights of consecutive parts as a GPU's kernels read them fastest. Calling it runs those parts op
    by op.

    Every matrix and every row of it begins at a multiple of ALIGNMENT bytes; FFN widths in between are filled
    up with zero channels, which add exactly 0. A weight that lies so already is not copied.
    """

    can_run_preferred = True  # every backend's ops take these weights

    def __init__(self, parts: Sequence[LayerPart]) -> None:
        self.parts = parts
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.biases: list[Tensor] = []
        for part in parts:
            first, second = part.linears
            fill = 0 if part.hidden_act is None else -second.in_features % _channels(second.weight)
            self.biases.append(F.pad(first.bias.detach(), (0, fill)) if fill else first.bias.detach())
            self.weights.append(
                (_aligned(first.weight.detach(), rows=fill), _aligned(second.weight.detach(), columns=fill))
            )

    @staticmethod
    def refuse(parts: Sequence[LayerPart]) -> str | None:
        """The reason why these parts' weights stay as they are; None if aligning them helps."""
        if not parts or parts[0].norm.weight.device.type != "cuda":
            return "only a GPU's kernels ask for aligned weights"
        return None

    def weight_of(self, part: int, linear: int) -> Tensor:
        """The weight (out, in) of one of a part's two linears, without the channels that fill it up."""
        first, second = self.parts[part].linears
        aligned = self.weights[part][linear]
        return aligned[:, : second.in_features] if linear else aligned[: first.out_features]

    def read(self, part: int, linear: int, name: str) -> Tensor:
        """The tensor in which a linear's weight or bias is read, as `name` says."""
        if name == "weight":
            return self.weights[part][linear]
        return self.parts[part].linears[1].bias if linear else self.biases[part]

    def holds_alone(self, part: int, linear: int) -> bool:
        """Whether the weight of a linear lies here as a copy."""
        return self.weights[part][linear].data_ptr() != self.parts[part].linears[linear].weight.data_ptr()

    def __call__(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first: int = 0, last: int | None = None
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`."""
        last = len(self.parts) if last is None else last
        for i in range(first, last):
            weights = self.weights[i]
            # What an earlier part computed is read by this one alone. Traced code keeps to the ops' schemas.
            is_ours = i > first and not torch.compiler.is_compiling()
            with given_up(x) if is_ours else nullcontext():
                x = self.parts[i].compute(x, cu_seqlens, max_seqlen, weights[0], self.biases[i], weights[1])
        return x


def _channels(weight: Tensor) -> int:
    """FFN widths are filled up to a multiple of this many channels.

    Triton stores and loads 16 bytes at once only where a size is known to be a multiple of 16 numbers; with
    8 halves more, it writes 2 bytes at a time. In halves, tiles are 64 channels wide or more in any case."""
    return 64 if weight.element_size() == 2 else 16


def _aligned(weight: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The weight with so many zero rows and columns appended; the weight itself if it is aligned already."""
    if rows or columns:
        return F.pad(weight, (0, columns, 0, rows))
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
