"""In which ways a stack of layers differs from BERT's, as data."""

from __future__ import annotations

from dataclasses import dataclass

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
class StackKind:
    """The ways in which stacks differ; the defaults are BERT's.

    norm_first: LayerNorm comes before attention and FFN, whose outputs are added to what it took, instead of
    after that sum. first_norm: whether there is one before the first attention. final_norm: whether there is
    one after the last layer.
    gated: an FFN multiplies its activations by another product of its input (`ops.linear_geglu`).
    attention_bias, ffn_bias, norm_bias: whether these linears, and LayerNorms, have biases.
    by_position: what each layer's attention does with positions; None where none does anything.
    bias_reach: up to which distance attentions have a bias of their own for each head, beyond which it stays
    the same; None where they have none."""

    norm_first: bool = False
    first_norm: bool = True
    final_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    by_position: tuple[ByPosition, ...] | None = None
    bias_reach: int | None = None

    @property
    def has_biases(self) -> bool:
        """Whether any linear or LayerNorm has a bias."""
        return self.attention_bias or self.ffn_bias or self.norm_bias

    @property
    def reads_positions(self) -> bool:
        """Whether an attention depends on its tokens' positions."""
        return self.by_position is not None or self.bias_reach is not None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer's attention; empty where none has one."""
        found = tuple(each.window for each in self.by_position or ())
        return () if all(window is None for window in found) else found

    def of_layer(self, layer: int) -> ByPosition:
        """What the attention of a layer does with positions."""
        return PLAIN if self.by_position is None else self.by_position[layer]


BERT_KIND = StackKind()
