"""Biases by relative position: what is added to the scores of attention, by a key's distance from its query.

Distances share buckets, as T5 has them (Raffel et al. 2020): half of the buckets are for keys after the
query; of each half, the first half is for single distances, and the rest for ranges that grow as powers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from pruned_ops.models.families.description import RelativeBias
from pruned_ops.models.families.known import family_of


def bucket_of_distance(bias: RelativeBias) -> Tensor:
    """The bucket, int64 (2 * reach + 1,), of each distance of a key from its query, from -reach to reach;
    farther keys are in the outermost ones."""
    distance = torch.arange(-bias.reach, bias.reach + 1, device="cpu")
    half = bias.buckets // 2
    single = half // 2
    away = distance.abs()
    # In this order of operations, because it decides which way a bound between two buckets is rounded.
    powers = torch.log(away.clamp_min(1).float() / single) / math.log(bias.reach / single) * (half - single)
    bucket = torch.where(away < single, away, (single + powers.long()).clamp_max(half - 1))
    return bucket + (distance > 0) * half


def bias_by_distance(encoder: Any) -> Tensor | None:
    """What an encoder adds to the scores of each head of the dense model, as `ops.attention` takes it,
    (num_attention_heads, 2 * reach + 1); None for an encoder without such a bias."""
    bias = family_of(encoder.config).relative_bias
    if bias is None:
        return None
    table = encoder.get_submodule(bias.name).weight
    return table[bucket_of_distance(bias).to(table.device)].T


def scores_of_layers(encoder: Any, seqlen: int) -> Iterator[Tensor | None]:
    """What each layer adds to its heads' scores between all places of a padded sequence, (1, heads, seqlen,
    seqlen); None for an encoder without such a bias."""
    by_distance = bias_by_distance(encoder)
    if by_distance is None:
        yield from repeat(None)
        return
    place = torch.arange(seqlen, device=by_distance.device)
    reach = by_distance.size(1) // 2
    bias = by_distance[:, (place - place[:, None]).clamp(-reach, reach) + reach]
    yield from (bias[None, heads] for heads in heads_of_layers(encoder.config))


def heads_of_layers(config: Any) -> list[list[int]]:
    """Which heads of the dense model each layer has, and so which rows of `bias_by_distance` they take."""
    kept = getattr(config, "head_indices", None)
    return [list(range(config.num_attention_heads))] * config.num_hidden_layers if kept is None else kept
