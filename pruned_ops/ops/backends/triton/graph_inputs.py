"""Loads a batch into the buffers that a CUDA graph reads: the engine's step before every launch of a graph.

A program owns BLOCK numbers of every buffer. It copies ids, positions and types (and places, where there are
any), and writes cu_seqlens with the ends of the filling sequences behind the batch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pruned_ops.ops.backends.triton import launch

BLOCK, WARPS = 512, 4
_ARGUMENTS = [
    *("ids", "positions", "types", "places", "cu_seqlens", "rows", "bounds"),
    *("tokens", "batch", "room_tokens", "room_batch", "row_stride", "longest"),
]


# No argument is specialised: a batch's tensors may begin at any number, and one kernel serves all sizes.
@triton.jit(do_not_specialize=_ARGUMENTS, do_not_specialize_on_alignment=_ARGUMENTS)
def load_graph_inputs_kernel(
    ids, positions, types, places, cu_seqlens, rows, bounds,
    tokens, batch, room_tokens, room_batch, row_stride, longest,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    tl.store(rows + place, tl.load(ids + place, mask=inside), mask=inside)
    tl.store(rows + row_stride + place, tl.load(positions + place, mask=inside), mask=inside)
    tl.store(rows + 2 * row_stride + place, tl.load(types + place, mask=inside), mask=inside)
    if PLACES:
        tl.store(rows + 3 * row_stride + place, tl.load(places + place, mask=inside), mask=inside)
    known = place <= batch
    bound = tl.load(cu_seqlens + place, mask=known, other=0)
    filling = tl.load(cu_seqlens + batch) + (place - batch) * longest
    tl.store(
        bounds + place, tl.where(known, bound, tl.minimum(filling, room_tokens)), mask=place <= room_batch
    )


@launch.on_its_device
def load_graph_inputs(
    ids: Sequence[Tensor], cu_seqlens: Tensor, rows: Tensor, bounds: Tensor, room_tokens: int, longest: int
) -> None:
    """Write ids, positions and types, and places where they are given, int64 (tokens,) each, into the first
    columns of `rows` (as many as are given, at least room_tokens), and cu_seqlens, int32 (batch + 1,), into
    `bounds` (room_batch + 1,). The sequences behind the batch's own are `longest` tokens long until they end
    at room_tokens, and empty from there on."""
    tokens, batch, room_batch = ids[0].size(0), cu_seqlens.size(0) - 1, bounds.size(0) - 1
    programs = triton.cdiv(max(tokens, room_batch + 1), BLOCK)
    contiguous_ids = [row.contiguous() for row in ids]
    places = contiguous_ids[3] if len(contiguous_ids) > 3 else None
    load_graph_inputs_kernel[(programs,)](
        *contiguous_ids[:3], places, cu_seqlens.contiguous(), rows, bounds,
        tokens, batch, room_tokens, room_batch, rows.stride(0), longest,
        PLACES=places is not None, BLOCK=BLOCK,
        num_warps=WARPS, **launch.OPTIONS,
    )  # fmt: skip
