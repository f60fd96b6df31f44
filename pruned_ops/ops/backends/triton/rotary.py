"""Rotates query and key of a packed batch by their positions, before `attention` reads them.

A program owns ROWS tokens and HEADS heads of q|k. It computes the cosine and sine of each token's angles
once, keeps them in registers, and turns one head after the other, in fp32, rounding each number once.

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

ROWS, HEADS, WARPS = 16, 4, 4


@triton.jit(do_not_specialize=["tokens", "heads"])
def rotate_kernel(
    qkv, positions, rotary, out, tokens, heads, stride_qkv, stride_out,
    HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """heads: those of q|k, from the first column on. HALF: half a head's channels, and its frequencies."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    channels = tl.arange(0, HALF)
    position = tl.load(positions + rows, mask=inside, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(rotary + channels).to(tl.float32)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    row = rows.to(tl.int64)[:, None]
    for i in tl.static_range(HEADS):
        columns = (tl.program_id(1) * HEADS + i) * (2 * HALF) + channels[None, :]
        mask = inside[:, None] & (columns < heads * 2 * HALF)
        read, write = qkv + row * stride_qkv + columns, out + row * stride_out + columns
        first = tl.load(read, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(read + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(write, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(write + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


def rotated(
    qkv: Tensor, cu_seqlens: Tensor, positions: Tensor | None, rotary: Tensor, in_place: bool
) -> Tensor:
    """qkv (tokens, 3 * num_heads * head_dim) with query and key rotated, as `attention` says; in its own
    memory where `in_place`, else in a copy. rotary (head_dim / 2,)."""
    qkv = launch.rows(qkv)
    out = qkv if in_place else qkv.clone()
    tokens, half = qkv.size(0), rotary.size(0)
    heads = qkv.size(1) // (3 * half)  # of q and k: two thirds of the heads of 2 * half channels
    if positions is None:
        positions = _places(cu_seqlens, tokens)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(heads, HEADS))
    rotate_kernel[grid](
        out, positions.contiguous(), rotary.contiguous(), out, tokens, heads, out.stride(0), out.stride(0),
        HALF=half, ROWS=ROWS, HEADS=HEADS, num_warps=WARPS, **launch.OPTIONS,
    )  # fmt: skip
    return out


def _places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each token's place in its sequence, int32 (tokens,), without a look at the device's values."""
    token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True).clamp_(max=cu_seqlens.size(0) - 2)
    return token - cu_seqlens[sequence]
