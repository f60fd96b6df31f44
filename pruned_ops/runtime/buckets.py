"""Sizes that share a CUDA graph, and batches cut to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A program of the attention has so many query rows at least; those beyond a sequence's end stop at once.
LENGTH_STEP = 64


@dataclass(frozen=True)
class Bucket:
    """Sizes that share a graph: batches of at most these are run as one of exactly these."""

    tokens: int
    batch: int
    max_seqlen: int

    @classmethod
    def of(cls, tokens: int, batch: int, max_seqlen: int, waste: float) -> Bucket:
        """The smallest bucket for a batch: tokens in steps of a power of 2 that is at most `waste` of them,
        the number of sequences as a power of 2, lengths in steps of LENGTH_STEP. Rows that are too many make
        sequences of their own, for which there is room; sequences that are too many are empty."""
        step = 1 << max(int(waste * tokens), 1).bit_length() - 1
        longest = -(-max_seqlen // LENGTH_STEP) * LENGTH_STEP
        fillers = -(-(step - 1) // longest)
        return cls(-(-tokens // step) * step, 1 << (batch + fillers - 1).bit_length(), longest)


def pieces(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """A batch cut between sequences into parts of at most max_tokens, or of one sequence with tokens: each
    part's first row and its sequences' lengths. Every sequence is in one of them, also one of no tokens."""
    first, piece, tokens = 0, list[int](), 0
    for length in lengths:
        if tokens and tokens + length > max_tokens:
            yield first, piece
            first, piece, tokens = first + tokens, [], 0
        piece.append(length)
        tokens += length
    if piece:
        yield first, piece
