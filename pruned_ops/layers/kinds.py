"""In which ways a stack of layers differs from BERT's, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ByPosition:
    """What a layer's attention does with the positions of query and key.

    rotary_base: the base of the wavelengths by which both are rotated; None where they are not.
    window: the largest distance of a key from its query; None for any."""

    rotary_base: float | None = None
    window: int | None = None

    def frequencies(self, head_dim: int) -> Tensor | None:
        """The inverse frequencies of the rotation, (head_dim / 2,), as models compute them; None where there
        is none."""
        if self.rotary_base is None:
            return None
        return 1.0 / self.rotary_base ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


PLAIN = ByPosition()


@dataclass(frozen=True)
class Disentangled:
    """How attentions multiply queries by keys of their distance, and keys by queries of their distance (He et
    al. 2021).

    to_positions, to_content: which of the two products there are. farthest: from which distance on keys share
    a row. buckets: the rows of keys on one side of their query, of which the first half are for single
    distances and the rest for ranges that grow as powers do; 0 where each distance has a row of its own."""

    to_positions: bool
    to_content: bool
    buckets: int
    farthest: int

    @property
    def span(self) -> int:
        """The rows of keys on one side of their query."""
        return self.buckets or self.farthest

    @property
    def products(self) -> int:
        """How many of the two products there are."""
        return self.to_positions + self.to_content

    @property
    def rows(self) -> int:
        """The rows of the table of relative embeddings."""
        return 2 * self.span

    @cached_property
    def distance_rows(self) -> Tensor:
        """The row, as `ops.attention` takes it, of each distance of a key from its query: int32 (2 * farthest
        + 1,). It counts from the last row of the publisher's table, which lie by the query's distance from
        the key."""
        away = torch.arange(-self.farthest, self.farthest + 1, device="cpu")
        bucket = away
        if self.buckets:
            middle = self.buckets // 2
            beyond = away.abs().clamp_min(middle)
            # In this order of operations, because it decides which way a bound of two rows is rounded.
            whole = torch.log(torch.tensor((self.farthest - 1) / middle, device="cpu"))
            power = torch.ceil(torch.log(beyond / middle) / whole * (middle - 1)) + middle
            bucket = torch.where(away.abs() <= middle, away, (power * away.sign()).long())
        return (bucket + self.span - 1).clamp(0, self.rows - 1).int()

    def by_distance(
        self,
        relative: Tensor,
        query: Callable[[Tensor], Tensor],
        key: Callable[[Tensor], Tensor],
        head_dim: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a layer's linears make of the states of distances (rows, hidden_size): the keys that queries
        are multiplied by, and the queries that keys are multiplied by, (num_heads, rows, head_dim) each, in
        the order of `distance_rows`; None for a product that there is not."""

        def heads(linear: Callable[[Tensor], Tensor]) -> Tensor:
            return linear(relative).flip(0).unflatten(-1, (-1, head_dim)).transpose(0, 1)

        return heads(key) if self.to_positions else None, heads(query) if self.to_content else None

    def rows_between(self, seqlen: int, device: torch.device) -> Tensor:
        """The row for each query and key of a padded sequence: int64 (seqlen, seqlen)."""
        place = torch.arange(seqlen, device=device)
        distance = (place - place[:, None]).clamp(-self.farthest, self.farthest)
        return self.distance_rows.to(device)[distance + self.farthest].long()


@dataclass(frozen=True)
class StackKind:
    """The ways in which stacks differ; the defaults are BERT's.

    norm_first: LayerNorm comes before attention and FFN, whose outputs are added to what it took, instead of
    after that sum. first_norm: whether there is one before the first attention. final_norm: whether there is
    one after the last layer.
    gated: an FFN multiplies its activations by another product of its input (`ops.linear_geglu`).
    attention_bias, ffn_bias, norm_bias: whether these linears, and LayerNorms, have biases.
    by_position: what each layer's attention does with positions; None where none does anything.
    bias_reach: up to which distance attentions have a bias of their own for each head, beyond which it stays
    the same; None where they have none. disentangled: what they multiply by distance; None for nothing."""

    norm_first: bool = False
    first_norm: bool = True
    final_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    by_position: tuple[ByPosition, ...] | None = None
    bias_reach: int | None = None
    disentangled: Disentangled | None = None
    # Whether an attention depends on its tokens' places in a padded batch, whatever their positions are.
    reads_places: bool = field(init=False)

    def __post_init__(self) -> None:
        places = self.bias_reach is not None or self.disentangled is not None
        object.__setattr__(self, "reads_places", places)  # once, because every forward asks

    @property
    def has_biases(self) -> bool:
        """Whether any linear or LayerNorm has a bias."""
        return self.attention_bias or self.ffn_bias or self.norm_bias

    @property
    def reads_positions(self) -> bool:
        """Whether an attention depends on its tokens' positions."""
        return self.by_position is not None or self.reads_places

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer's attention; empty where none has one."""
        windows = tuple(of_layer.window for of_layer in self.by_position or ())
        return () if all(window is None for window in windows) else windows

    def of_layer(self, layer: int) -> ByPosition:
        """What the attention of a layer does with positions."""
        return PLAIN if self.by_position is None else self.by_position[layer]


BERT_KIND = StackKind()
