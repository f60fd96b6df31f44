"""Attention by positions: rotary, a window, a bias; against their definitions, pair by pair, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import pruned_ops
from by_position import frequencies, with_gaps
from inputs import LENGTHS, READY, attention_arguments, cu_seqlens, moved_to, randn
from numerics import assert_within_budget
from pruned_ops.ops.reference import check_attention_values
from pruned_ops.ops.registry import BackendError, use_backend

KERNELS = [backend for backend in ("reference", "cpu") if backend in READY]
# Triton's with the sizes of heads that they take (another is refused), on fewer tokens: they are interpreted.
BY_HEAD_DIM = [
    *((backend, head_dim) for backend in KERNELS for head_dim in (2, 6, 16, 32, 64, 80)),
    *(("triton", head_dim) for head_dim in (16, 64) if "triton" in READY),
]
RAGGED, SHORTER = (5, 0, 700, 1, 64, 130), (5, 0, 41, 1)


def by_definition(
    qkv: Tensor,
    lengths: Sequence[int],
    head_dim: int,
    positions: Tensor,
    rotary: Tensor | None,
    window: int | None,
    position_bias: Tensor | None,
) -> Tensor:
    """Each sequence for itself, in fp64: rotations are products of complex numbers, windows and biases are
    looked up for each pair of tokens."""
    contexts = []
    for part, place in zip(qkv.double().split(list(lengths)), positions.split(list(lengths)), strict=True):
        query, key, value = part.view(part.size(0), 3, qkv.size(1) // (3 * head_dim), head_dim).permute(
            1, 2, 0, 3
        )
        if rotary is not None:
            angle = (place[:, None].float() * rotary).double()  # in fp32, as models have it
            turn = torch.polar(torch.ones_like(angle), angle)
            query, key = _turned(query, turn), _turned(key, turn)
        scores = query @ key.transpose(1, 2) / head_dim**0.5
        away = place[None, :].long() - place[:, None].long()
        if position_bias is not None:
            reach = position_bias.size(1) // 2
            scores = scores + position_bias.double()[:, away.clamp(-reach, reach) + reach]
        if window is not None:
            scores = scores.masked_fill(away.abs() > window, -torch.inf)
        contexts.append((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * turn
    return torch.cat([turned.real, turned.imag], -1)


def in_order(lengths: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).to(torch.int32)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("backend", "head_dim"), BY_HEAD_DIM)
def test_rotary_window_and_bias_are_their_definitions(backend: str, head_dim: int, gaps: bool) -> None:
    heads, lengths = 2, SHORTER if backend == "triton" else RAGGED
    arguments = attention_arguments(lengths, heads, head_dim)
    positions = with_gaps(lengths) if gaps else in_order(lengths)
    rotary, bias = frequencies(head_dim), randn(1, heads, 2 * 20 + 1) * 3
    windows = () if backend == "triton" else ((None, 64, None), (None, 0, None), (None, 600, None))
    for given in ((rotary, None, None), *windows, (None, None, bias), (rotary, 33, bias)):
        with use_backend(backend):
            found = pruned_ops.ops.attention(*arguments, positions if gaps else None, *given)
        expected = by_definition(arguments[0], lengths, head_dim, positions, *given)
        torch.testing.assert_close(found.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("head_dim", "longest"), [(8, 530), (6, 130), (64, 130)])
@pytest.mark.parametrize("backend", KERNELS)
def test_disentangled_attention_is_its_definition(
    backend: str, head_dim: int, longest: int, gaps: bool
) -> None:
    """For each pair of tokens the row of their distance is looked up: in tables that rise by 1 at most, and
    in steps; with either product, and with both, beside a window and a bias."""
    lengths, heads, reach = (5, 0, longest, 1, 49), 2, 70
    qkv, *others = attention_arguments(lengths, heads, head_dim)
    positions, distance = with_gaps(lengths) if gaps else in_order(lengths), torch.arange(-reach, reach + 1)
    keys, queries = (randn(i, heads, 100, head_dim) for i in (1, 2))
    gradual = distance.sign() * distance.abs().clamp_max(20).add(distance.abs() // 3) + 50
    steep = (distance > -60).int() * 40 + (distance > 3).int() * 59
    bias = randn(3, heads, 2 * 20 + 1)
    for rows in (gradual.int().cummax(0)[0], steep):
        for key, query, more in ((keys, queries, (33, bias)), (keys, None, (None, None)),
                                 (None, queries, (None, None))):  # fmt: skip
            with use_backend(backend):
                given = (positions if gaps else None, None, *more, key, query, rows)
                found = pruned_ops.ops.attention(qkv, *others, *given)
            expected = []
            for part, place in zip(qkv.double().split(lengths), positions.split(lengths), strict=True):
                q, k, v = part.view(len(part), 3, heads, head_dim).permute(1, 2, 0, 3)
                away = place[None, :].long() - place[:, None].long()
                row = rows[away.clamp(-reach, reach) + reach].long()
                scores = q @ k.transpose(1, 2)
                if key is not None:
                    scores = scores + torch.einsum("hqd,hqkd->hqk", q, key.double()[:, row])
                if query is not None:
                    scores = scores + torch.einsum("hkd,hqkd->hqk", k, query.double()[:, row])
                scores = scores / (head_dim * (1 + (key is not None) + (query is not None))) ** 0.5
                if more[0] is not None:
                    scores = scores + bias.double()[:, away.clamp(-20, 20) + 20]
                    scores = scores.masked_fill(away.abs() > more[0], -torch.inf)
                expected.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            torch.testing.assert_close(found.double(), torch.cat(expected), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 15, 47, 130, 513, 10**18])
@pytest.mark.parametrize("backend", READY)
def test_windows_at_the_edges_of_blocks(backend: str, window: int) -> None:
    """A kernel without windows says so; `assert_within_budget` checks that."""
    for lengths in [(530, 49, 1100), *LENGTHS] if backend in KERNELS else [(5, 3, 9), (33, 1, 40)]:
        arguments = [*attention_arguments(lengths, 3 if backend in KERNELS else 1, 32), None, None, window]
        assert_within_budget(pruned_ops.ops.attention, backend, arguments)
        arguments[4] = with_gaps(lengths)
        assert_within_budget(pruned_ops.ops.attention, backend, arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_window_ends_where_it_says(backend: str) -> None:
    """A key as far as the window counts, and one farther does not: values are one-hot, scores all 0."""
    tokens, window = 9, 2
    qkv = torch.zeros(tokens, 3 * 16)
    qkv[:, 32 : 32 + tokens] = torch.eye(tokens)
    with use_backend(backend):
        context = pruned_ops.ops.attention(qkv, cu_seqlens((tokens,)), tokens, 16, None, None, window)
    for query, row in enumerate(context[:, :tokens]):
        near = [key for key in range(tokens) if abs(key - query) <= window]
        assert row.nonzero().flatten().tolist() == near
        torch.testing.assert_close(row[near], torch.full((len(near),), 1 / len(near)))


@pytest.mark.parametrize("backend", KERNELS)
def test_what_lies_outside_a_window_is_not_looked_at(backend: str) -> None:
    """The largest scores are outside: they must not shift the softmax either."""
    arguments = attention_arguments((900,), 1, 32)
    arguments[0][600:, :64] *= 1e4
    with use_backend(backend):
        context = pruned_ops.ops.attention(*arguments, None, None, 64)
        alone = pruned_ops.ops.attention(arguments[0][:600], cu_seqlens((600,)), 600, 32, None, None, 64)
    torch.testing.assert_close(context[:536], alone[:536], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_only_differences_of_positions_count(backend: str) -> None:
    """Left padding shifts all positions, and changes nothing beyond rounding."""
    lengths = (40, 90)
    arguments = attention_arguments(lengths, 2, 32)
    rotary, bias = frequencies(32), randn(1, 2, 41)
    with use_backend(backend):
        plain = pruned_ops.ops.attention(*arguments, None, rotary, 30, bias)
        shifted = pruned_ops.ops.attention(*arguments, in_order(lengths) + 17, rotary, 30, bias)
    torch.testing.assert_close(plain, shifted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_sequence_alone_is_the_same_by_position(backend: str) -> None:
    qkv, _, _, head_dim = attention_arguments((5, 270, 130), 3, 32)
    by_position = (frequencies(32), 64, randn(3, 3, 65))
    with use_backend(backend):
        together = pruned_ops.ops.attention(qkv, cu_seqlens((5, 270, 130)), 270, head_dim, None, *by_position)
        alone = pruned_ops.ops.attention(qkv[5:275], cu_seqlens((270,)), 270, head_dim, None, *by_position)
    assert torch.equal(together[5:275], alone) if backend == "cpu" else torch.allclose(together[5:275], alone)


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_threads_share_a_window_without_changing_a_bit() -> None:
    arguments = [*attention_arguments((700, 30, 300), 4, 32), None, frequencies(32), 64, randn(0, 4, 33)]
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        expected = pruned_ops.ops.attention(*arguments)
        try:
            torch.set_num_threads(1 if threads > 1 else 3)
            assert torch.equal(pruned_ops.ops.attention(*arguments), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (2, 0)])
def test_mpnets_bias_is_a_table_of_its_diagonals(heads: tuple[int, ...]) -> None:
    """Its buckets no longer change from a distance of 128 on. Pruned heads take their columns along."""
    tokens, head_dim = 300, 16
    weights = randn(0, 32, 4)[:, list(heads)]
    distances = torch.arange(-128, 129)
    table = weights[MPNetEncoder.relative_position_bucket(distances)].t()
    away = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    bias = weights[MPNetEncoder.relative_position_bucket(away)].permute(2, 0, 1)
    arguments = attention_arguments((tokens,), len(heads), head_dim)
    query, key, value = arguments[0].view(tokens, 3, len(heads), head_dim).permute(1, 2, 0, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias)
    found = pruned_ops.ops.attention(*arguments, None, None, None, table)
    torch.testing.assert_close(found, expected.transpose(0, 1).flatten(1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_wrong_positions_are_refused_by_name(backend: str) -> None:
    good = attention_arguments((5, 3), 2, 16)
    places, rows = in_order((5, 3)), torch.tensor([0, 1, 2], dtype=torch.int32)
    cases: list[tuple[list[Any], str]] = [
        ([places.long()], "positions is"),
        ([places[:-1]], "positions has shape"),
        (
            [torch.tensor([0, 1, 2, 2, 3, 0, 1, 2], dtype=torch.int32)],
            "positions must be at least 0 and rise",
        ),
        ([places - 1], "positions must be at least 0 and rise"),
        # The largest number twice, and as far from the first as if all rose by 1.
        (
            [torch.tensor([0, 1, 2, 3, 4, *(2**31 - n for n in (3, 1, 1))], dtype=torch.int32)],
            "positions must be at least 0 and rise",
        ),
        ([None, frequencies(32)], "rotary has shape"),
        ([None, None, -1], "window is -1"),
        ([None, None, None, randn(0, 3, 5)], "position_bias has shape"),
        ([None, None, None, randn(0, 2, 4)], "position_bias has shape"),
        ([None] * 4 + [randn(0, 2, 9, 16)], "distance_rows goes with position"),
        ([None] * 6 + [rows], "distance_rows goes with position"),
        ([None] * 4 + [randn(0, 3, 9, 16), None, rows], "position_key has shape"),
        ([None] * 4 + [randn(0, 2, 9, 16), randn(0, 2, 9, 8), rows], "position_query has shape"),
        ([None] * 4 + [randn(0, 9), None, rows], "position_key has shape"),
        ([None] * 4 + [randn(0, 2, 9, 16), None, rows.long()], "distance_rows is"),
        ([None] * 4 + [randn(0, 2, 9, 16), None, rows[None]], "distance_rows is"),
        ([None] * 4 + [randn(0, 2, 2, 16), None, rows], "distance_rows must lie between 0 and 1, and never"),
        ([None] * 4 + [randn(0, 2, 9, 16), None, rows.flip(0)], "distance_rows must lie between 0 and 8"),
    ]
    with use_backend(backend):
        for bad, named in cases:
            with pytest.raises(RuntimeError, match=f"attention: {named}"):
                pruned_ops.ops.attention(*good, *bad)
        with pytest.raises(RuntimeError, match="head_dim is 15, and rotary takes channels in pairs"):
            pruned_ops.ops.attention(*attention_arguments((5,), 1, 15), None, torch.ones(7))


def test_positions_are_checked_where_they_lie() -> None:
    """A GPU's under debug(), where torch's default device is another; here that is one without values."""
    arguments = [*attention_arguments((5, 3), 2, 16), in_order((5, 3))]
    fallen = [*arguments[:4], in_order((5, 3)).flip(0)]
    with torch.device("meta"):
        check_attention_values(*arguments)
        with pytest.raises(RuntimeError, match="attention: positions must be at least 0 and rise"):
            check_attention_values(*fallen)


@pytest.mark.parametrize("backend", KERNELS)
def test_integers_are_taken_in_any_layout(backend: str) -> None:
    """Every second number of a longer tensor, and one number that stands for all."""
    lengths, heads, head_dim = (5, 3), 2, 16
    qkv, bounds, *sizes = attention_arguments(lengths, heads, head_dim)
    key, places = randn(0, heads, 9, head_dim), with_gaps(lengths)
    rows = torch.tensor([0, 0, 4, 8, 8], dtype=torch.int32)
    spread = [torch.full((2 * len(each),), 10_000, dtype=torch.int32)[::2] for each in (bounds, places, rows)]
    for view, each in zip(spread, (bounds, places, rows), strict=True):
        view.copy_(each)
    one = torch.full((1,), 3, dtype=torch.int32).expand(5)
    with use_backend(backend):
        for laid_out, plain in (
            (spread, (bounds, places, rows)),
            ((bounds, places, one), (bounds, places, one.clone())),
        ):
            found, expected = (
                pruned_ops.ops.attention(qkv, own, *sizes, place, *[None] * 3, key, None, distances)
                for own, place, distances in (laid_out, plain)
            )
            assert torch.equal(found, expected)


def test_cuda_kernels_refuse_positions_by_name() -> None:
    arguments = [*moved_to("cpu", attention_arguments((5,), 1, 32), torch.float16), None, frequencies(32), 4]
    refusal = str(pruned_ops.ops.attention.kernels["cuda"].refuse(*arguments))
    assert "rotary and window given; the kernel knows no positions, Triton's do" in refusal
    with pytest.raises(BackendError), use_backend("cuda"):
        pruned_ops.ops.attention(*arguments)


@pytest.mark.skipif("triton" not in READY, reason="Triton's interpreter is off")
def test_triton_refuses_products_by_distance_by_name() -> None:
    rows = torch.zeros(9, dtype=torch.int32)
    more = [None, None, None, None, torch.zeros(1, 4, 32), None, rows]
    with (
        pytest.raises(BackendError, match="position_key and distance_rows given; .* only those of the cpu"),
        use_backend("triton"),
    ):
        pruned_ops.ops.attention(*attention_arguments((5,), 1, 32), *more)
