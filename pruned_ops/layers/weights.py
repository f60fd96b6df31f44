"""How a stack's weights lie while it runs: on a CPU as panels for one call, on a GPU aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_ops import ops
from pruned_ops.ops.panels import unpack_panels
from pruned_ops.ops.reference import PART_TENSORS

# Bytes: what a GPU's widest loads and its tensor descriptors want of a matrix's base and of its rows.
ALIGNMENT = 16


class Part(Protocol):
    """An attention or an FFN part: two linears and a norm (`layers` has the modules)."""

    norm: nn.LayerNorm

    @property
    def hidden_act(self) -> str | None:
        """An FFN's; None for attention."""

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]: ...

    @property
    def encoder_width(self) -> int: ...

    def compute(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        first_weight: Tensor,
        first_bias: Tensor,
        second_weight: Tensor,
    ) -> Tensor: ...


class PackedParts:
    """Attention and FFN parts in a row as one call (`ops.encoder`), their weights in its layout.

    pack: a linear -> its panels and bias. The norms are the parts' own; the weights are as they were when
    this was made."""

    def __init__(
        self,
        parts: Sequence[Part],
        head_dim: int,
        pack: Callable[[nn.Linear], tuple[Tensor, Tensor]],
    ) -> None:
        self.head_dim = head_dim
        self.eps = parts[0].norm.eps if parts else 0.0
        self.widths: list[int] = []
        self.weights: list[Tensor] = []
        for part in parts:
            self.widths.append(part.encoder_width)
            for linear in part.linears:
                self.weights += pack(linear)
            self.weights += [part.norm.weight.detach(), part.norm.bias.detach()]

    @staticmethod
    def refuse(parts: Sequence[Part]) -> str | None:
        """Why these parts cannot run in one call; None if they can."""
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
    def runs(self) -> bool:
        """Whether this runs what is asked for: a backend may be whose ops take weights as they are. int8 has
        no other form, so it runs or raises."""
        return ops.encoder.is_had() or not all(weight.is_floating_point() for weight in self.weights)

    def weights_of(self, part: int) -> tuple[Tensor, Tensor]:
        """Copies of the weights of a part's two linears, (out, in) each, where they are fp32."""
        first, bias, second, second_bias, *_ = self.weights[PART_TENSORS * part : PART_TENSORS * (part + 1)]
        return unpack_panels(first, bias.size(0)), unpack_panels(second, second_bias.size(0))

    def give_back(self, parts: Sequence[Part]) -> None:
        """Give the linears of `parts`, which were released, their weights again; int8 ones kept theirs."""
        for i, part in enumerate(parts):
            for j, linear in enumerate(part.linears):
                panels, bias = self.weights[PART_TENSORS * i + 2 * j :][:2]
                if panels.is_floating_point():
                    linear.weight.data = unpack_panels(panels, bias.size(0))

    def __call__(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first: int = 0, last: int | None = None
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`."""
        last = len(self.widths) if last is None else last
        weights = self.weights[PART_TENSORS * first : PART_TENSORS * last]
        return ops.encoder(
            x, cu_seqlens, max_seqlen, weights, self.widths[first:last], self.head_dim, self.eps
        )


class AlignedParts:
    """Parts one op after another, on weights as a GPU's kernels read them best: bases and rows of matrices
    at multiples of ALIGNMENT bytes. FFN widths between are filled up with zero units, which add exactly 0.

    What lies so already is not copied; what is copied is released in the part, unless keep_weights.
    """

    def __init__(self, parts: Sequence[Part], keep_weights: bool) -> None:
        self.parts = parts
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.biases: list[Tensor] = []
        for part in parts:
            first, second = part.linears
            fill = 0 if part.hidden_act is None else -second.in_features % _numbers(second.weight)
            self.biases.append(F.pad(first.bias.detach(), (0, fill)) if fill else first.bias.detach())
            self.weights.append(
                (_aligned(first.weight.detach(), rows=fill), _aligned(second.weight.detach(), columns=fill))
            )
            if not keep_weights:
                for linear, weight in zip(part.linears, self.weights[-1], strict=True):
                    if weight.data_ptr() != linear.weight.data_ptr():
                        release(linear.weight)

    @staticmethod
    def refuse(parts: Sequence[Part]) -> str | None:
        """Why these parts' weights stay as they are; None if aligning them helps."""
        if not parts or parts[0].norm.weight.device.type != "cuda":
            return "only a GPU's kernels ask for aligned weights"
        return None

    runs = True

    def weights_of(self, part: int) -> tuple[Tensor, Tensor]:
        """The weights of a part's two linears, (out, in) each, of the part's own width."""
        first, second = self.parts[part].linears
        aligned = self.weights[part]
        return aligned[0][: first.out_features], aligned[1][:, : second.in_features]

    def give_back(self, parts: Sequence[Part]) -> None:
        """Give the linears that were released their weights again."""
        for i, part in enumerate(parts):
            for linear, weight in zip(part.linears, self.weights_of(i), strict=True):
                if weight.data_ptr() != linear.weight.data_ptr():
                    linear.weight.data = weight.contiguous()

    def __call__(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, first: int = 0, last: int | None = None
    ) -> Tensor:
        """(tokens, hidden_size) -> the same, through the parts from `first` to before `last`."""
        last = len(self.parts) if last is None else last
        for i in range(first, last):
            weights = self.weights[i]
            x = self.parts[i].compute(x, cu_seqlens, max_seqlen, weights[0], self.biases[i], weights[1])
        return x


def _numbers(weight: Tensor) -> int:
    """How many numbers of this dtype make ALIGNMENT bytes."""
    return ALIGNMENT // weight.element_size()


def _aligned(weight: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The weight with so many zero rows and columns after its own; itself if it lies well already."""
    if rows or columns:
        return F.pad(weight, (0, columns, 0, rows))
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


def release(parameter: Tensor) -> None:
    """Free a parameter's memory but not its shape: it reads as NaN until it gets values again."""
    if parameter.numel() == 0:
        return  # it has none, and torch.export cannot save what is expanded to no element
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
