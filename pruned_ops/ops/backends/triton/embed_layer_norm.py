"""Op `embed_layer_norm`: LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]).

A program owns ROWS tokens, gathers the three table rows of each into registers, and writes their sum
normalised. Ids are clamped into their tables, so that a wrong one never reads outside; pruned_ops.debug()
reports it.
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
from pruned_ops.ops.reference import check_embed_layer_norm


@triton.jit
def _gathered(ids, table, rows, in_batch, table_rows, stride, columns, inside):
    index = tl.load(ids + rows, mask=in_batch, other=0).to(tl.int64)
    index = tl.minimum(tl.maximum(index, 0), table_rows - 1)
    return tl.load(table + index[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "words", "positions", "types"])
def embed_layer_norm_kernel(
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, norm_bias, out,
    tokens, hidden, eps, words, positions, types, stride_word, stride_position, stride_type,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    in_batch = rows < tokens
    inside = in_batch[:, None] & (columns < hidden)[None, :]
    total = _gathered(input_ids, word, rows, in_batch, words, stride_word, columns, inside)
    total += _gathered(token_type_ids, token_type, rows, in_batch, types, stride_type, columns, inside)
    total += _gathered(position_ids, position, rows, in_batch, positions, stride_position, columns, inside)
    scale = tl.load(weight + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    result = normalised(total, inside, hidden, scale, shift, eps).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * hidden + columns[None, :], result, mask=inside)


def refuse(*args: object) -> str | None:
    return refuse_hidden(args[3]) or launch.refuse(*args)


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
    """Launcher of the op; see reference.embed_layer_norm."""
    check_embed_layer_norm(
        input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias
    )
    ids, tables = [input_ids, position_ids, token_type_ids], [word, position, token_type]
    # Ids are clamped to the rows that there are.
    torch._check(
        input_ids.size(0) == 0 or all(table.size(0) > 0 for table in tables),
        lambda: f"embed_layer_norm: a table has no row: {[tuple(table.shape) for table in tables]}",
    )
    config = best_row_config("embed_layer_norm", word, input_ids.size(0))
    return launch_embed_layer_norm(ids, tables, norm_weight, norm_bias, eps, config)


def launch_embed_layer_norm(
    ids: list[Tensor],
    tables: list[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    config: RowConfig,
) -> Tensor:
    """Run the op with this configuration; ids and tables are in the order of the op's arguments."""
    tables = [launch.rows(table) for table in tables]
    tokens, hidden = ids[0].size(0), tables[0].size(1)
    out = torch.empty((tokens, hidden), dtype=tables[0].dtype, device=tables[0].device)
    if out.numel() == 0:
        return out
    embed_layer_norm_kernel[(triton.cdiv(tokens, config.rows),)](
        *(i.contiguous() for i in ids), *tables, norm_weight.contiguous(), norm_bias.contiguous(), out,
        tokens, hidden, eps, *(table.size(0) for table in tables), *(table.stride(0) for table in tables),
        ROWS=config.rows, BLOCK=next_power_of_2(hidden), num_warps=config.warps, **launch.OPTIONS,
    )  # fmt: skip
    return out
