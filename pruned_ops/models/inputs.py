"""What enters an encoder, padded or packed alike: the checks, and the positions that the stock models would
use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruned_ops.models.configuration import is_roberta


def default_position_ids(
    input_ids: Tensor | None, batch_size: int, seqlen: int, device: torch.device, padding_idx: int | None
) -> Tensor:
    """Position ids (batch, seqlen) as the stock models make them.

    BERT (`padding_idx` None) counts all places from 0. RoBERTa counts the tokens that are not `padding_idx`
    from padding_idx + 1 and leaves padding at padding_idx; embeddings given directly count as all real.
    """
    if padding_idx is None:
        return torch.arange(seqlen, device=device).expand(batch_size, seqlen)
    if input_ids is None:
        return torch.arange(padding_idx + 1, padding_idx + 1 + seqlen, device=device).expand(
            batch_size, seqlen
        )
    real = input_ids.ne(padding_idx).long()
    return real.cumsum(1) * real + padding_idx


def longest_sequence(config: Any) -> int:
    """Tokens of the longest sequence that the model's table of positions allows."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if is_roberta(config) else 0)


def check_inputs(
    config: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
) -> None:
    """Refuse by name what would read outside a table. ids are checked where that costs no synchronisation
    (CPU)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is needed")
    source = input_ids if input_ids is not None else inputs_embeds
    assert source is not None
    seqlen = source.size(1)
    longest = longest_sequence(config)
    if position_ids is None and seqlen > longest:
        raise ValueError(f"the sequences have {seqlen} tokens; the model's position table allows {longest}")
    for name, ids, rows in (
        ("input_ids", input_ids, config.vocab_size),
        ("position_ids", position_ids, config.max_position_embeddings),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        if ids is None or ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            continue
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= rows:
            raise IndexError(
                f"{name} holds {low if low < 0 else high}; its table has {rows} rows (0 to {rows - 1})"
            )


def first_tokens(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first real token; zeros where it has none.

    States of no row stay so, whatever the mask: an optimised model's head is computed elsewhere."""
    if attention_mask is None or len(states) == 0:
        return states[:, 0]
    real = (attention_mask != 0).to(states.device)
    rows = torch.arange(len(states), device=states.device)
    # The first of equal maxima is not promised; of these numbers there is one only, or none.
    at = (real * torch.arange(real.size(1), 0, -1, device=real.device)).argmax(1)
    return states[rows, at].masked_fill(~real.any(1)[:, None], 0.0)
