"""The list of ops, a line each. What an op means stands in reference.py; who runs it, in backends/."""

import torch
from torch import Tensor

from pruned_ops.ops import reference
from pruned_ops.ops.registry import Op


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= rows:
        raise IndexError(
            f"embed_layer_norm: {name} holds {low if low < 0 else high}; its table has {rows} rows"
        )


def _check_embedding(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor,
    token_type: Tensor, *_: object,
) -> None:  # fmt: skip
    _check_ids("input_ids", input_ids, word.size(0))
    _check_ids("position_ids", position_ids, position.size(0))
    _check_ids("token_type_ids", token_type_ids, token_type.size(0))


def _check_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> None:
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if (
        int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != qkv.size(0)
        or (lengths < 0).any()
        or longest > max_seqlen
    ):
        raise RuntimeError(
            f"attention: cu_seqlens must rise from 0 to the {qkv.size(0)} tokens in steps of at most "
            f"max_seqlen = {max_seqlen}; it is {cu_seqlens.tolist()}"
        )


attention = Op(reference.attention, _check_attention)
linear_gelu = Op(reference.linear_gelu)
add_layer_norm = Op(reference.add_layer_norm)
linear_add_layer_norm = Op(reference.linear_add_layer_norm)
embed_layer_norm = Op(reference.embed_layer_norm, _check_embedding)
encoder = Op(reference.encoder)
