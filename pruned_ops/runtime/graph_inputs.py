"""The size of a graph, and the buffers that it reads: a batch of at most that size is copied into them, and
filled up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruned_ops.ops.backends.triton.launch import cannot_start
from pruned_ops.ops.registry import BACKENDS

# Tokens. A program of the attention kernel has at least so many query rows, and one that begins beyond its
# sequence's end stops at once, so that rounding lengths up by less costs nothing. But several sequences of at
# most SHORT tokens share a program, and those of at most half of it twice as many.
LENGTH_STEP, SHORT = 64, 32
# The number of sequences is rounded up to a multiple of this share of a power of 2: by at most an eighth.
SEQUENCE_STEPS = 8
# How many times the programs of attention that a batch needs its graph may have, where it is not the batch's
# own. Those beyond the sequences end at once.
LOOSE = 4
# Numbers. Rows of the buffers begin at multiples of it, because a kernel whose ids begin elsewhere is another
# one, which would be compiled when an odd size first comes.
ROW_STEP = 16


@dataclass(frozen=True)
class Bucket:
    """The sizes of a graph. Batches of at most these sizes are run as one of exactly these."""

    tokens: int
    batch: int
    max_seqlen: int

    @classmethod
    def of(cls, tokens: int, batch: int, max_seqlen: int, waste: float) -> Bucket:
        """The smallest bucket for a batch.

        Tokens go in steps of a power of 2, at most `waste` of them; lengths in steps of LENGTH_STEP, or to
        SHORT or half of it. The filling rows make sequences of their own, for which the bucket has room: none
        where the tokens fill the bucket, else as many as the most filling rows need, so that few buckets
        serve many sizes. The sequences that are left are empty.
        """
        step = 1 << max(int(waste * tokens), 1).bit_length() - 1
        longest = _rounded(max_seqlen, SHORT // 2 if max_seqlen <= SHORT else LENGTH_STEP)
        fillers = -(-(step - 1) // longest) if tokens % step else 0
        return cls(_rounded(tokens, step), _rounded_sequences(batch + fillers), longest)

    def holds(self, tokens: int, batch: int, max_seqlen: int, waste: float) -> bool:
        """Whether a batch can run as this one, with at most this share of filling rows and LOOSE times the
        programs of attention."""
        filling = self.tokens - tokens
        return (
            0 <= filling <= waste * tokens
            and max_seqlen <= self.max_seqlen
            and batch - (-filling // self.max_seqlen) <= self.batch
            and self.batch * self.max_seqlen <= LOOSE * batch * max(max_seqlen, LENGTH_STEP)
        )

    def coarser(self) -> Bucket:
        """One of as many tokens that holds more batches: its sequences and their lengths are powers of 2."""
        return Bucket(self.tokens, _power_of_2(self.batch), _power_of_2(self.max_seqlen))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of sequences that fill the bucket, as long as they may be."""
        whole, rest = divmod(self.tokens, self.max_seqlen)
        return (self.max_seqlen,) * whole + (rest,) * bool(rest)


def _rounded(number: int, step: int) -> int:
    """The number, rounded up to a multiple of the step."""
    return -(-number // step) * step


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rounded_sequences(number: int) -> int:
    return _rounded(number, max((1 << number.bit_length() - 1) // SEQUENCE_STEPS, 1))


class GraphInputs:
    """The buffers of a graph's inputs, of a bucket's size.

    ids: ids, positions and types, int64 (tokens,) each, and a fourth row where `rows` is 4: the places in the
    padded batch. cu_seqlens: int32 (batch + 1,). All are at the same place whatever is loaded, and hold
    filling rows alone at first.
    """

    def __init__(self, bucket: Bucket, device: torch.device, rows: int = 3) -> None:
        self.bucket = bucket
        self._rows = torch.zeros(rows, _rounded(bucket.tokens, ROW_STEP), dtype=torch.int64, device=device)
        self._kernel = _loading_kernel(device)
        # Where sequences of filling rows end, counted from the first filling row.
        self._fillers = (
            torch.arange(1, bucket.batch + 1, dtype=torch.int32, device=device) * bucket.max_seqlen
        )
        self.ids = [row[: bucket.tokens] for row in self._rows]
        self.cu_seqlens = torch.zeros(bucket.batch + 1, dtype=torch.int32, device=device)
        # This compiles the kernel, before a batch waits for it.
        self.load([row[:0] for row in self.ids], torch.zeros(1, dtype=torch.int32, device=device))

    def load(self, ids: Sequence[Tensor], cu_seqlens: Tensor) -> None:
        """Copy a packed batch's ids, positions and types (and places) and its cu_seqlens into the buffers,
        and let the filling rows be sequences after the batch's own. Nothing is waited for."""
        if self._kernel is None:
            self.load_by_torch(ids, cu_seqlens)
        else:
            self._kernel(
                ids, cu_seqlens, self._rows, self.cu_seqlens, self.bucket.tokens, self.bucket.max_seqlen
            )

    def load_by_torch(self, ids: Sequence[Tensor], cu_seqlens: Tensor) -> None:
        """`load` in torch's own kernels, of which it takes four."""
        batch = cu_seqlens.size(0) - 1
        torch.stack(list(ids), out=self._rows[:, : ids[0].size(0)])
        self.cu_seqlens[: batch + 1].copy_(cu_seqlens)
        ends = self._fillers[: self._fillers.size(0) - batch] + cu_seqlens[-1:]
        torch.clamp(ends, max=self.bucket.tokens, out=self.cu_seqlens[batch + 1 :])


def _loading_kernel(device: torch.device) -> Callable[..., None] | None:
    """The launcher of one kernel that does what `load_by_torch` does; None where Triton starts none."""
    if device.type != "cuda" or BACKENDS["triton"].missing is not None or cannot_start() is not None:
        return None
    from pruned_ops.ops.backends.triton.graph_inputs import load_graph_inputs

    return load_graph_inputs
