"""Padding out and in, on any mask."""

from __future__ import annotations

import pytest
import torch

import pruned_ops
from cuda_ops import OnGpu
from inputs import LENGTHS, randn


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pack_and_unpack(lengths: tuple[int, ...]) -> None:
    longest = max(lengths, default=0) + 2
    mask = torch.arange(longest) < torch.tensor(lengths, dtype=torch.long)[:, None]
    batch = pruned_ops.PackedBatch.from_mask(mask, len(lengths), longest, torch.device("cpu"))
    x = randn(0, len(lengths), longest, 5)
    packed = batch.pack(x)
    assert packed.shape == (sum(lengths), 5) and batch.max_seqlen == max(lengths, default=0)
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert torch.equal(batch.unpack(packed, fill=-1.0), torch.where(mask[..., None], x, torch.tensor(-1.0)))


def test_lengths_that_are_known_leave_the_mask_alone() -> None:
    """Where nothing is padded: every look at it would be a kernel on a GPU, before the first that counts."""
    mask = OnGpu(torch.ones(3, 7, dtype=torch.int64), "cuda:0")
    batch = pruned_ops.PackedBatch.from_mask(mask, 3, 7, torch.device("cpu"), (7, 7, 7))
    assert batch.cu_seqlens.tolist() == [0, 7, 14, 21] and batch.index is None and batch.max_seqlen == 7


def test_holes_and_left_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    batch = pruned_ops.PackedBatch.from_mask(mask, 3, 4, torch.device("cpu"))
    x = torch.arange(12).view(3, 4)
    assert batch.pack(x).tolist() == [2, 3, 4, 7, 8, 9, 10, 11]
    assert batch.unpack(batch.pack(x), fill=-1).tolist() == [[-1, -1, 2, 3], [4, -1, -1, 7], [8, 9, 10, 11]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 8] and batch.tokens == 8
