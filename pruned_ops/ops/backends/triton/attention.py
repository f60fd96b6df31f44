"""Op `attention`: softmax attention within each sequence of a packed batch.

A program owns one head of BLOCK_M query rows of one sequence, or of several whole short sequences. It keeps
the queries, the running maximum, sum and context in registers while it walks the sequence's keys (flash
attention's online softmax, in powers of 2), and writes the rows' context.

With a window it walks only the blocks of keys that meet the window of its rows: positions rise, so that a
key is at least as far by its position as by its place. A bias by position is looked up for each score, within
a window that holds all keys: without one, Triton loads the biases ahead, and their addresses take 40
registers more. Both are constants of the kernels, which without them are those of BERT. Query and key are
rotated beforehand, by a kernel of its own (rotary.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from pruned_ops.ops.backends.gpu import refuse_by_distance
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import AttentionConfig, by_position_config
from pruned_ops.ops.backends.triton.rotary import rotated
from pruned_ops.ops.backends.triton.tiles import product
from pruned_ops.ops.backends.triton.tuning import best_attention_config
from pruned_ops.ops.reference import check_attention
from pruned_ops.ops.registry import is_given_up

HEAD_DIMS = (16, 32, 64, 128)
# The largest window, which holds all keys of sequences whose positions end before it.
FARTHEST = 1 << 27
# What lies between the positions of sequences that share a program (four at most, see configs.SHORT), so that
# none is in another's window.
APART = tl.constexpr(1 << 29)
# The position of a key that is none: outside of every window.
NOWHERE = tl.constexpr(-(1 << 31))
LOG2_E = 1.4426950408889634
# The least fp32 number: where a running maximum begins.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _scores(query, key, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    zeros = tl.zeros((query.shape[0], key.shape[1]), tl.float32)
    return product(query, key, zeros, PRECISION, UPCAST)


@triton.jit
def _absorb(scores, scale, value, context, maximum, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Add one block of keys to the running softmax. Masked scores are -inf; the maximum is finite. It is
    subtracted first: a product with the scale is rounded, of large scores by more than an exponent can
    hold."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2((scores - highest[:, None]) * scale)
    shrink = tl.exp2((maximum - highest) * scale)
    total = total * shrink + tl.sum(weights, 1)
    context = product(weights.to(value.dtype), value, context * shrink[:, None], PRECISION, UPCAST)
    return context, highest, total


@triton.jit
def _by_position(
    scores, query_position, key_position, bias, window, reach, HEAD_DIM: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Scores with the head's bias by position added (scaled as they are), and -inf outside of the window."""
    if BIAS:
        distance = key_position[None, :] - query_position[:, None]
        column = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        scores += tl.load(bias + column).to(tl.float32) * HEAD_DIM**0.5
    # Counted from where the window begins, what lies before that is a large unsigned number.
    place = (key_position[None, :] - (query_position - window)[:, None]).to(tl.uint32, bitcast=True)
    return tl.where(place <= (2 * window).to(tl.uint32), scores, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "batch", "tiles", "window", "reach"])
def attention_kernel(
    qkv, cu_seqlens, positions, bias, out, tokens, batch, width, tiles, scale, window, reach,
    stride_qkv, stride_out,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    POSITIONS: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """For long sequences. Each has `tiles` programs, of which those beyond its end have nothing to do.

    All blocks of keys are masked, so that the last one, which is seldom whole, is loaded ahead in the one
    loop like the others."""
    sequence, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    # Clamped: a wrong cu_seqlens must never lead outside the tensors.
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), tokens)
    if begin + tile * BLOCK_M >= end:
        return
    columns = tl.program_id(1) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    rows = begin + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = rows.to(tl.int64)[:, None]
    query = tl.load(qkv + offsets * stride_qkv + columns[None, :], mask=(rows < end)[:, None], other=0.0)
    lanes = tl.arange(0, BLOCK_N)
    length = end - begin
    first_key, end_key = 0, length
    if WINDOW:
        first_key = tl.maximum(tile * BLOCK_M - window, 0)
        end_key = tl.minimum((tile + 1) * BLOCK_M + window, length)
        query_position = rows - begin
        if POSITIONS:
            query_position = tl.load(positions + rows, mask=rows < end, other=0)
        if BIAS:
            bias += tl.program_id(1) * (2 * reach + 1)
    start = (begin + first_key + lanes).to(tl.int64) * stride_qkv
    keys = qkv + width + start[None, :] + columns[:, None]
    values = qkv + 2 * width + start[:, None] + columns[None, :]
    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    context = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for first in range(first_key, end_key, BLOCK_N):
        inside = first + lanes < end_key
        scores = _scores(query, tl.load(keys, mask=inside[None, :], other=0.0), PRECISION, UPCAST)
        if WINDOW:
            key_position = first + lanes
            if POSITIONS:
                key_position = tl.load(positions + begin + key_position, mask=inside, other=NOWHERE)
            else:
                key_position = tl.where(inside, key_position, NOWHERE)
            scores = _by_position(scores, query_position, key_position, bias, window, reach, HEAD_DIM, BIAS)
        else:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        value = tl.load(values, mask=inside[:, None], other=0.0)
        context, maximum, total = _absorb(scores, scale, value, context, maximum, total, PRECISION, UPCAST)
        keys += BLOCK_N * stride_qkv
        values += BLOCK_N * stride_qkv
    if WINDOW:
        total = tl.where(rows < end, total, 1.0)  # rows beyond the end may have no key in their window
    result = (context / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + offsets * stride_out + columns[None, :], result, mask=(rows < end)[:, None])


@triton.jit(do_not_specialize=["tokens", "batch", "window", "reach"])
def short_attention_kernel(
    qkv, cu_seqlens, positions, bias, out, tokens, batch, width, scale, window, reach, stride_qkv, stride_out,
    HEAD_DIM: tl.constexpr, SEGMENT: tl.constexpr, SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    POSITIONS: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """For sequences of at most SEGMENT tokens. A program owns SEQUENCES of them, masked from each other."""
    lanes = tl.arange(0, SEGMENT * SEQUENCES)
    sequence = tl.program_id(0) * SEQUENCES + lanes // SEGMENT
    in_batch = sequence < batch
    begin = tl.load(cu_seqlens + sequence, mask=in_batch, other=0)
    end = tl.load(cu_seqlens + sequence + 1, mask=in_batch, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    end = tl.minimum(tl.maximum(end, begin), tokens)
    rows = begin + lanes % SEGMENT
    inside = rows < end
    columns = tl.program_id(1) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    offsets = rows.to(tl.int64)
    across = qkv + offsets[:, None] * stride_qkv + columns[None, :]
    query = tl.load(across, mask=inside[:, None], other=0.0)
    keys = qkv + width + offsets[None, :] * stride_qkv + columns[:, None]
    key = tl.load(keys, mask=inside[None, :], other=0.0)
    scores = _scores(query, key, PRECISION, UPCAST)
    if WINDOW:
        position = lanes % SEGMENT
        if POSITIONS:
            position = tl.load(positions + rows, mask=inside, other=0)
        if BIAS:
            bias += tl.program_id(1) * (2 * reach + 1)
        position += lanes // SEGMENT * APART
        key_position = tl.where(inside, position, NOWHERE)
        scores = _by_position(scores, position, key_position, bias, window, reach, HEAD_DIM, BIAS)
    else:
        same_sequence = (lanes // SEGMENT)[:, None] == (lanes // SEGMENT)[None, :]
        scores = tl.where(same_sequence & inside[None, :], scores, float("-inf"))
    value = tl.load(across + 2 * width, mask=inside[:, None], other=0.0)
    highest = tl.maximum(tl.max(scores, 1), LOWEST)
    weights = tl.exp2((scores - highest[:, None]) * scale)
    total = tl.where(inside, tl.sum(weights, 1), 1.0)  # lanes beyond their sequence's end have no keys
    weights = weights.to(value.dtype)
    zeros = tl.zeros((SEGMENT * SEQUENCES, HEAD_DIM), tl.float32)
    context = product(weights, value, zeros, PRECISION, UPCAST)
    if tl.sum((value - value != 0).to(tl.int32)) > 0:
        # A weight of 0 times NaN or infinity is NaN: so each sequence takes its own values alone.
        for i in range(SEQUENCES):
            alone = (lanes // SEGMENT == i)[:, None]
            own_context = product(weights, tl.where(alone, value, 0.0), zeros, PRECISION, UPCAST)
            context = tl.where(alone, own_context, context)
    result = (context / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + offsets[:, None] * stride_out + columns[None, :], result, mask=inside[:, None])


def refuse(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
    *by_distance: Tensor | None,
) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, the kernel takes {', '.join(map(str, HEAD_DIMS))}"
    if (refusal := refuse_by_distance(*by_distance)) is not None:
        return refusal
    # Frequencies are in fp32 beside whatever dtype.
    return launch.refuse(qkv, cu_seqlens, positions, position_bias) or launch.refuse(cu_seqlens, rotary)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    positions: Tensor | None = None,
    rotary: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
    *by_distance: Tensor | None,
) -> Tensor:
    """Launcher of the op; see reference.attention. Where the caller has given qkv up, query and key are
    rotated in it. by_distance: what `refuse` refuses."""
    check_attention(qkv, cu_seqlens, max_seqlen, head_dim, positions, rotary, window, position_bias)
    tokens, width = qkv.size(0), qkv.size(1) // 3
    if tokens == 0 or width == 0 or max_seqlen == 0:
        return qkv.new_zeros(tokens, width)
    max_seqlen = min(max_seqlen, tokens)  # no sequence is longer; there is a program for each part of it
    if window is None and position_bias is None:
        config = best_attention_config(qkv, max_seqlen, head_dim)
    else:
        config = by_position_config(max_seqlen, head_dim, qkv.dtype)
    by_position = positions, window, position_bias
    if rotary is None:
        return launch_attention(qkv, cu_seqlens, max_seqlen, head_dim, config, *by_position)
    in_place = is_given_up(qkv)
    qkv = rotated(qkv, cu_seqlens, positions, rotary, in_place)
    try:
        return launch_attention(qkv, cu_seqlens, max_seqlen, head_dim, config, *by_position)
    except TritonError as error:
        if not in_place:
            raise
        raise RuntimeError(f"attention: {error}") from error  # no other backend may try: qkv is rotated


def launch_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    config: AttentionConfig,
    positions: Tensor | None = None,
    window: int | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Run the op with this configuration, but for the rotation."""
    qkv, cu_seqlens = launch.rows(qkv), cu_seqlens.contiguous()
    tokens, width, batch = qkv.size(0), qkv.size(1) // 3, cu_seqlens.size(0) - 1
    heads = width // head_dim
    out = torch.empty((tokens, width), dtype=qkv.dtype, device=qkv.device)
    scale = head_dim**-0.5 * LOG2_E
    by_position = window is not None or position_bias is not None
    tensors = (
        positions.contiguous() if positions is not None and by_position else None,
        None if position_bias is None else position_bias.contiguous(),
    )
    numbers = (
        scale,
        FARTHEST if window is None else min(window, FARTHEST),
        0 if position_bias is None else position_bias.size(1) // 2,
        qkv.stride(0),
        out.stride(0),
    )
    common: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "PRECISION": launch.precision(qkv.dtype),
        "UPCAST": launch.upcast(qkv.dtype),
        "POSITIONS": tensors[0] is not None,
        "WINDOW": by_position,
        "BIAS": position_bias is not None,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **launch.OPTIONS,
    }
    if config.sequences:
        grid = (triton.cdiv(batch, config.sequences), heads)
        short_attention_kernel[grid](
            qkv, cu_seqlens, *tensors, out, tokens, batch, width, *numbers,
            SEGMENT=config.block_m // config.sequences, SEQUENCES=config.sequences, **common,
        )  # fmt: skip
        return out
    tiles = triton.cdiv(max_seqlen, config.block_m)
    attention_kernel[(tiles * batch, heads)](
        qkv, cu_seqlens, *tensors, out, tokens, batch, width, tiles, *numbers,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, **common,
    )  # fmt: skip
    return out
