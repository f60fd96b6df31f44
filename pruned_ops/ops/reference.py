"""Every op in plain PyTorch: the specification. Read it first.

These functions define what each op means, and their signatures are the ops' schemas. They are also the fake
kernels that torch.compile traces, and the fallback where no backend is willing; so they hold no
data-dependent control flow. The checks of shapes follow each op; those of values are run apart.
tokens: the rows of a packed batch, all sequences back to back. Weights are laid out as torch.nn.Linear has
them, unless an op says otherwise.
Sources: attention, Vaswani et al. 2017; erf-GELU, Hendrycks and Gimpel 2016; LayerNorm, Ba et al. 2016; the
post-LN layer they form, Devlin et al. 2018.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.ops.panels import (
    GROUP,
    PAIR,
    PANEL,
    PART_TENSORS,
    bf16_linear,
    from_panels,
    inner_width,
    int8_linear,
    is_attention,
)


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> Tensor:
    """Compute softmax attention within each sequence of a packed batch.

    qkv (tokens, 3 * num_heads * head_dim), laid out q|k|v. cu_seqlens int32 (batch + 1,): sequence i holds
    the rows cu_seqlens[i] to cu_seqlens[i + 1]. max_seqlen: no sequence is longer. Returns (tokens,
    num_heads * head_dim).
    The scale is 1 / sqrt(head_dim). 0 heads, 0 tokens and empty sequences are allowed. Rows that belong to no
    sequence, where a backend does not check cu_seqlens, hold undefined values.
    """
    check_attention(qkv, cu_seqlens, max_seqlen, head_dim)
    tokens, width = qkv.size(0), qkv.size(1) // 3
    num_heads, batch = width // head_dim, cu_seqlens.size(0) - 1
    # While this is traced the number of tokens may be unknown; the shape returned is the same without this.
    if num_heads == 0 or max_seqlen == 0 or (isinstance(tokens, int) and tokens == 0):
        return qkv.new_zeros(tokens, width)
    if isinstance(tokens, int) and isinstance(max_seqlen, int):  # not where they are unknown
        max_seqlen = min(max_seqlen, tokens)
    # The batch, padded: row (i, j) is token j of sequence i, or another sequence's token where i has no j.
    # Such a key scores -infinity, and its value becomes 0: not even NaN may come from another sequence.
    column = torch.arange(max_seqlen, device=qkv.device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    rows = (starts[:, None] + column).clamp(max=tokens - 1)
    real = column < lengths[:, None]
    padded = qkv[rows].view(batch, max_seqlen, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = padded[0], padded[1], padded[2]
    scores = query @ key.transpose(-1, -2) * head_dim**-0.5
    scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
    value = value.masked_fill(~real[:, None, :, None], 0)
    context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, max_seqlen, width)
    # Packed again, by the sequence that each token belongs to and its place there.
    token = torch.arange(tokens, device=qkv.device)
    sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True).clamp(max=batch - 1)
    place = (token - starts[sequence]).clamp(0, max_seqlen - 1)
    return context[sequence, place]


def check_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> None:
    """Raise RuntimeError, naming the argument, unless shapes and sizes are those of `attention`."""
    _check_matrix("attention", "qkv", qkv)
    torch._check(max_seqlen >= 0, lambda: f"attention: max_seqlen is {max_seqlen}, at least 0 is needed")
    torch._check(head_dim > 0, lambda: f"attention: head_dim is {head_dim}, it must be positive")
    torch._check(
        qkv.size(1) % (3 * head_dim) == 0,
        lambda: f"attention: qkv has {qkv.size(1)} columns, not a multiple of 3 * head_dim (3 * {head_dim})",
    )
    torch._check(
        cu_seqlens.dim() == 1 and cu_seqlens.size(0) > 0 and cu_seqlens.dtype == torch.int32,
        lambda: (
            f"attention: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, int32 (batch + 1,) "
            "is needed"
        ),
    )


def check_attention_values(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> None:
    """Raise RuntimeError unless cu_seqlens rises from 0 to the tokens in steps of at most max_seqlen."""
    _check_bounds("attention", qkv, cu_seqlens, max_seqlen)


def check_encoder_values(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: object) -> None:
    """Raise RuntimeError unless cu_seqlens is as `attention` takes it."""
    _check_bounds("encoder", x, cu_seqlens, max_seqlen)


def _check_bounds(op: str, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    _check_matrix(op, {"attention": "qkv", "encoder": "x"}[op], rows)
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if (
        int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != rows.size(0)
        or (lengths < 0).any()
        or longest > max_seqlen
    ):
        raise RuntimeError(
            f"{op}: cu_seqlens must rise from 0 to the {rows.size(0)} tokens in steps of at most "
            f"max_seqlen = {max_seqlen}; it is {cu_seqlens.tolist()}"
        )


def with_longest(rows: Tensor, cu_seqlens: Tensor, max_seqlen: int, *others: Any) -> tuple[Any, ...]:
    """The arguments of `attention` or `encoder` with the longest sequence's real length as max_seqlen: the
    reference pads to it."""
    lengths = cu_seqlens.diff()
    return rows, cu_seqlens, int(lengths.max()) if lengths.numel() else 0, *others


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(x weight^T + bias) in the exact erf form.

    x (tokens, in), weight (out, in), bias (out,) -> (tokens, out).
    On a CPU the product is torch's, which may split the sums over `in` among its threads, and whose order of
    additions depends on how the tensors are aligned. So the same tensors give the same bits for the same
    number of threads; other places in memory or numbers of threads may round differently, within the error
    budget. This is true of linear_add_layer_norm too. The other ops always have the same bits.
    """
    check_linear_gelu(x, weight, bias)
    return F.gelu(F.linear(x, weight, bias))


def check_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise RuntimeError, naming the argument, unless the shapes are those of `linear_gelu`."""
    _check_matrix("linear_gelu", "weight", weight)
    _check_matrix("linear_gelu", "x", x, weight.size(1))
    _check_vector("linear_gelu", "bias", bias, weight.size(0))


def add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Compute LayerNorm(x + bias + residual).

    x, residual (tokens, hidden); bias, norm_weight, norm_bias (hidden,) -> (tokens, hidden).
    """
    check_add_layer_norm(x, bias, residual, norm_weight, norm_bias)
    if bias is not None:
        x = x + bias
    return F.layer_norm(x + residual, (residual.size(1),), norm_weight, norm_bias, eps)


def check_add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> None:
    """Raise RuntimeError, naming the argument, unless the shapes are those of `add_layer_norm`."""
    _check_matrix("add_layer_norm", "residual", residual)
    _check_matrix("add_layer_norm", "x", x, residual.size(1))
    torch._check(
        x.size(0) == residual.size(0),
        lambda: f"add_layer_norm: x has {x.size(0)} rows, residual has {residual.size(0)}",
    )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check_vector("add_layer_norm", name, tensor, residual.size(1))
    if bias is not None:
        _check_vector("add_layer_norm", "bias", bias, residual.size(1))


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Compute LayerNorm(x weight^T + bias + residual).

    x (tokens, in), weight (hidden, in), residual (tokens, hidden); bias, norm_weight, norm_bias (hidden,) ->
    (tokens, hidden).
    """
    check_linear_add_layer_norm(x, weight)
    return add_layer_norm(F.linear(x, weight), bias, residual, norm_weight, norm_bias, eps)


def check_linear_add_layer_norm(x: Tensor, weight: Tensor) -> None:
    """Raise RuntimeError, naming the argument, unless x and weight can be multiplied."""
    _check_matrix("linear_add_layer_norm", "weight", weight)
    _check_matrix("linear_add_layer_norm", "x", x, weight.size(1))


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Compute LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]).

    ids int32 or int64 (tokens,); tables (rows, hidden); norm_weight, norm_bias (hidden,) -> (tokens, hidden).
    The order of the sum is BERT's.
    """
    check_embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias
    )
    total = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
    total = total + F.embedding(position_ids, position)
    return F.layer_norm(total, (word.size(1),), norm_weight, norm_bias, eps)


def check_embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> None:
    """Raise RuntimeError, naming the argument, unless the shapes are those of `embed_layer_norm`."""
    _check_matrix("embed_layer_norm", "word", word)
    for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        _check_vector("embed_layer_norm", name, ids, input_ids.size(0))
    for name, table in (("position", position), ("token_type", token_type)):
        _check_matrix("embed_layer_norm", name, table, word.size(1))
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check_vector("embed_layer_norm", name, tensor, word.size(1))


def check_embed_layer_norm_values(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, *_: object,
) -> None:  # fmt: skip
    """Raise IndexError, naming the ids, if any of them lies outside its table."""
    _check_ids("input_ids", input_ids, word.size(0))
    _check_ids("position_ids", position_ids, position.size(0))
    _check_ids("token_type_ids", token_type_ids, token_type.size(0))


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= rows:
        raise IndexError(
            f"embed_layer_norm: {name} holds {low if low < 0 else high}; its table has {rows} rows"
        )


def encoder(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor],
    widths: Sequence[int],
    head_dim: int,
    eps: float,
) -> Tensor:
    """Run a stack of post-LN parts, attentions and FFNs in any order. (tokens, hidden) -> (tokens, hidden).

    widths: one integer per part, `attention_part(num_heads)` or `ffn_part(width)` of panels.py.
    weights: six tensors per part: panels and bias of its first linear (q|k|v, or FFN up), panels and bias of
    its second linear, weight and bias of its LayerNorm. The panels are those of panels.py, in fp32, bfloat16
    or int8. With bfloat16 panels the linear's input is rounded to bfloat16 and the sums are fp32. With int8
    panels the bias is (2, out), and its second row holds the scales. All else is in fp32.
    cu_seqlens, max_seqlen, head_dim: as in `attention`. The FFN's activation is the exact GELU.
    """
    _check_matrix("encoder", "x", x)
    torch._check(
        len(weights) == PART_TENSORS * len(widths),
        lambda: (
            f"encoder: weights has {len(weights)} tensors, {PART_TENSORS} for each of {len(widths)} parts"
        ),
    )
    for i, part in enumerate(widths):
        first, first_bias, second, second_bias, *norm = weights[PART_TENSORS * i : PART_TENSORS * (i + 1)]
        inner = inner_width(part, head_dim)
        if is_attention(part):
            qkv = _panel_linear("first", x, first, first_bias, 3 * inner)
            middle = attention(qkv, cu_seqlens, max_seqlen, head_dim)
        else:
            middle = F.gelu(_panel_linear("first", x, first, first_bias, inner))
        middle = _panel_linear("second", middle, second, second_bias, x.size(1))
        x = F.layer_norm(middle + x, (x.size(1),), norm[0], norm[1], eps)
    return x.clone() if not widths else x


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
        _check_vector("encoder", f"{name} bias", bias, out)
        if is_bf16:
            return bf16_linear(x, panels, bias)
        return F.linear(x, from_panels(panels, out), bias)
    torch._check(
        tuple(bias.shape) == (2, out),
        lambda: f"encoder: {name} bias has shape {tuple(bias.shape)}, bias and scales (2, {out}) are needed",
    )
    return int8_linear(x, panels, bias)


def _check_matrix(op: str, name: str, tensor: Tensor, columns: int | None = None) -> None:
    torch._check(tensor.dim() == 2, lambda: f"{op}: {name} has {tensor.dim()} dimensions, 2 are needed")
    if columns is not None:
        torch._check(
            tensor.size(1) == columns,
            lambda: f"{op}: {name} has {tensor.size(1)} columns, {columns} are needed",
        )


def _check_vector(op: str, name: str, tensor: Tensor, size: int) -> None:
    torch._check(
        tensor.dim() == 1 and tensor.size(0) == size,
        lambda: f"{op}: {name} has shape {tuple(tensor.shape)}, ({size},) is needed",
    )
