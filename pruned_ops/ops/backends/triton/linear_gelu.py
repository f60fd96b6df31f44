"""Op `linear_gelu`: GELU(x weight^T + bias), with bias and activation in the GEMM's epilogue.

A program owns a tile of BLOCK_M tokens by BLOCK_N outputs (if it is persistent, one tile after the other),
keeps its sums in fp32 registers, and writes them once, activated. The activation takes the time of some 300
columns of products; meanwhile a second program of the multiprocessor multiplies, or a persistent one loads
its next tile. With split_k the inner dimension of a tile is split over several programs (linear.py), and a
second kernel adds their sums in a fixed order and activates them. fp32 products that are exact cannot use
tensor cores; cuBLAS computes those.

No kernel of this backend is specialised on a size that changes with every batch, because a request must not
compile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import GemmConfig
from pruned_ops.ops.backends.triton.linear import meta, partial_linear
from pruned_ops.ops.backends.triton.tiles import gelu, matrix_tile, place
from pruned_ops.ops.backends.triton.tuning import linear_gelu_config
from pruned_ops.ops.reference import check_linear_gelu


@triton.jit
def _finish(
    sums, bias, out, row, column, tokens, width, stride_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Bias and GELU for the sums of a tile that begins at (row, column), which is then written."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = columns < width
    sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    pointers = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(pointers, gelu(sums).to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens", "programs"])
def linear_gelu_kernel(
    x, weight, bias, out, tokens, width, hidden, stride_x, stride_w, stride_out, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    # Flattened, the loop over tiles and the one over columns are one pipeline: the next tile's operands are
    # on their way while this one is finished, whose number is counted apart so that neither waits.
    finished = tl.program_id(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=PERSISTENT):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP_M)
        sums = matrix_tile(
            x, weight, tile_m * BLOCK_M, tile_n * BLOCK_N, tokens, width, 0, hidden, stride_x, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        if PERSISTENT:  # in halves, which need fewer registers beside what is on its way
            tile_m, tile_n = place(finished, tiles_m, tiles_n, GROUP_M)
            finished += programs
            half: tl.constexpr = BLOCK_N // 2
            left, right = sums.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
            row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
            _finish(left, bias, out, row, column, tokens, width, stride_out, BLOCK_M, half)
            _finish(right, bias, out, row, column + half, tokens, width, stride_out, BLOCK_M, half)
        else:
            row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
            _finish(sums, bias, out, row, column, tokens, width, stride_out, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["tokens"])
def bias_gelu_kernel(
    partials, bias, out, tokens, width, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program owns BLOCK outputs of one row: it adds their partial sums and bias, and writes the GELU."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    sums = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        offset = (split * tokens + row).to(tl.int64) * width
        sums += tl.load(partials + offset + columns, mask=inside, other=0.0)
    pointers = out + row.to(tl.int64) * width + columns
    tl.store(pointers, gelu(sums).to(out.dtype.element_ty), mask=inside)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Launcher of the op; see reference.linear_gelu."""
    check_linear_gelu(x, weight, bias)
    if x.size(0) == 0 or weight.size(0) == 0:
        return x.new_empty(x.size(0), weight.size(0))
    config = linear_gelu_config(x, weight)
    if config is None:
        return F.gelu(F.linear(x, weight, bias))
    return launch_linear_gelu(x, weight, bias, config)


def launch_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, config: GemmConfig) -> Tensor:
    """Run the op with this configuration."""
    x, weight, bias = launch.rows(x), launch.rows(weight), bias.contiguous()
    (tokens, hidden), width = x.shape, weight.size(0)
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if config.split_k > 1:
        partials = partial_linear(x, weight, config)
        block = 512
        bias_gelu_kernel[(tokens, triton.cdiv(width, block))](
            partials, bias, out, tokens, width, SPLIT=config.split_k, BLOCK=block, **launch.OPTIONS
        )
        return out
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(width, config.block_n)
    resident = launch.multiprocessors(x.device) * config.programs
    programs = min(tiles, resident) if config.persistent else tiles
    operands = launch.descriptors(x, weight, config) if config.tma else (x, weight)
    linear_gelu_kernel[(programs,)](
        *operands, bias, out, tokens, width, hidden, x.stride(0), weight.stride(0), out.stride(0), programs,
        **meta(config), **launch.OPTIONS, WHOLE_K=hidden % config.block_k == 0, TMA=config.tma,
        PERSISTENT=config.persistent, PRECISION=launch.precision(x.dtype), UPCAST=launch.upcast(x.dtype),
    )  # fmt: skip
    return out
