"""The inputs of an encoder, padded or packed: checks, default positions, and the real tokens alone."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from pruned_ops.layers.packing import PackedBatch
from pruned_ops.models.families.known import family_of

Output = TypeVar("Output", bound=ModelOutput)
# How an encoder's states become an embedding, see `pool_tokens`.
POOLINGS = ("mean", "cls")


class IdOutsideTable(IndexError, ValueError):
    """An id that has no row in its table, as those of another model's tokenizer."""


def longest_sequence(config: Any) -> int:
    """The number of tokens in the longest sequence that the model's table of positions allows."""
    return config.max_position_embeddings - family_of(config).first_position(config)


def most_tokens(config: Any) -> int | None:
    """The number of tokens in the longest sequence that the model computes; None for any, where it has no
    table of positions."""
    return longest_sequence(config) if family_of(config).has_positions(config) else None


def padding_id(config: Any) -> int:
    """The token id to fill batches up with: the config's pad_token_id, or 0 where it has none. No output of
    a real token depends on it."""
    return 0 if config.pad_token_id is None else config.pad_token_id


def default_position_ids(
    config: Any, input_ids: Tensor | None, batch_size: int, seqlen: int, device: torch.device
) -> Tensor:
    """The position ids (batch, seqlen) that the stock models use where the caller gives none.

    Most count all places from 0. Those of RoBERTa's kind count the tokens that are not padding from
    pad_token_id + 1 and leave padding at pad_token_id; without input_ids (embeddings were given) all tokens
    count as real.
    Errors: ValueError for sequences that are longer than the table of positions.
    """
    family = family_of(config)
    first = family.first_position(config)
    longest = config.max_position_embeddings - first
    if seqlen > longest and family.has_positions(config):
        raise ValueError(f"the sequences have {seqlen} tokens; the model's position table allows {longest}")
    if first == 0 or input_ids is None:
        return torch.arange(first, first + seqlen, device=device).expand(batch_size, seqlen)
    real = input_ids.ne(first - 1).long()
    return real.cumsum(1) * real + first - 1


def check_inputs(
    config: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
) -> None:
    """Refuse ids that would read outside their table. They are looked at on a CPU only, where that makes
    nobody wait.

    Errors: ValueError unless exactly one of input_ids and inputs_embeds is given; IdOutsideTable that names
    the ids and the value."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds is needed")
    # Without a table of token types, the stock models do not look at any that are given.
    family = family_of(config)
    types = 0 if token_type_ids is None else family.value(config, "type_vocab_size")
    # Nor at positions without a table of them, where those may be given.
    positions = position_ids if family.positions_field is None or family.has_positions(config) else None
    for name, ids, rows in (
        ("input_ids", input_ids, config.vocab_size),
        ("position_ids", positions, config.max_position_embeddings),
        ("token_type_ids", token_type_ids if types else None, types),
    ):
        if ids is None or ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            continue
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= rows:
            raise IdOutsideTable(
                f"{name} holds {low if low < 0 else high}; its table has {rows} rows (0 to {rows - 1})"
            )


def check_positions(config: Any, position_ids: Tensor | None) -> None:
    """Refuse positions where the publisher's model would rotate by them, and go by the places in the batch in
    windows and biases. Errors: ValueError."""
    family = family_of(config)
    if position_ids is not None and family.kind(config).by_position is not None:
        raise ValueError(
            f"position_ids were given: a {family.name} counts the places in the batch here, and takes none"
        )


def without_size(arguments: dict[str, Any], input_ids: Tensor | None) -> dict[str, Any]:
    """The arguments without the size of the padded batch, which ModernBERT's heads of transformers 4 say
    beside the ids."""
    size = {name: arguments[name] for name in ("batch_size", "seq_len") if name in arguments}
    if not size or input_ids is None or tuple(size.values()) != tuple(input_ids.shape):
        return arguments
    return {name: value for name, value in arguments.items() if name not in size}


def packed_inputs(
    config: Any,
    device: torch.device,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    batch: PackedBatch | None = None,
) -> tuple[PackedBatch, tuple[Tensor, ...]]:
    """Check padded inputs (batch, seqlen), and pack them for an encoder on `device`.

    batch: where the real tokens are, from a caller that knows it; by default the attention_mask tells it.
    Returns the batch, and the ids, positions and types of its real tokens, (tokens,) each; where attention
    depends on them also their places in the padded batch, if anything is padded.
    Errors: those of `check_inputs`, `default_position_ids` and `PackedBatch.from_mask`.
    """
    check_inputs(config, input_ids, None, position_ids, token_type_ids)
    check_positions(config, position_ids)
    assert input_ids is not None  # check_inputs refuses None
    batch_size, seqlen = input_ids.shape
    if position_ids is None:
        position_ids = default_position_ids(config, input_ids, batch_size, seqlen, device)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if batch is None:
        batch = PackedBatch.from_mask(attention_mask, batch_size, seqlen, device)
    positions, types = position_ids.expand(input_ids.shape), token_type_ids.expand(input_ids.shape)
    if not family_of(config).has_token_types(config):
        types = torch.zeros_like(input_ids)
    packed = batch.pack(input_ids), batch.pack(positions), batch.pack(types)
    if batch.index is None or not family_of(config).kind(config).reads_places:
        return batch, packed
    return batch, (*packed, batch.index % seqlen)


def first_tokens(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden): the first real token of each row; zeros where it has none.

    States without rows are returned as they are, whatever the mask: the head of an optimised model is
    computed elsewhere (`runtime.packed_heads`)."""
    batch_size = states.size(0)  # len() would be a fixed number in traced code
    if attention_mask is None or batch_size == 0:
        return states[:, 0]
    real = (attention_mask != 0).to(states.device)
    rows = torch.arange(batch_size, device=states.device)
    # argmax does not promise the first of equal maxima. Of these falling numbers no two are equal, unless a
    # row is all padding.
    at = (real * torch.arange(real.size(1), 0, -1, device=real.device)).argmax(1)
    return states[rows, at].masked_fill(~real.any(1)[:, None], 0.0)


def begins_padded(attention_mask: Tensor | None) -> bool:
    """Whether a row of the mask has padding at position 0. On a GPU this waits; traced code cannot look, and
    is told that there may be some."""
    if attention_mask is None or attention_mask.size(1) == 0:
        return False
    return torch.compiler.is_compiling() or bool((attention_mask[:, 0] == 0).any())


def apply_pooler(pooler: Any, states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What an encoder's pooler makes of hidden states (batch, seqlen, hidden).

    The publishers' poolers and ours read position 0. Where that is padding, they get the first real token's
    state there, which is CLS on whichever side the padding is; another pooler gets the states as they are.
    attention_mask: None, too, where it is known that nothing is padded there."""
    reads_0 = type(pooler).__module__.startswith(("transformers.models.", "pruned_ops."))
    if attention_mask is None or not reads_0 or states.size(0) == 0:
        return pooler(states)
    return pooler(torch.cat([first_tokens(states, attention_mask)[:, None], states[:, 1:]], 1))


def mean_states(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden): the mean over the real tokens of each row; zeros where it
    has none. States without rows are returned as they are, as by `first_tokens`."""
    if attention_mask is None or states.size(0) == 0:
        return states.mean(1)
    real = (attention_mask != 0).to(states)[:, :, None]
    # In fp32, as `states.mean` adds up halves: fp16 ends at 65,504, and bf16 rounds the number of tokens.
    wide = torch.promote_types(states.dtype, torch.float32)
    means = (states * real).sum(1, dtype=wide) / real.sum(1, dtype=wide).clamp(min=1)
    return means.to(states.dtype)


def pool_tokens(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden), by one of POOLINGS: the mean over the real tokens of each
    row, or the first of them, on whichever side the padding is; zeros where a row has none. Errors:
    ValueError for another pooling."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; {' or '.join(POOLINGS)} is needed")
    return (first_tokens if pooling == "cls" else mean_states)(states, attention_mask)


def returned(
    output: Output, config: Any, return_dict: bool | None, keeps_pooler: bool = False
) -> Output | tuple[Any, ...]:
    """A model's output as its caller wants it: a tuple where return_dict, or else the config's, is False.

    keeps_pooler: whether the tuple of an encoder without a pooler has None in that one's place."""
    wants_dict = config.return_dict if return_dict is None else return_dict
    if wants_dict:
        return output
    places = output.to_tuple()
    if keeps_pooler and "pooler_output" not in output:
        return (places[0], None, *places[1:])
    return places
