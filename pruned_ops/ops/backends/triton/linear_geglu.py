"""Op `linear_geglu`: GELU(x gate^T + gate_bias) * (x up^T + up_bias), with all but the products in the GEMM's
epilogue.

A program owns a tile of BLOCK_M tokens by BLOCK_N / 2 units. It reads the two rows of weights of each unit
one after the other, as one operand of BLOCK_N rows, so that a thread holds both products of a unit; it keeps
their sums in fp32 registers, and writes one number a unit. So it runs with linear_gelu's configurations and
the registers that they are known to take. With split_k (linear.py) a second kernel adds the partial sums in
a fixed order and activates them. cuBLAS computes exact fp32 products, as for `linear_gelu`.
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
from pruned_ops.ops.backends.triton.tuning import linear_geglu_config
from pruned_ops.ops.reference import check_linear_geglu


@triton.jit(do_not_specialize=["tokens"])
def linear_geglu_kernel(
    x, weight, bias, out, tokens, width, hidden, stride_x, stride_w, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = BLOCK_N // 2
    tile_m, tile_n = place(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, UNITS), GROUP_M)
    row, column = tile_m * BLOCK_M, tile_n * UNITS
    sums = matrix_tile(
        x, weight, row, column, tokens, width, 0, hidden, stride_x, stride_w,
        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, False, PRECISION, UPCAST, PAIRED=True,
    )  # fmt: skip
    gate, up = sums.reshape(BLOCK_M, UNITS, 2).split()
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, UNITS)
    inside = columns < width
    gate += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    up += tl.load(bias + width + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = (gelu(gate) * up).to(out.dtype.element_ty)
    pointers = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(pointers, result, mask=(rows < tokens)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def bias_geglu_kernel(
    partials, bias, out, tokens, width, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program owns BLOCK units of one row: it adds the partial sums of both products and their biases, and
    writes the activated product."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(bias + width + columns, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        sums = partials + (split * tokens + row).to(tl.int64) * (2 * width) + columns
        gate += tl.load(sums, mask=inside, other=0.0)
        up += tl.load(sums + width, mask=inside, other=0.0)
    result = (gelu(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * width + columns, result, mask=inside)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Launcher of the op; see reference.linear_geglu."""
    check_linear_geglu(x, weight, bias)
    if x.size(0) == 0 or weight.size(0) == 0:
        return x.new_empty(x.size(0), weight.size(0) // 2)
    return launch_linear_geglu(x, weight, bias, linear_geglu_config(x, weight))


def launch_linear_geglu(x: Tensor, weight: Tensor, bias: Tensor, config: GemmConfig | None) -> Tensor:
    """Run the op with this configuration, whose block_n counts the rows of weights: two a unit. None stands
    for torch's GEMM and its activation."""
    if config is None:
        gate, up = F.linear(x, weight, bias).chunk(2, -1)
        return F.gelu(gate).mul_(up)
    x, weight, bias = launch.rows(x), launch.rows(weight), bias.contiguous()
    (tokens, hidden), width = x.shape, weight.size(0) // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if config.split_k > 1:
        partials = partial_linear(x, weight, config)
        block = 512
        bias_geglu_kernel[(tokens, triton.cdiv(width, block))](
            partials, bias, out, tokens, width, SPLIT=config.split_k, BLOCK=block, **launch.OPTIONS
        )
        return out
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(width, config.block_n // 2)
    linear_geglu_kernel[(tiles,)](
        x, weight, bias, out, tokens, width, hidden, x.stride(0), weight.stride(0), out.stride(0),
        **meta(config), **launch.OPTIONS, WHOLE_K=hidden % config.block_k == 0,
        PRECISION=launch.precision(x.dtype), UPCAST=launch.upcast(x.dtype),
    )  # fmt: skip
    return out
