"""Every op on every backend that is there, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruned_ops
from inputs import (
    INTERPRETED,
    LENGTHS,
    READY,
    SUPPORT,
    arguments_for,
    attention_arguments,
    constant_rows,
    cu_seqlens,
    randn,
)
from numerics import assert_within_budget
from pruned_ops.ops.registry import OPS, use_backend

COMPILED = [backend for backend in READY if backend != "reference"]


def takes_long(backend: str, lengths: Sequence[int], num_heads: int) -> bool:
    """Whether an interpreter would take seconds for these rows of each head."""
    return backend in INTERPRETED and sum(lengths) * num_heads > 300


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 20])
@pytest.mark.parametrize("num_heads", [0, 1, 3, 12])
@pytest.mark.parametrize("backend", READY)
def test_attention(backend: str, num_heads: int, head_dim: int) -> None:
    for lengths in LENGTHS:
        if not takes_long(backend, lengths, num_heads):
            assert_within_budget(
                pruned_ops.ops.attention, backend, attention_arguments(lengths, num_heads, head_dim)
            )


@pytest.mark.parametrize("backend", READY)
def test_attention_is_softmax_attention(backend: str) -> None:
    """Against torch's own attention, one sequence at a time: the reference itself is tested too."""
    lengths, num_heads, head_dim = (7, 33, 1), 3, 16
    arguments = attention_arguments(lengths, num_heads, head_dim)
    with use_backend(backend):
        context = pruned_ops.ops.attention(*arguments)
    for part, out in zip(arguments[0].split(lengths), context.split(lengths), strict=True):
        query, key, value = part.view(-1, 3, num_heads, head_dim).permute(1, 2, 0, 3)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(out, expected.transpose(0, 1).flatten(1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [60, 3e4, 1e8])
@pytest.mark.parametrize("backend", READY)
def test_attention_survives_large_scores(backend: str, factor: float) -> None:
    """Scores of thousands, whose exponentials must be taken of differences; and scores beyond 2^31, whose
    products with the scale are rounded by more than an exponent can hold."""
    arguments = attention_arguments((40, 9), 2, 32)
    arguments[0][:, :128] *= factor
    assert torch.isfinite(assert_within_budget(pruned_ops.ops.attention, backend, arguments)).all()


@pytest.mark.parametrize("backend", READY)
def test_attention_keeps_what_is_not_finite_in_its_sequence(backend: str) -> None:
    """NaN and infinity in one sequence, before and after others in the batch."""
    for bad in (float("nan"), float("inf")):
        qkv, bounds, longest, head_dim = attention_arguments((40, 70, 33), 2, 32)
        qkv[40:110, 7::5] = bad
        with use_backend(backend):
            context = pruned_ops.ops.attention(qkv, bounds, longest, head_dim)
        assert torch.isfinite(context[:40]).all() and torch.isfinite(context[110:]).all()
        assert context[40:110].isnan().any()


@pytest.mark.parametrize("lengths", [(2, 3, 1), (9, 5, 7, 3, 16)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", READY)
def test_short_sequences_keep_what_is_not_finite(backend: str, bad: float, lengths: tuple[int, ...]) -> None:
    """Some kernels take several short sequences at once: a weight of 0 times another's NaN is NaN."""
    qkv, bounds, longest, head_dim = attention_arguments(lengths, 2, 16)
    qkv[lengths[0] : lengths[0] + lengths[1], 64::3] = bad  # in the second sequence, values only
    with use_backend(backend):
        context = pruned_ops.ops.attention(qkv, bounds, longest, head_dim)
    with use_backend("reference"):
        expected = pruned_ops.ops.attention(qkv, bounds, longest, head_dim)
    torch.testing.assert_close(context, expected, atol=2e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("finite", [(600,), (511, 599), (3, 1030), ()])
@pytest.mark.parametrize("backend", READY)
def test_attention_with_scores_of_minus_infinity(backend: str, finite: tuple[int, ...]) -> None:
    """Whole blocks of keys whose scores overflow weigh nothing; where all do, softmax has no value."""
    if backend in INTERPRETED and max(finite, default=0) > 600:
        pytest.skip("an interpreter: minutes")
    qkv = randn(0, max(finite, default=40) + 1, 3 * 16)
    qkv[:, :32] = 0
    qkv[:, 0], qkv[:, 16] = 1e20, -1e20
    for key in finite:
        qkv[key, 16] = 1e-20 * key
    with use_backend(backend):
        context = pruned_ops.ops.attention(qkv, cu_seqlens((qkv.size(0),)), qkv.size(0), 16)
    if finite:
        weights = torch.tensor(finite).float().div(4).softmax(0)
        torch.testing.assert_close(context, (weights @ qkv[list(finite), 32:]).expand_as(context))
    else:
        assert context.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_reference_does_not_take_overflowing_scores_for_masked_ones(dtype: torch.dtype) -> None:
    """Both keys of a sequence score -infinity: its softmax has no value, and must not take others'."""
    qkv = torch.zeros(8, 3, dtype=dtype)
    large = torch.finfo(dtype).max ** 0.75
    qkv[:2] = torch.tensor([large, -large, 1.0])
    qkv[2:, 2] = 777.0
    with use_backend("reference"):
        context = pruned_ops.ops.attention(qkv, cu_seqlens((2, 6)), 6, 1)
        alone = pruned_ops.ops.attention(qkv[:2], cu_seqlens((2,)), 2, 1)
    assert alone.isnan().all() and context[:2].isnan().all() and (context[2:] == 777).all()


@pytest.mark.parametrize("width", [0, 1, 8, 56, 200])
@pytest.mark.parametrize("hidden", [1, 16, 90, 384])
@pytest.mark.parametrize("op", ["linear_gelu", "linear_geglu", "linear_add_layer_norm"])
@pytest.mark.parametrize("backend", READY)
def test_linear_ops(backend: str, op: str, hidden: int, width: int) -> None:
    if backend != "reference" and backend not in OPS[op].kernels:
        with use_backend(backend), pytest.raises(pruned_ops.BackendError, match=f"'{backend}' has no {op}"):
            OPS[op](*arguments_for(op))
        return
    for tokens in (0, 1, 37):
        assert_within_budget(OPS[op], backend, arguments_for(op, tokens, hidden, width))


@pytest.mark.parametrize("hidden", [1, 16, 90, 384])
@pytest.mark.parametrize("op", ["add_layer_norm", "embed_layer_norm"])
@pytest.mark.parametrize("backend", READY)
def test_norms(backend: str, op: str, hidden: int) -> None:
    for tokens in (0, 1, 37):
        assert_within_budget(OPS[op], backend, arguments_for(op, tokens, hidden))


@pytest.mark.parametrize("backend", READY)
def test_gelu_everywhere(backend: str) -> None:
    """The exact GELU where it is 0, where it is x, and between; NaN stays NaN."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4, float("nan")])])
    one = torch.ones(1, 1)
    with use_backend(backend):
        found = pruned_ops.ops.linear_gelu(x[:, None], one, torch.zeros(1))[:, 0]
    torch.testing.assert_close(found, torch.nn.functional.gelu(x), atol=2e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", READY)
def test_add_layer_norm_without_bias(backend: str) -> None:
    arguments = arguments_for("add_layer_norm")
    arguments[1] = None
    assert_within_budget(pruned_ops.ops.add_layer_norm, backend, arguments)


@pytest.mark.parametrize("value", [1.0, 1e4 + 0.1, 123456789.0, -3.3e9])
@pytest.mark.parametrize("hidden", [1, 90, 384, 1030])
@pytest.mark.parametrize("op", ["add_layer_norm", "linear_add_layer_norm", "embed_layer_norm"])
@pytest.mark.parametrize("backend", READY)
def test_layer_norm_of_constant_rows(backend: str, op: str, hidden: int, value: float) -> None:
    """The rounding of a large mean is no variance: a constant row becomes the LayerNorm's bias."""
    arguments = constant_rows(op, hidden, value)
    with use_backend(backend):
        found = OPS[op](*arguments)
    torch.testing.assert_close(found, arguments[-2].expand_as(found), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", READY)
def test_layer_norm_of_rows_with_a_large_mean(backend: str) -> None:
    arguments = arguments_for("add_layer_norm", hidden=384)
    arguments[2] = (arguments[2] * 64).round() + 2.0**22  # whole numbers, exact in fp32 with what is added
    arguments[0], arguments[1] = torch.zeros_like(arguments[2]), None
    assert_within_budget(pruned_ops.ops.add_layer_norm, backend, arguments)


@pytest.mark.parametrize("backend", READY)
def test_layer_norm_of_rows_that_begin_with_an_outlier(backend: str) -> None:
    for outlier in (1e3, -1e6):
        arguments = arguments_for("add_layer_norm", hidden=384)
        arguments[0][:, 0] = outlier
        assert_within_budget(pruned_ops.ops.add_layer_norm, backend, arguments)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 70), max_size=6), st.integers(0, 5), st.sampled_from([8, 16, 32, 33]), st.data()
)
def test_attention_anywhere(lengths: list[int], num_heads: int, head_dim: int, data: st.DataObject) -> None:
    for backend in READY:
        if not takes_long(backend, lengths, num_heads):
            assert_within_budget(
                pruned_ops.ops.attention, backend, attention_arguments(lengths, num_heads, head_dim)
            )


@pytest.mark.parametrize("backend", COMPILED)
def test_a_sequence_alone_is_the_same_in_a_batch(backend: str) -> None:
    qkv, _, _, head_dim = attention_arguments((5, 70, 130), 3, 32)
    with use_backend(backend):
        together = pruned_ops.ops.attention(qkv, cu_seqlens((5, 70, 130)), 130, head_dim)
        alone = pruned_ops.ops.attention(qkv[5:75], cu_seqlens((70,)), 70, head_dim)
    assert torch.equal(together[5:75], alone)


@pytest.mark.parametrize("backend", READY)
def test_keys_that_score_far_below_weigh_nothing(backend: str) -> None:
    """Not even where their values are as large as numbers can be. 2^-126 of those would be 1 and more."""
    arguments = attention_arguments((40,), 1, 16)
    qkv = arguments[0]
    qkv[:, :16] = 0  # every query looks along the first axis, along which the keys' scores go
    qkv[:, 0] = 4
    qkv[:, 16:32] = 0
    qkv[:, 16] = torch.where(torch.arange(40) % 3 == 0, 0.0, -200.0)
    qkv[:, 32:] = torch.where(torch.arange(40) % 3 == 0, 1.0, 3e38)[:, None]
    with use_backend(backend):
        found = OPS["attention"](*arguments)
    torch.testing.assert_close(found, torch.ones(40, 16))


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_large_scores_are_summed_in_short_chains() -> None:
    """A score that is summed in one chain rounds at the size of the whole score at most of its steps. Where
    scores are in the hundreds, this is what the weights' errors are made of."""
    tokens, heads, head_dim = 128, 4, 64
    arguments = attention_arguments((tokens,), heads, head_dim)
    arguments[0][:, : 2 * heads * head_dim] *= 8
    query, key, value = arguments[0].double().view(tokens, 3, heads, head_dim).transpose(0, 2).unbind(1)
    exact, chain = query @ key.transpose(-1, -2), torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for channel in range(head_dim):
        product = query[..., channel, None] * key[..., None, :, channel]
        chain = (chain + product).float().double()
    truth, chained = (
        ((scores / head_dim**0.5).softmax(-1) @ value).transpose(0, 1).flatten(1) for scores in (exact, chain)
    )
    with use_backend("cpu"):
        found = OPS["attention"](*arguments).double()
    assert exact.abs().max() / head_dim**0.5 > 200
    assert (found - truth).norm() < 0.75 * (chained - truth).norm()


CAPABILITY_SCRIPT = """
import sys
sys.path.insert(0, {support!r})
from inputs import LENGTHS, arguments_for, attention_arguments, randn
from by_position import frequencies, stack_arguments
from int8_cases import check_int8
from numerics import assert_within_budget
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.registry import OPS
assert extension.cpu_capability().lower() == {capability!r}, extension.cpu_capability()
assert extension.int8_capability().lower() == {int8!r}, extension.int8_capability()
assert (extension.bf16_capability() or "none").lower() == {bf16!r}, extension.bf16_capability()
check_int8()
for lengths in LENGTHS:
    for head_dim in (8, 20, 32, 64):
        assert_within_budget(OPS["attention"], "cpu", attention_arguments(lengths, 3, head_dim))
for head_dim in (8, 20, 32, 64):
    arguments = attention_arguments((130, 1, 257), 3, head_dim)
    arguments += [None, frequencies(head_dim), 64, randn(1, 3, 41)]
    assert_within_budget(OPS["attention"], "cpu", arguments)
for norm_first, gated in ((True, True), (False, True), (True, False)):
    assert_within_budget(OPS["encoder"], "cpu", stack_arguments((50, 70), norm_first=norm_first, gated=gated))
large_scores = attention_arguments((40, 9), 3, 32)
large_scores[0][:, :192] *= 1e8
assert_within_budget(OPS["attention"], "cpu", large_scores)
for op in OPS:
    for hidden in (1, 90, 384):
        assert_within_budget(OPS[op], "cpu", arguments_for(op, hidden=hidden))
"""


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpu_capability(capability: str) -> None:
    """The paths that this processor would not choose by itself. torch reads the variable once, so: a process
    each."""
    from pruned_ops.ops.backends.cpu import extension

    assert extension is not None
    features = extension.cpu_features()
    if capability != "default" and not features[{"avx2": "avx2", "avx512": "avx512f"}[capability]]:
        pytest.skip(f"this processor has no {capability}")
    # AVX-512 without VNNI has its int8 from AVX2.
    int8 = capability if capability != "avx512" else "avx512_vnni" if features["avx512_vnni"] else "avx2"
    bf16 = "avx512_bf16" if capability == "avx512" and features["avx512_bf16"] else "none"
    running = (extension.cpu_capability(), extension.int8_capability(), extension.bf16_capability() or "none")
    if (capability, int8, bf16) == tuple(name.lower() for name in running):
        pytest.skip(f"all other tests run on {capability}")
    script = CAPABILITY_SCRIPT.format(support=SUPPORT, capability=capability, int8=int8, bf16=bf16)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
