"""Op `add_layer_norm`: LayerNorm(x + bias + residual).

A program owns ROWS whole rows, reads each of them once into registers, and writes it normalised; statistics
are fp32, in two passes over the registers. x may be given as the partial sums of a split GEMM, which are
added on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruned_ops.ops.backends.gpu import refuse_hidden
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import RowConfig, next_power_of_2
from pruned_ops.ops.backends.triton.tiles import normalised
from pruned_ops.ops.backends.triton.tuning import best_row_config
from pruned_ops.ops.reference import check_add_layer_norm


@triton.jit(do_not_specialize=["tokens", "stride_part"])
def add_layer_norm_kernel(
    x, bias, residual, weight, norm_bias, out, tokens, hidden, eps, stride_x, stride_residual, stride_part,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (columns < hidden)[None, :]
    offsets = rows.to(tl.int64)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if RESIDUAL:
        pointers = residual + offsets * stride_residual + columns[None, :]
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        pointers = x + part * stride_part + offsets * stride_x + columns[None, :]
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    in_row = columns < hidden
    if BIAS:
        total += tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(weight + columns, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + columns, mask=in_row, other=0.0).to(tl.float32)
    result = normalised(total, inside, hidden, scale, shift, eps).to(out.dtype.element_ty)
    tl.store(out + offsets * hidden + columns[None, :], result, mask=inside)


def refuse(*args: object) -> str | None:
    return refuse_hidden(args[2]) or launch.refuse(*args)


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Launcher of the op; see reference.add_layer_norm."""
    check_add_layer_norm(x, bias, residual, norm_weight, norm_bias)
    config = best_row_config("add_layer_norm", residual, residual.size(0))
    return launch_add_layer_norm(x, bias, residual, norm_weight, norm_bias, eps, config)


def launch_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    config: RowConfig,
) -> Tensor:
    """Run the op with this configuration.

    x: (tokens, hidden), or partial sums (parts, tokens, hidden). residual: None if x contains it already."""
    x, residual = launch.rows(x), residual if residual is None else launch.rows(residual)
    tokens, hidden = x.shape[-2:]
    out = torch.empty((tokens, hidden), dtype=norm_weight.dtype, device=x.device)
    if out.numel() == 0:
        return out
    parts = x.size(0) if x.dim() == 3 else 1
    add_layer_norm_kernel[(triton.cdiv(tokens, config.rows),)](
        x, bias if bias is None else bias.contiguous(), residual, norm_weight.contiguous(),
        norm_bias.contiguous(), out, tokens, hidden, eps, x.stride(-2),
        0 if residual is None else residual.stride(0), x.stride(0) if x.dim() == 3 else 0,
        BIAS=bias is not None, RESIDUAL=residual is not None, PARTS=parts, ROWS=config.rows,
        BLOCK=next_power_of_2(hidden), num_warps=config.warps, **launch.OPTIONS,
    )  # fmt: skip
    return out
