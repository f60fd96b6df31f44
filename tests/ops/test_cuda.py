"""The CUDA backend's ops, from torch tensors to kernels: on a GPU where the extension has its kernels, else
csrc/cuda/ops.cpp compiled for CPU tensors and the emulated kernels. What only a GPU has is tested at the end.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import pruned_ops
from cuda_ops import (
    ALL,
    DEVICE,
    GEMMS,
    HALVES,
    ON_GPU,
    SKIPPED,
    arguments_of,
    cases,
    checked,
    moved,
    native,
    needs_gpu,
    run,
)
from inputs import arguments_for, attention_arguments, cu_seqlens, moved_to, randn
from numerics import within_budget
from pruned_ops.ops.registry import use_backend

pytestmark = SKIPPED


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_cuda_attention_at_the_edges_of_tiles(head_dim: int, dtype: torch.dtype) -> None:
    """Lengths at block sizes +-1, one token, no token; one head and three."""
    for lengths in [(63, 1), (64,), (65, 0, 127), (129,), (1,), (16,) * 5, (3, 17, 0, 32, 31)]:
        for heads in (1, 3):
            checked("attention", moved(attention_arguments(lengths, heads, head_dim), dtype))


def test_a_cuda_max_seqlen_that_is_no_length_of_the_batch() -> None:
    """A huge one costs nothing."""
    qkv, bounds, longest, head_dim = moved(attention_arguments((5, 9), 2, 32), torch.float16)
    expected = run("attention", [qkv, bounds, longest, head_dim])
    assert torch.equal(run("attention", [qkv, bounds, 2**40, head_dim]), expected)
    assert run("attention", [qkv[:0], bounds[:1], 2**40, head_dim], launches=False).shape == (0, 64)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 56, 1499])
def test_cuda_linear_gelu_of_any_width(width: int, dtype: torch.dtype) -> None:
    for tokens, inputs in ((1, 40), (19, 33), (130, 64)):
        sizes = [randn(0, tokens, inputs), randn(1, width, inputs), randn(2, width)]
        checked("linear_gelu", moved(sizes, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("hidden", [1, 90, 384, 1100])
def test_cuda_linear_add_layer_norm_of_any_width(hidden: int, dtype: torch.dtype) -> None:
    for tokens, inner in ((1, 72), (37, 71)):
        checked(
            "linear_add_layer_norm",
            moved(arguments_for("linear_add_layer_norm", tokens, hidden, inner), dtype),
        )


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("hidden", [1, 90, 384, 1024, 1025, 8192])
def test_cuda_norms_of_any_width(hidden: int, dtype: torch.dtype) -> None:
    arguments = moved(arguments_for("add_layer_norm", 5, hidden), dtype)
    checked("add_layer_norm", arguments)
    checked("add_layer_norm", [arguments[0], None, *arguments[2:]])
    embedding = moved(arguments_for("embed_layer_norm", 5, hidden), dtype)
    checked("embed_layer_norm", embedding)
    checked("embed_layer_norm", [embedding[0].int(), embedding[1], embedding[2].int(), *embedding[3:]])


def views(x: Tensor) -> list[Tensor]:
    """The same values at an odd offset, with a row stride that is no multiple of 16 bytes and one that is,
    transposed in memory, and every second number of a longer vector."""
    offset = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if x.dim() < 2:
        return [offset, x.new_empty(2 * x.numel())[::2].copy_(x)]
    rows, columns = x.shape
    odd, even = x.new_empty(rows, columns + 3)[:, 1:-2], x.new_empty(rows, columns + 16)[:, 8:-8]
    return [offset, odd.copy_(x), even.copy_(x), x.t().contiguous().t()]


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_cuda_takes_views(op: str, dtype: torch.dtype) -> None:
    """Unaligned and non-contiguous inputs give what contiguous ones give, within rounding, and stay."""
    arguments = arguments_of(op, dtype)
    expected = checked(op, arguments)
    for place, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        for view in views(argument):
            output = run(op, [*arguments[:place], view, *arguments[place + 1 :]])
            torch.testing.assert_close(output, expected)
            assert torch.equal(view, argument)


@pytest.mark.parametrize(("op", "dtype"), cases())
def test_cuda_results_repeat(op: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(op, dtype)
    assert torch.equal(run(op, arguments), run(op, arguments))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sequence_alone_is_the_same_in_a_batch_on_cuda(dtype: torch.dtype) -> None:
    qkv, bounds, _, head_dim = moved(attention_arguments((5, 70, 130), 3, 32), dtype)
    together = run("attention", [qkv, bounds, 130, head_dim])
    alone = run("attention", [qkv[5:75], cu_seqlens((70,)).to(DEVICE), 70, head_dim])
    assert torch.equal(together[5:75], alone)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cuda_starts_nothing_for_nothing(dtype: torch.dtype) -> None:
    """No tokens, heads, sequences, lengths, width or hidden size."""
    for lengths, heads in (((), 2), ((0, 0), 2), ((7,), 0)):
        checked("attention", moved(attention_arguments(lengths, heads, 32), dtype), launches=False)
    qkv, _, _, head_dim = moved(attention_arguments((7,), 2, 32), dtype)
    for lengths, longest in (((7,), 0), ((), 7)):
        output = run("attention", [qkv, cu_seqlens(lengths).to(DEVICE), longest, head_dim], launches=False)
        assert output.shape == (7, 64) and not output.any()
    for op in (*GEMMS, "add_layer_norm"):
        for tokens, hidden in ((0, 48), (5, 0)):
            if op == "linear_gelu":
                made = [randn(0, tokens, 16), randn(1, hidden, 16), randn(2, hidden)]
            else:
                made = arguments_for(op, tokens, hidden, 16)
            output = run(op, moved(made, dtype), launches=False)
            assert output.shape == (tokens, hidden)
    checked("embed_layer_norm", moved(arguments_for("embed_layer_norm", 0), dtype), launches=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cuda_sums_over_nothing_are_zero(dtype: torch.dtype) -> None:
    """A layer without FFN or heads: GELU(bias), and LayerNorm(bias + residual)."""
    empty = [torch.empty(5, 0), torch.empty(24, 0), randn(2, 24)]
    checked("linear_gelu", moved(empty, dtype), launches=False)
    arguments = moved(arguments_for("linear_add_layer_norm", 5, 90, 0), dtype)
    checked("linear_add_layer_norm", arguments)
    assert ON_GPU or native().launches() == 1  # LayerNorm alone
    strided = arguments[2].new_empty(180)[::2].copy_(arguments[2])
    checked("linear_add_layer_norm", [*arguments[:2], strided, *arguments[3:]])


def test_wrong_values_never_lead_outside_on_cuda() -> None:
    """cu_seqlens and ids that a check would refuse are clamped by the kernels."""
    qkv, _, _, head_dim = moved(attention_arguments((40,), 1, 32), torch.float16)
    for wrong in ([0, 20, 920], [-5, 20, 40], [0, 30, 20]):
        bounds = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
        run("attention", [qkv, bounds, 64, head_dim])
    for ids_dtype in (torch.int32, torch.int64):
        arguments = moved(arguments_for("embed_layer_norm", 9, 48), torch.float32)
        rows = [table.size(0) for table in arguments[3:6]]
        for shift, clamped in ((10_000, [count - 1 for count in rows]), (-10_000, [0, 0, 0])):
            shifted = [(one + shift).to(ids_dtype) for one in arguments[:3]]
            expected = [torch.full_like(one, value) for one, value in zip(shifted, clamped, strict=True)]
            output = run("embed_layer_norm", [*shifted, *arguments[3:]])
            within_budget("embed_layer_norm", output, [*expected, *arguments[3:]])


@needs_gpu
@pytest.mark.alone
@pytest.mark.parametrize(("op", "dtype"), cases())
def test_cuda_runs_on_the_current_stream_without_waiting(op: str, dtype: torch.dtype) -> None:
    """What a stream does before is seen, though nothing waits for it: the inputs are written late."""
    arguments, stream = arguments_of(op, dtype), torch.cuda.Stream()
    expected = run(op, arguments)
    floating = [one for one in arguments if isinstance(one, Tensor) and one.is_floating_point()]
    kept = [one.clone() for one in floating]
    for one in floating:
        one.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for one, value in zip(floating, kept, strict=True):
            one.copy_(value)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = run(op, arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(output, expected)


@needs_gpu
@pytest.mark.parametrize(("op", "dtype"), cases())
def test_cuda_is_captured_in_a_graph(op: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(op, dtype)
    expected = run(op, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(op, arguments)
    output.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_cuda_runs_on_its_tensors_gpu() -> None:
    arguments = moved_to("cuda:1", attention_arguments((12, 25), 2, 32), torch.float16)
    with torch.cuda.device(0):
        within_budget("attention", run("attention", arguments), arguments)
    mixed = [arguments[0], arguments[1].to("cuda:0"), *arguments[2:]]
    with use_backend("cuda"), pytest.raises(pruned_ops.BackendError, match="several devices"):
        pruned_ops.ops.attention(*mixed)


FIRST_CALL = """
import time, torch, pruned_ops
x, weight, bias = (torch.randn(*size, device="cuda").half() for size in ((64, 96), (72, 96), (72,)))
torch.cuda.synchronize()
with pruned_ops.use_backend("cuda"):
    start = time.perf_counter()
    pruned_ops.ops.linear_gelu(x, weight, bias)
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@needs_gpu
@pytest.mark.alone
def test_the_first_call_on_cuda_compiles_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3
