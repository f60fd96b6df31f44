"""Removes padding and puts it back: a padded batch (batch, seqlen, ...) <-> packed tokens (tokens, ...)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_MASK = "attention_mask holds values other than 0 and 1; an additive mask is not taken here"


def check_mask(attention_mask: Tensor, batch_size: int, seqlen: int) -> None:
    """Raise ValueError unless this is a mask of ones and zeros of shape (batch, seqlen).

    Another kind of mask, taken for one, would unmask padding.
    """
    _check_shape(attention_mask, batch_size, seqlen)
    if attention_mask.dtype == torch.bool or torch.compiler.is_compiling():
        return
    if bool(_is_wrong(attention_mask)):
        raise ValueError(NO_MASK)


def _check_shape(attention_mask: Tensor, batch_size: int, seqlen: int) -> None:
    if tuple(attention_mask.shape) != (batch_size, seqlen):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a mask of ones and zeros of "
            f"shape (batch, seqlen) = {(batch_size, seqlen)} is needed"
        )


def _is_wrong(attention_mask: Tensor) -> Tensor:
    """Whether the mask has values other than 0 and 1: a bool tensor on the mask's device."""
    return ((attention_mask != 0) & (attention_mask != 1)).any()


def _bounds(lengths: Tensor) -> Tensor:
    """Turn lengths, int32 (batch,), into cu_seqlens, int32 (batch + 1,)."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


@dataclass(frozen=True)
class PackedBatch:
    """The places of the real tokens in a padded batch.

    cu_seqlens int32 (batch + 1,): sequence i owns the rows cu_seqlens[i] to cu_seqlens[i + 1] of the packed
    tensors.
    max_seqlen: the length of the longest sequence, in tokens, on the host.
    index int64 (tokens,): each token's row in the flattened padded batch; None if nothing is padded.
    batch_size, seqlen: the shape of the padded batch.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    index: Tensor | None
    batch_size: int
    seqlen: int
    _lengths: tuple[int, ...] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each sequence, on the host; copied there unless from_mask made this batch."""
        if self.index is None:
            return (self.seqlen,) * self.batch_size
        return tuple(self.cu_seqlens.diff().tolist()) if self._lengths is None else self._lengths

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        return self.batch_size * self.seqlen if self.index is None else self.index.numel()

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor | None,
        batch_size: int,
        seqlen: int,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
    ) -> PackedBatch:
        """Make the batch from a mask of ones and zeros (batch, seqlen), padded anywhere.
        None stands for a mask of ones.

        lengths: the number of ones in each row of the mask, from a caller that knows it on the host. The
        mask's values are then not looked at, so that a GPU is not waited for. Without it the lengths are
        copied to the host once, but never in traced code.
        Errors: ValueError for another shape or other values (RuntimeError for the values in code that
        torch.compile or torch.export traced).
        """
        if attention_mask is None:
            return cls._unpadded(batch_size, seqlen, device)
        _check_shape(attention_mask, batch_size, seqlen)
        if torch.compiler.is_compiling():
            return cls._traced(attention_mask.to(device))
        if lengths is not None and set(lengths) <= {seqlen}:
            return cls._unpadded(batch_size, seqlen, device)
        attention_mask = attention_mask.to(device)
        real = attention_mask != 0
        counts = real.sum(1, dtype=torch.int32)
        if lengths is None:
            # One copy to the host holds the lengths and the check, so that a GPU is waited for once.
            *copied, wrong = torch.cat([counts, _is_wrong(attention_mask)[None].int()]).tolist()
            if wrong:
                raise ValueError(NO_MASK)
            lengths = tuple(copied)
            if set(lengths) <= {seqlen}:
                return cls._unpadded(batch_size, seqlen, device)
        index = torch.nonzero_static(real.flatten(), size=sum(lengths)).flatten()
        return cls(_bounds(counts), max(lengths), index, batch_size, seqlen, lengths)

    @classmethod
    def _traced(cls, attention_mask: Tensor) -> PackedBatch:
        """Make the batch in code that is being traced, where no length may be copied to the host. Its
        max_seqlen is the padded batch's seqlen, and its number of tokens is known only when the code runs."""
        torch._assert_async(~_is_wrong(attention_mask), NO_MASK)
        real = attention_mask != 0
        bounds, index = _bounds(real.sum(1, dtype=torch.int32)), real.flatten().nonzero().flatten()
        return cls(bounds, real.size(1), index, real.size(0), real.size(1))

    @classmethod
    def _unpadded(cls, batch_size: int, seqlen: int, device: torch.device) -> PackedBatch:
        cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seqlen
        return cls(cu_seqlens, seqlen if batch_size else 0, None, batch_size, seqlen)

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, seqlen, ...) -> (tokens, ...): drop the padding."""
        flat = padded.reshape(self.batch_size * self.seqlen, *padded.shape[2:])
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(tokens, ...) -> (batch, seqlen, ...): put padding back, with the value `fill`."""
        if self.index is None:
            return packed.reshape(self.batch_size, self.seqlen, *packed.shape[1:])
        flat = packed.new_full((self.batch_size * self.seqlen, *packed.shape[1:]), fill)
        flat.index_copy_(0, self.index, packed)
        return flat.view(self.batch_size, self.seqlen, *packed.shape[1:])
