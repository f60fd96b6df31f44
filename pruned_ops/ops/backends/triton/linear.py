"""A linear layer whose inner dimension is split over several programs; the caller sums their results.

`linear_gelu` and `linear_add_layer_norm` use it where tokens are few, because one program per output tile
would then leave most multiprocessors idle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import GemmConfig
from pruned_ops.ops.backends.triton.tiles import matrix_tile, place


@triton.jit(do_not_specialize=["tokens"])
def partial_linear_kernel(
    x, weight, out, tokens, width, hidden, share, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program owns one tile of out[split] (tokens, width), in fp32: the part of x weight^T over the columns
    from split * share to (split + 1) * share."""
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tile_m, tile_n = place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    row, column, split = tile_m * BLOCK_M, tile_n * BLOCK_N, tl.program_id(1)
    begin = split * share
    sums = matrix_tile(
        x, weight, row, column, tokens, width, begin, tl.minimum(begin + share, hidden), stride_x, stride_w,
        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, False, PRECISION, UPCAST,
    )  # fmt: skip
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    offsets = (split * tokens + rows).to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + offsets, sums, mask=(rows < tokens)[:, None] & (columns < width)[None, :])


def partial_linear(x: Tensor, weight: Tensor, config: GemmConfig) -> Tensor:
    """The partial sums of x weight^T over `split_k` shares of the columns: fp32 (split_k, tokens, width)."""
    (tokens, hidden), width = x.shape, weight.size(0)
    out = torch.empty((config.split_k, tokens, width), dtype=torch.float32, device=x.device)
    share = triton.cdiv(triton.cdiv(hidden, config.block_k), config.split_k) * config.block_k
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(width, config.block_n)
    partial_linear_kernel[(tiles, config.split_k)](
        x, weight, out, tokens, width, hidden, share, x.stride(0), weight.stride(0),
        **meta(config), **launch.OPTIONS, WHOLE_K=hidden % config.block_k == 0,
        PRECISION=launch.precision(x.dtype), UPCAST=launch.upcast(x.dtype),
    )  # fmt: skip
    return out


def meta(config: GemmConfig) -> dict[str, Any]:
    """A configuration as keyword arguments of a GEMM kernel."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
