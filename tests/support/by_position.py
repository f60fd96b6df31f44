"""What the attentions of some families have beside q|k|v, and stacks that norm first: arguments for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inputs import cu_seqlens, generator, randn
from pruned_ops.ops.panels import (
    attention_part,
    ffn_part,
    gated_out,
    gated_rows,
    inner_width,
    is_attention,
    to_panels,
)


def frequencies(head_dim: int, base: float = 10_000.0) -> Tensor:
    """The inverse frequencies of rotary positions, (head_dim / 2,)."""
    return base ** (-torch.arange(0, head_dim, 2).float() / head_dim)


def with_gaps(lengths: Sequence[int], seed: int = 0) -> Tensor:
    """Positions that rise by 1, 2 or 3 in each sequence, and begin anywhere."""
    steps = [
        torch.randint(1, 4, (length,), generator=generator(seed + i)) for i, length in enumerate(lengths)
    ]
    return torch.cat([torch.zeros(0), *(step.cumsum(0) for step in steps)]).to(torch.int32)


def stack_arguments(
    lengths: Sequence[int],
    hidden: int = 48,
    head_dim: int = 16,
    norm_first: bool = True,
    gated: bool = True,
    heads: Sequence[int] = (3, 0, 2),
    width: int = 40,
    seed: int = 0,
) -> list[Any]:
    """`encoder`'s arguments for layers with as many heads, a window in all but the first, two bases of rotary
    positions, a bias by position, and a final norm. In a stack that norms first the first part has no norm,
    as ModernBERT's; the last layer's FFN has width 0."""
    widths: list[int] = []
    for i, count in enumerate(heads):
        widths += [attention_part(count), ffn_part(0 if i == len(heads) - 1 else width)]
    weights: list[Tensor] = []
    for i, part in enumerate(widths):
        inner = inner_width(part, head_dim)
        out = 3 * inner if is_attention(part) else 2 * inner if gated else inner
        first = randn(seed + 10 * i, out, hidden) / hidden**0.5
        bias = randn(seed + 10 * i + 1, out)
        if gated and not is_attention(part):
            first, bias = gated_rows(first), gated_rows(bias)
            assert first.shape == (gated_out(inner), hidden)
        second = randn(seed + 10 * i + 2, hidden, inner) / max(1, inner) ** 0.5
        weights += [to_panels(first), bias, to_panels(second), randn(seed + 10 * i + 3, hidden)]
        size = 0 if norm_first and i == 0 else hidden
        weights += [randn(seed + 10 * i + 4, size) + 1, randn(seed + 10 * i + 5, size)]
    rotary = torch.zeros(len(widths), head_dim // 2)
    for i in range(len(widths)):
        rotary[i] = frequencies(head_dim, 10_000.0 if i // 2 else 400.0)
    windows = [7 if i // 2 else -1 for i in range(len(widths))]
    bias = randn(seed + 98, sum(heads), 2 * 9 + 1)
    x = randn(seed + 99, sum(lengths), hidden)
    return [
        *(x, cu_seqlens(lengths), max(lengths, default=0), weights, widths, head_dim, 1e-5),
        *(norm_first, gated, with_gaps(lengths), rotary, windows, bias, randn(seed + 97, 2, hidden)),
    ]
