"""bfloat16 in `ops.encoder`: weights for it, and arguments whose sums are whole numbers, exact in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inputs import generator
from pruned_ops.ops.panels import PART_TENSORS, ffn_part, from_panels, to_bf16_panels


def in_bf16(arguments: Sequence[Any], linears: Sequence[int] = (0, 1)) -> list[Any]:
    """`encoder`'s arguments with the first (0) or second (1) linears of all parts in bfloat16."""
    weights = list(arguments[3])
    for part in range(0, len(weights), PART_TENSORS):
        for linear in linears:
            at = part + 2 * linear
            weights[at] = to_bf16_panels(from_panels(weights[at], weights[at + 1].size(0)))
    return [*arguments[:3], weights, *arguments[4:]]


def whole_number_arguments(rows: int, inputs: int, width: int, seed: int) -> list[Any]:
    """`encoder`'s arguments for one FFN all of whose sums are whole numbers, exact in fp32 in any order.

    The bias keeps the first linear's sums where GELU is the identity; they need more bits than bfloat16 has,
    and half of the odd ones lie in the middle of two of its numbers, so that the second linear's input shows
    how numbers are rounded. A large eps leaves LayerNorm nothing to do but to take the mean off.
    """
    eps = 1e10
    values, first = _whole(seed, rows, inputs), _whole(seed + 1, width, inputs)
    second = _whole(seed + 2, inputs, width).clamp(-1, 1)
    bias = torch.full((width,), 9.0 * inputs + 300.0)
    norm = [torch.full((inputs,), eps**0.5), torch.zeros(inputs)]
    weights = [to_bf16_panels(first), bias, to_bf16_panels(second), torch.zeros(inputs), *norm]
    bounds = torch.tensor([0, rows], dtype=torch.int32)
    return [values, bounds, rows, weights, [ffn_part(width)], 16, eps]


def _whole(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randint(-3, 4, (rows, columns), generator=generator(seed)).float()
