"""The buffers of a graph: buckets, and a batch's way into them, by torch and by the one kernel for it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ops import OnGpu
from pruned_ops.ops.backends.triton.configs import short_config
from pruned_ops.ops.backends.triton.launch import on_its_device
from pruned_ops.ops.registry import BACKENDS
from pruned_ops.runtime.graph_inputs import Bucket, GraphInputs

STEP = 0.05
GOALS = [(length, batch) for length in (128, 384, 512) for batch in (1, 8, 32, 128)]
SPREAD = tuple(48 + 336 * place // 31 for place in range(32))


@settings(deadline=None)
@given(
    tokens=st.integers(1, 100_000), batch=st.integers(1, 300), longest=st.integers(1, 512),
    waste=st.floats(0, 0.5),
)  # fmt: skip
def test_buckets_hold_their_batches_and_waste_little(
    tokens: int, batch: int, longest: int, waste: float
) -> None:
    bucket = Bucket.of(tokens, batch, longest, waste)
    assert bucket.tokens >= tokens and bucket.batch >= batch and bucket.max_seqlen >= longest
    assert bucket.tokens - tokens <= waste * tokens
    filling = bucket.tokens - tokens
    assert (bucket.batch - batch) * bucket.max_seqlen >= filling and bucket.max_seqlen - longest < 64
    assert bucket.batch <= 1.125 * (batch + 1 + waste * tokens / min(64, bucket.max_seqlen))
    assert sum(bucket.lengths) == bucket.tokens
    assert max(bucket.lengths) == min(bucket.max_seqlen, bucket.tokens)


SIZES = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 200))


@settings(deadline=None, max_examples=500)
@given(own=SIZES, other=SIZES)
def test_a_bucket_holds_batches_whose_filling_rows_have_room(
    own: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    bucket = Bucket.of(*own, STEP)
    assert Bucket.of(*own, STEP).holds(*own, STEP)
    for held in (bucket, bucket.coarser()):
        tokens, batch, longest = other
        if held.holds(tokens, batch, longest, 2 * STEP):
            assert 0 <= held.tokens - tokens <= (held.batch - batch) * held.max_seqlen
            assert held.tokens <= (1 + 2 * STEP) * tokens and longest <= held.max_seqlen
    coarse = bucket.coarser()
    assert coarse.tokens == bucket.tokens and bucket.batch <= coarse.batch < 2 * bucket.batch
    assert bucket.max_seqlen <= coarse.max_seqlen < 2 * bucket.max_seqlen


def test_few_buckets_serve_many_sizes() -> None:
    sizes = {Bucket.of(tokens, 8, 128, STEP) for tokens in range(1000, 2000)}
    assert len(sizes) < 60


def test_short_sequences_share_programs_in_graphs_as_without() -> None:
    for longest in range(1, 200):
        bucket = Bucket.of(10_000, 10_000 // longest, longest, STEP)
        for length in (longest, bucket.max_seqlen):
            assert short_config(length, 64, torch.float16) == short_config(longest, 64, torch.float16)


@pytest.mark.parametrize(("length", "batch"), GOALS)
def test_full_batches_get_exactly_their_sequences(length: int, batch: int) -> None:
    assert Bucket.of(batch * length, batch, length, STEP) == Bucket(batch * length, batch, length)


def test_mixed_lengths_get_an_eighth_more_sequences_at_most() -> None:
    assert Bucket.of(sum(SPREAD), 32, 384, STEP).batch == 36  # one of filling rows, and three of none


def ids_of(tokens: int, rows: int = 3) -> list[Tensor]:
    return list(torch.randint(1, 100, (rows, tokens)))


def bounds_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def test_filling_rows_are_sequences_of_their_own() -> None:
    inputs = GraphInputs(Bucket(200, 6, 64), torch.device("cpu"))
    assert inputs.cu_seqlens.tolist() == [0, 64, 128, 192, 200, 200, 200]
    ids = ids_of(70)
    inputs.load(ids, bounds_of((50, 20)))
    assert inputs.cu_seqlens.tolist() == [0, 50, 70, 134, 198, 200, 200]
    assert all(torch.equal(buffer[:70], row) for buffer, row in zip(inputs.ids, ids, strict=True))


def test_rows_of_every_size_begin_where_one_kernel_takes_them() -> None:
    for tokens in (1, 7, 129, 1000):
        ids = GraphInputs(Bucket(tokens, 1, 1024), torch.device("cpu")).ids
        assert all(row.size(0) == tokens for row in ids)
        assert {(row.data_ptr() - ids[0].data_ptr()) % (16 * 8) for row in ids} == {0}


@pytest.mark.skipif(BACKENDS["triton"].missing is not None, reason=f"triton: {BACKENDS['triton'].missing}")
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40), seed=st.integers(0, 9),
    rows=st.sampled_from([3, 4]),
)  # fmt: skip
def test_one_kernel_loads_what_torch_loads(lengths: list[int], seed: int, rows: int) -> None:
    from pruned_ops.ops.backends.triton.graph_inputs import load_graph_inputs

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = sum(lengths)
    bucket = Bucket.of(max(tokens, 1), len(lengths), max(*lengths, 1), 0.2)
    ids, bounds = [row.to(device) for row in ids_of(tokens + 1, rows)], bounds_of(tuple(lengths)).to(device)
    ids = [row[1:] for row in ids]  # begins at no multiple of 16 bytes
    by_torch, by_kernel = (GraphInputs(bucket, torch.device(device), rows) for _ in range(2))
    by_torch.load_by_torch(ids, bounds)
    load_graph_inputs(ids, bounds, by_kernel._rows, by_kernel.cu_seqlens, bucket.tokens, bucket.max_seqlen)
    assert torch.equal(by_kernel.cu_seqlens, by_torch.cu_seqlens)
    assert torch.equal(by_kernel._rows, by_torch._rows)


def test_a_batch_is_loaded_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, whichever the tensors are on; a batch's ids are in a list."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or nullcontext())
    load = on_its_device(lambda *_: len(current))
    ids = [OnGpu(torch.zeros(3), "cuda:1")] * 3
    assert load(ids, torch.zeros(3)) == 1 and current == [torch.device("cuda", 1)]
    assert load(ids_of(3), torch.zeros(3)) == 1
    if BACKENDS["triton"].missing is None:
        from pruned_ops.ops.backends.triton.graph_inputs import load_graph_inputs

        assert hasattr(load_graph_inputs, "__wrapped__")
