"""Rotates query and key of a packed batch by their positions, before `attention` reads them.

A program owns the query and the key of one head of ROWS tokens. It computes the cosine and sine of each
token's angles, keeps them in registers, and turns both, in fp32, rounding each number once.

It is a kernel of its own because keys that are turned where attention loads them pass through registers, and
every block of queries turns them again: compiled so for sm_90, attention over heads of 64 took 130 registers
instead of 120, so that a multiprocessor held 3 programs instead of 4, and 38% more instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.tiles import cos_sin

ROWS, WARPS = 16, 4


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    qkv, positions, rotary, tokens, width, stride_qkv,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """HALF: half of a head's channels, and the number of its frequencies."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < tokens)[:, None]
    channels = tl.arange(0, HALF)
    position = tl.load(positions + rows, mask=rows < tokens, other=0).to(tl.float32)
    cos, sin = cos_sin(position[:, None] * tl.load(rotary + channels).to(tl.float32)[None, :])
    row, columns = rows.to(tl.int64)[:, None], tl.program_id(1) * 2 * HALF + channels[None, :]
    pointers = qkv + row * stride_qkv + columns
    for _ in tl.static_range(2):
        first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers, (first * cos - second * sin).to(qkv.dtype.element_ty), mask=inside)
        tl.store(pointers + HALF, (second * cos + first * sin).to(qkv.dtype.element_ty), mask=inside)
        pointers += width


def rotated(
    qkv: Tensor, cu_seqlens: Tensor, positions: Tensor | None, rotary: Tensor, in_place: bool
) -> Tensor:
    """qkv (tokens, 3 * num_heads * head_dim) with query and key rotated, as `attention` says; in its own
    memory where `in_place`, else in a copy. rotary (head_dim / 2,)."""
    qkv = launch.rows(qkv)
    out = qkv if in_place else qkv.clone()
    tokens, width, half = qkv.size(0), qkv.size(1) // 3, rotary.size(0)
    if positions is None:
        positions = _places(cu_seqlens, tokens)
    rotate_kernel[(triton.cdiv(tokens, ROWS), width // (2 * half))](
        out, positions.contiguous(), rotary.contiguous(), tokens, width, out.stride(0),
        HALF=half, ROWS=ROWS, num_warps=WARPS, **launch.OPTIONS,
    )  # fmt: skip
    return out


def _places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's place in its sequence, int32 (tokens,), without a look at the device's values."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True).clamp_(max=cu_seqlens.size(0) - 2)
    return token - cu_seqlens[sequence]
