"""Op `linear_add_layer_norm`: LayerNorm(x weight^T + bias + residual).

Fused, a program owns BLOCK_M whole output rows (BLOCK_N is at least hidden_size), keeps their sums in
registers, adds bias and residual, normalises, and writes each row once. Where a row does not fit into a
program, or where this is slower, the GEMM is cuBLAS's (split over programs if tokens are few), and
`add_layer_norm` follows it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from pruned_ops.ops.backends.gpu import refuse_hidden
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.add_layer_norm import launch_add_layer_norm
from pruned_ops.ops.backends.triton.configs import GemmConfig
from pruned_ops.ops.backends.triton.linear import meta, partial_linear
from pruned_ops.ops.backends.triton.tiles import matrix_tile, normalised
from pruned_ops.ops.backends.triton.tuning import best_row_config, linear_add_layer_norm_config
from pruned_ops.ops.reference import check_add_layer_norm, check_linear_add_layer_norm
from pruned_ops.ops.registry import is_given_up


@triton.jit(do_not_specialize=["tokens"])
def linear_add_layer_norm_kernel(
    x, weight, bias, residual, norm_weight, norm_bias, out, tokens, hidden, inner, eps,
    stride_x, stride_w, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    WHOLE_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    sums = matrix_tile(
        x, weight, row, 0, tokens, hidden, 0, inner, stride_x, stride_w,
        BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K, False, PRECISION, UPCAST,
    )  # fmt: skip
    rows, columns = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_row = columns < hidden
    inside = (rows < tokens)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None]
    added = tl.load(residual + offsets * stride_residual + columns[None, :], mask=inside, other=0.0)
    sums += tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)[None, :] + added.to(tl.float32)
    scale = tl.load(norm_weight + columns, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + columns, mask=in_row, other=0.0).to(tl.float32)
    result = normalised(sums, inside, hidden, scale, shift, eps).to(out.dtype.element_ty)
    tl.store(out + offsets * hidden + columns[None, :], result, mask=inside)


def refuse(*args: object) -> str | None:
    return refuse_hidden(args[3]) or launch.refuse(*args)


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Launcher of the op; see reference.linear_add_layer_norm."""
    check_linear_add_layer_norm(x, weight)
    check_add_layer_norm(residual, bias, residual, norm_weight, norm_bias)
    torch._check(
        weight.size(0) == residual.size(1) and x.size(0) == residual.size(0),
        lambda: (
            f"linear_add_layer_norm: residual is {tuple(residual.shape)}, "
            f"({x.size(0)}, {weight.size(0)}) is needed"
        ),
    )
    config = linear_add_layer_norm_config(x, weight)
    return launch_linear_add_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps, config)


def launch_linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    config: GemmConfig | None,
) -> Tensor:
    """Run the op with this configuration; None stands for cuBLAS's GEMM, followed by `add_layer_norm`.

    cuBLAS adds into the residual where the caller has given it up: the GEMM reads it behind its products, and
    LayerNorm has one tensor less to read."""
    tokens, inner = x.shape
    hidden = weight.size(0)
    norm = (norm_weight, norm_bias, eps, best_row_config("add_layer_norm", residual, tokens))
    if config is None and inner and tokens and is_given_up(residual):
        total = residual.addmm_(x, weight.t())
        try:
            return launch_add_layer_norm(total, bias, None, *norm)
        except TritonError as error:  # no other backend may try: the residual is no more
            raise RuntimeError(f"add_layer_norm: {error}") from error
    if config is None or inner == 0 or tokens == 0:
        return launch_add_layer_norm(F.linear(x, weight), bias, residual, *norm)
    x, weight, residual = launch.rows(x), launch.rows(weight), launch.rows(residual)
    if config.split_k > 1:
        return launch_add_layer_norm(partial_linear(x, weight, config), bias, residual, *norm)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    linear_add_layer_norm_kernel[(triton.cdiv(tokens, config.block_m),)](
        x, weight, bias.contiguous(), residual, norm_weight.contiguous(), norm_bias.contiguous(), out,
        tokens, hidden, inner, eps, x.stride(0), weight.stride(0), residual.stride(0),
        **meta(config), **launch.OPTIONS, WHOLE_K=inner % config.block_k == 0,
        PRECISION=launch.precision(x.dtype), UPCAST=launch.upcast(x.dtype),
    )  # fmt: skip
    return out
