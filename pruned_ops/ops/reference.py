"""Every op in plain PyTorch: the specification. Read it first.

These functions define what each op means, and their signatures are the ops' schemas. They are also the fake
kernels that torch.compile traces, and the fallback where no backend is willing; so they hold no
data-dependent control flow. The checks of shapes follow each op; those of values are run apart.
tokens: the rows of a packed batch, all sequences back to back. Weights are laid out as torch.nn.Linear has
them, unless an op says otherwise.
Sources: attention, Vaswani et al. 2017; erf-GELU, Hendrycks and Gimpel 2016; LayerNorm, Ba et al. 2016; the
post-LN layer they form, Devlin et al. 2018; rotary positions, Su et al. 2021; GEGLU, Shazeer 2020;
disentangled attention, He et al. 2021.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.ops.checks import (
    check_bounds,
    check_cu_seqlens,
    check_distance_rows,
    check_ids,
    check_matrix,
    check_position_bias,
    check_positions,
    check_relative,
    check_rising,
    check_vector,
)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> Tensor:
    """Compute softmax attention within each sequence of a packed batch.

    qkv (tokens, 3 * num_heads * head_dim), laid out q|k|v. cu_seqlens int32 (batch + 1,): sequence i holds
    the rows cu_seqlens[i] to cu_seqlens[i + 1]. max_seqlen: no sequence is longer. Returns (tokens,
    num_heads * head_dim).
    The scale is 1 / sqrt(head_dim * products), of which there is one without position_key and position_query.
    0 heads, 0 tokens and empty sequences are allowed. Rows that belong to no sequence, where a backend does
    not check cu_seqlens, hold undefined values.

    positions int32 (tokens,): each token's place in its sequence, rising within it; by default 0, 1, 2 and so
    on. The rest depends on them alone:
    rotary (head_dim / 2,): inverse frequencies. Query and key are rotated by position * frequency, in planes
    of the channels i and i + head_dim / 2 (Su et al. 2021, as GPT-NeoX pairs channels).
    window: the largest distance of a key from its query, None for any.
    position_bias (num_heads, 2 * reach + 1): what is added to the scaled scores, by the key's position less
    the query's, from -reach to reach; farther keys take the outermost columns.
    position_key, position_query (num_heads, rows, head_dim): by what each query, and each key, is multiplied
    besides, in the row of their distance (He et al. 2021); the products are added. distance_rows int32
    (2 * reach + 1,): the row, by the key's position less the query's as above; it never falls.
    """
    check_attention(
        *(qkv, cu_seqlens, max_seqlen, head_dim, positions, rotary, window, position_bias),
        *(position_key, position_query, distance_rows),
    )
    tokens, width = qkv.size(0), qkv.size(1) // 3
    num_heads, batch = width // head_dim, cu_seqlens.size(0) - 1
    # While this is traced the number of tokens may be unknown; the shape returned is the same without this.
    if num_heads == 0 or max_seqlen == 0 or (isinstance(tokens, int) and tokens == 0):
        return qkv.new_zeros(tokens, width)
    if isinstance(tokens, int) and isinstance(max_seqlen, int):  # not where they are unknown
        max_seqlen = min(max_seqlen, tokens)
    # The sequence that each token belongs to, and its place there.
    token = torch.arange(tokens, device=qkv.device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True).clamp(max=batch - 1)
    place = (token - starts[sequence]).clamp(0, max_seqlen - 1)
    position = place if positions is None else positions.long()
    if rotary is not None:
        qkv = _rotated(qkv, position, rotary)
    # The batch, padded: row (i, j) is token j of sequence i, or another sequence's token where i has no j.
    # Such a key scores -infinity, and its value becomes 0: not even NaN may come from another sequence.
    column = torch.arange(max_seqlen, device=qkv.device)
    rows = (starts[:, None] + column).clamp(max=tokens - 1)
    real = column < lengths[:, None]
    padded = qkv[rows].view(batch, max_seqlen, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = padded[0], padded[1], padded[2]
    distance = position[rows][:, None, :] - position[rows][:, :, None]
    scores, products = query @ key.transpose(-1, -2), 1
    if distance_rows is not None:
        reach = distance_rows.size(0) // 2
        row = distance_rows.long()[distance.clamp(-reach, reach) + reach][:, None].expand(scores.shape)
        if position_key is not None:
            products += 1
            scores = scores + (query @ position_key.transpose(1, 2).to(query.dtype)).gather(-1, row)
        if position_query is not None:
            products += 1
            of_keys = key @ position_query.transpose(1, 2).to(key.dtype)
            scores = scores + of_keys.gather(-1, row.transpose(-1, -2)).transpose(-1, -2)
    scores = scores * (head_dim * products) ** -0.5
    if position_bias is not None:
        reach = position_bias.size(1) // 2
        bias = position_bias[:, distance.clamp(-reach, reach) + reach].transpose(0, 1)
        scores = scores + bias.to(scores.dtype)
    attended = real[:, None, :] if window is None else real[:, None, :] & (distance.abs() <= window)
    scores = scores.masked_fill(~attended[:, None], -torch.inf)
    value = value.masked_fill(~real[:, None, :, None], 0)
    context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, max_seqlen, width)
    return context[sequence, place]  # packed again


def _rotated(qkv: Tensor, position: Tensor, rotary: Tensor) -> Tensor:
    """Rotate query and key of each token by its position. position (tokens,), rotary (head_dim / 2,)."""
    angle = position[:, None].to(rotary.dtype) * rotary
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    heads = qkv.view(qkv.size(0), -1, 2, rotary.size(0))
    count = heads.size(1) // 3 * 2
    first, second = heads[:, :count, 0], heads[:, :count, 1]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 2).to(qkv.dtype)
    return torch.cat([turned, heads[:, count:]], 1).view(qkv.shape)


def check_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> None:
    """Raise RuntimeError, naming the argument, unless shapes and sizes are those of `attention`."""
    check_matrix("attention", "qkv", qkv)
    torch._check(max_seqlen >= 0, lambda: f"attention: max_seqlen is {max_seqlen}, at least 0 is needed")
    torch._check(head_dim > 0, lambda: f"attention: head_dim is {head_dim}, it must be positive")
    torch._check(
        qkv.size(1) % (3 * head_dim) == 0,
        lambda: f"attention: qkv has {qkv.size(1)} columns, not a multiple of 3 * head_dim (3 * {head_dim})",
    )
    check_cu_seqlens("attention", cu_seqlens)
    if positions is not None:
        check_positions("attention", positions, qkv.size(0))
    if rotary is not None:
        torch._check(
            head_dim % 2 == 0,
            lambda: f"attention: head_dim is {head_dim}, and rotary takes channels in pairs",
        )
        check_vector("attention", "rotary", rotary, head_dim // 2)
    if window is not None:
        torch._check(window >= 0, lambda: f"attention: window is {window}, at least 0 is needed")
    num_heads = qkv.size(1) // (3 * head_dim)
    if position_bias is not None:
        check_position_bias("attention", position_bias, num_heads)
    by_distance = [("position_key", position_key), ("position_query", position_query)]
    check_relative("attention", by_distance, distance_rows, (num_heads, None, head_dim))


def check_attention_values(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    distance_rows: Tensor | None = None,
) -> None:
    """Raise RuntimeError unless the arguments have the shapes of `attention`, cu_seqlens rises from 0 to the
    tokens in steps of at most max_seqlen, positions rise within each sequence, and distance_rows are rows
    that never fall."""
    check_attention(
        *(qkv, cu_seqlens, max_seqlen, head_dim, positions, rotary, window, position_bias),
        *(position_key, position_query, distance_rows),
    )
    check_bounds("attention", qkv, cu_seqlens, max_seqlen)
    check_rising("attention", cu_seqlens, positions)
    for rows in (position_key, position_query):
        if rows is not None:
            check_distance_rows("attention", distance_rows, rows.size(1))


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
    check_matrix("linear_gelu", "weight", weight)
    check_matrix("linear_gelu", "x", x, weight.size(1))
    check_vector("linear_gelu", "bias", bias, weight.size(0))


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(x gate^T + gate_bias) * (x up^T + up_bias) in the exact erf form (Shazeer 2020).

    x (tokens, in), weight (2 * width, in), bias (2 * width,) -> (tokens, width). The first `width` rows are
    those of the gate, whose products are activated; unit i of the width has the rows i and width + i.
    """
    check_linear_geglu(x, weight, bias)
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return F.gelu(gate) * up


def check_linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise RuntimeError, naming the argument, unless the shapes are those of `linear_geglu`."""
    check_matrix("linear_geglu", "weight", weight)
    torch._check(
        weight.size(0) % 2 == 0,
        lambda: f"linear_geglu: weight has {weight.size(0)} rows, two for each unit are needed",
    )
    check_matrix("linear_geglu", "x", x, weight.size(1))
    check_vector("linear_geglu", "bias", bias, weight.size(0))


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
    check_matrix("add_layer_norm", "residual", residual)
    check_matrix("add_layer_norm", "x", x, residual.size(1))
    torch._check(
        x.size(0) == residual.size(0),
        lambda: f"add_layer_norm: x has {x.size(0)} rows, residual has {residual.size(0)}",
    )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_vector("add_layer_norm", name, tensor, residual.size(1))
    if bias is not None:
        check_vector("add_layer_norm", "bias", bias, residual.size(1))


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
    check_matrix("linear_add_layer_norm", "weight", weight)
    check_matrix("linear_add_layer_norm", "x", x, weight.size(1))


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
    check_matrix("embed_layer_norm", "word", word)
    check_ids("embed_layer_norm", "input_ids", input_ids)
    for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        check_ids("embed_layer_norm", name, ids)
        check_vector("embed_layer_norm", name, ids, input_ids.size(0))
    for name, table in (("position", position), ("token_type", token_type)):
        check_matrix("embed_layer_norm", name, table, word.size(1))
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_vector("embed_layer_norm", name, tensor, word.size(1))


def check_embed_layer_norm_values(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
) -> None:  # fmt: skip
    """Raise IndexError, naming the ids, if any of them lies outside its table; RuntimeError, naming the
    argument, unless the shapes are those of `embed_layer_norm`."""
    check_embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias
    )
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
