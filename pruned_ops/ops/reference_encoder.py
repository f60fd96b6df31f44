"""The reference of op `encoder`: a stack of attentions and FFNs, on weights that are laid out as panels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.ops.checks import (
    check_bounds,
    check_cu_seqlens,
    check_distance_rows,
    check_matrix,
    check_position_bias,
    check_positions,
    check_relative,
    check_rising,
    check_vector,
)
from pruned_ops.ops.panels import (
    GROUP,
    PAIR,
    PANEL,
    PART_TENSORS,
    bf16_linear,
    from_head_panels,
    from_panels,
    gated_out,
    inner_width,
    int8_linear,
    is_attention,
    ungated,
)
from pruned_ops.ops.reference import attention


def encoder(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor],
    widths: Sequence[int],
    head_dim: int,
    eps: float,
    norm_first: bool = False,
    gated: bool = False,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    windows: Sequence[int] | None = None,
    position_bias: Tensor | None = None,
    final_norm: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> Tensor:
    """Run a stack of parts, attentions and FFNs in any order. (tokens, hidden) -> (tokens, hidden).

    widths: one integer per part, `attention_part(num_heads)` or `ffn_part(width)` of panels.py.
    weights: six tensors per part: panels and bias of its first linear (q|k|v, or FFN up), panels and bias of
    its second linear, weight and bias of its LayerNorm. The panels are those of panels.py, in fp32, bfloat16
    or int8. With bfloat16 panels the linear's input is rounded to bfloat16 and the sums are fp32. With int8
    panels the bias is (2, out), and its second row holds the scales. All else is in fp32.
    cu_seqlens, max_seqlen, head_dim, positions: as in `attention`. The FFN's activation is the exact GELU.

    norm_first: a part is x + part(LayerNorm(x)) and not LayerNorm(x + part(x)). A LayerNorm of empty tensors
    then leaves x as it is. final_norm (2, hidden): weight and bias of a LayerNorm after the last part.
    gated: the FFNs are `linear_geglu`'s; rows and bias of their first linear lie as `gated_rows` orders them.
    rotary (parts, head_dim / 2): the inverse frequencies of each attention; a row of zeros rotates nothing.
    windows: the window of each attention, -1 for none. position_bias (heads, 2 * reach + 1): the rows of all
    attentions, one after the other. The entries of FFNs among rotary and windows are not read.
    position_keys, position_queries (heads, panels, head_dim, 32): `attention`'s, of all attentions, with the
    rows of each head as fp32 panels. distance_rows: as in `attention`, for all of them.
    """
    check_encoder(
        *(x, cu_seqlens, weights, widths, head_dim, positions, rotary, windows, position_bias, final_norm),
        *(position_keys, position_queries, distance_rows),
    )
    heads = 0  # of the attentions so far
    for i, part in enumerate(widths):
        first, first_bias, second, second_bias, *norm = weights[PART_TENSORS * i : PART_TENSORS * (i + 1)]
        inner = inner_width(part, head_dim)
        taken = _layer_norm(x, norm[0], norm[1], eps) if norm_first and norm[0].numel() else x
        if is_attention(part):
            own_heads = slice(heads, heads + part)
            qkv = _panel_linear("first", taken, first, first_bias, 3 * inner)
            middle = attention(
                qkv,
                cu_seqlens,
                max_seqlen,
                head_dim,
                positions,
                None if rotary is None else rotary[i],
                None if windows is None or windows[i] < 0 else windows[i],
                None if position_bias is None else position_bias[own_heads],
                None if position_keys is None else from_head_panels(position_keys[own_heads]),
                None if position_queries is None else from_head_panels(position_queries[own_heads]),
                distance_rows,
            )
            heads += part
        elif gated:
            gate, up = ungated(_panel_linear("first", taken, first, first_bias, gated_out(inner)), inner)
            middle = F.gelu(gate) * up
        else:
            middle = F.gelu(_panel_linear("first", taken, first, first_bias, inner))
        middle = _panel_linear("second", middle, second, second_bias, x.size(1))
        x = middle + x  # in this order: a sum lies as its first operand does, by rows whatever x's layout
        x = x if norm_first else _layer_norm(x, norm[0], norm[1], eps)
    if final_norm is not None:
        return _layer_norm(x, final_norm[0], final_norm[1], eps)
    return x.clone(memory_format=torch.contiguous_format) if not widths else x


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.size(1),), weight, bias, eps)


def check_encoder(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    widths: Sequence[int],
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    windows: Sequence[int] | None = None,
    position_bias: Tensor | None = None,
    final_norm: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> None:
    """Raise RuntimeError, naming the argument, unless there is for each part what `encoder` reads."""
    check_matrix("encoder", "x", x)
    check_cu_seqlens("encoder", cu_seqlens)
    parts = len(widths)
    torch._check(
        len(weights) == PART_TENSORS * parts,
        lambda: f"encoder: weights has {len(weights)} tensors, {PART_TENSORS} for each of {parts} parts",
    )
    if positions is not None:
        check_positions("encoder", positions, x.size(0))
    if rotary is not None:
        torch._check(
            tuple(rotary.shape) == (parts, head_dim // 2) and head_dim % 2 == 0,
            lambda: (
                f"encoder: rotary has shape {tuple(rotary.shape)}, ({parts}, head_dim / 2) is needed, a row "
                f"for each part, where head_dim is {head_dim}"
            ),
        )
    if windows is not None:
        torch._check(
            len(windows) == parts,
            lambda: f"encoder: windows has {len(windows)} numbers, one for each of {parts} parts is needed",
        )
    heads = sum(part for part in widths if is_attention(part))
    if position_bias is not None:
        check_position_bias("encoder", position_bias, heads)
    by_distance = [("position_keys", position_keys), ("position_queries", position_queries)]
    check_relative("encoder", by_distance, distance_rows, (heads, None, head_dim, PANEL))
    if final_norm is not None:
        torch._check(
            tuple(final_norm.shape) == (2, x.size(1)),
            lambda: (
                f"encoder: final_norm has shape {tuple(final_norm.shape)}, weight and bias (2, {x.size(1)}) "
                "are needed"
            ),
        )


def _panel_linear(name: str, x: Tensor, panels: Tensor, bias: Tensor, out: int) -> Tensor:
    """x (rows, in) times a weight in panels, plus bias: (rows, out), by the dtype of the panels."""
    is_int8, is_bf16 = panels.dtype == torch.int8, panels.dtype == torch.bfloat16
    count, inputs = -(-out // PANEL), x.size(1)
    shape = (count, inputs, PANEL)
    if is_int8:
        shape = (count, 1 + -(-inputs // GROUP), GROUP * PANEL)
    elif is_bf16:
        shape = (count, -(-inputs // PAIR), PAIR * PANEL)
    torch._check(
        tuple(panels.shape) == shape,
        lambda: f"encoder: {name} weight has shape {tuple(panels.shape)}, panels {shape} are needed",
    )
    if not is_int8:
        check_vector("encoder", f"{name} bias", bias, out)
        if is_bf16:
            return bf16_linear(x, panels, bias)
        return F.linear(x, from_panels(panels, out), bias)
    torch._check(
        tuple(bias.shape) == (2, out),
        lambda: f"encoder: {name} bias has shape {tuple(bias.shape)}, bias and scales (2, {out}) are needed",
    )
    return int8_linear(x, panels, bias)


def check_encoder_values(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor],
    widths: Sequence[int],
    head_dim: int,
    eps: float,
    norm_first: bool = False,
    gated: bool = False,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    windows: Sequence[int] | None = None,
    position_bias: Tensor | None = None,
    final_norm: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> None:
    """Raise RuntimeError unless there is for each part what `encoder` reads, and cu_seqlens, positions and
    distance_rows are as `attention` takes them."""
    check_encoder(
        *(x, cu_seqlens, weights, widths, head_dim, positions, rotary, windows, position_bias, final_norm),
        *(position_keys, position_queries, distance_rows),
    )
    check_bounds("encoder", x, cu_seqlens, max_seqlen)
    check_rising("encoder", cu_seqlens, positions)
    for panels in (position_keys, position_queries):
        if panels is not None:
            check_distance_rows("encoder", distance_rows, panels.size(1) * PANEL)
