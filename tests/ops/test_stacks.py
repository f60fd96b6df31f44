"""Stacks other than BERT's in one call: LayerNorms that come first, gated FFNs, attention by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pruned_ops
from bf16_cases import in_bf16
from by_position import stack_arguments
from inputs import READY, cu_seqlens, randn
from int8_cases import dequantised, in_int8
from numerics import assert_within_budget
from pruned_ops.ops.backends.cpu import bf16_capability
from pruned_ops.ops.panels import PART_TENSORS, from_panels, gated_rows, is_attention, ungated, ungated_rows
from pruned_ops.ops.registry import OPS, use_backend

ENCODER = OPS["encoder"]
needs_extension = pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
KINDS = [(True, True), (True, False), (False, True), (False, False)]


def part_by_part(arguments: list[Any]) -> Tensor:
    """A stack as its definition says, with torch's modules and `ops.attention`."""
    x, bounds, longest, weights, widths, head_dim, eps, norm_first, gated, *by_position, last = arguments
    positions, rotary, windows, bias = by_position
    heads = 0
    for i, part in enumerate(widths):
        first, first_bias, second, second_bias, *norm = weights[PART_TENSORS * i : PART_TENSORS * (i + 1)]
        taken = F.layer_norm(x, (x.size(1),), *norm, eps) if norm_first and norm[0].numel() else x
        made = F.linear(taken, from_panels(first, first_bias.size(0)), first_bias)
        if is_attention(part):
            own = bias[heads : heads + part]
            heads += part
            window = windows[i] if windows[i] >= 0 else None
            made = OPS["attention"].reference(
                made, bounds, longest, head_dim, positions, rotary[i], window, own
            )
        elif gated:
            gate, up = ungated(made, -1 - part)
            made = F.gelu(gate) * up
        else:
            made = F.gelu(made)
        made = F.linear(made, from_panels(second, x.size(1)), second_bias)
        x = x + made if norm_first else F.layer_norm(x + made, (x.size(1),), *norm, eps)
    return F.layer_norm(x, (x.size(1),), *last, eps)


@pytest.mark.parametrize("width", [0, 1, 15, 16, 17, 40])
def test_gated_rows_come_back(width: int) -> None:
    for rows in (randn(0, 2 * width, 7), randn(0, 2 * width)):
        ordered = gated_rows(rows)
        assert ordered.size(0) % 32 == 0 and torch.equal(ungated_rows(ordered, width), rows)
    x, weight = randn(1, 5, 7), randn(0, 2 * width, 7)
    gate, up = ungated(F.linear(x, gated_rows(weight)), width)
    torch.testing.assert_close(torch.cat([gate, up], 1), F.linear(x, weight))


@pytest.mark.parametrize(("norm_first", "gated"), KINDS)
def test_the_reference_is_its_definition(norm_first: bool, gated: bool) -> None:
    arguments = stack_arguments((40, 0, 13), norm_first=norm_first, gated=gated)
    torch.testing.assert_close(ENCODER.reference(*arguments), part_by_part(arguments), atol=2e-6, rtol=1e-5)


@needs_extension
@pytest.mark.parametrize(("hidden", "head_dim", "width"), [(48, 16, 40), (90, 20, 15), (384, 64, 200)])
@pytest.mark.parametrize(("norm_first", "gated"), KINDS)
def test_stacks(norm_first: bool, gated: bool, hidden: int, head_dim: int, width: int) -> None:
    """Rows around the sizes of blocks and chunks; widths that fill no panel."""
    for lengths in ((), (0,), (1,), (5, 0, 32), (193, 37)):
        arguments = stack_arguments(lengths, hidden, head_dim, norm_first, gated, width=width)
        assert_within_budget(ENCODER, "cpu", arguments)


@needs_extension
def test_stacks_in_groups() -> None:
    """More tokens than go through at once, cut between sequences: positions are cut with them."""
    assert_within_budget(ENCODER, "cpu", stack_arguments((900, 0, 1, 700, 30), 32, width=24))


@needs_extension
@pytest.mark.parametrize("heads", [(0,), (0, 0), (2, 0, 0, 1), ()])
def test_stacks_without_heads(heads: tuple[int, ...]) -> None:
    for norm_first in (True, False):
        assert_within_budget(ENCODER, "cpu", stack_arguments((5, 40), norm_first=norm_first, heads=heads))


@needs_extension
def test_a_part_of_a_stack_runs_alone() -> None:
    """From an FFN on, whose norm comes first, and without what attentions may have."""
    whole = stack_arguments((5, 150))
    for first in (1, 3):
        part = [*whole[:3], whole[3][PART_TENSORS * first :], whole[4][first:], *whole[5:9]]
        assert_within_budget(ENCODER, "cpu", part)
        assert_within_budget(ENCODER, "cpu", [*part, None, None, None, None, whole[13]])


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in READY])
def test_a_stack_lies_in_rows_as_it_is_traced(backend: str) -> None:
    """Whatever the layout of x: compiled code relies on the strides of the reference."""
    x, *rest = stack_arguments((5, 3))
    columns_first = x.t().contiguous().t()
    for more in (rest[:-1], [*rest[:2], [], [], *rest[4:6]]):  # without a final norm; without any part
        with use_backend(backend):
            torch.library.opcheck(ENCODER.overload, (columns_first, *more), test_utils="test_faketensor")
            assert ENCODER(columns_first, *more).is_contiguous()


@needs_extension
def test_rows_of_a_stack_do_not_depend_on_each_other() -> None:
    """A sequence alone, and with any number of threads, gives the same bits."""
    whole = stack_arguments((50, 150))
    alone = [whole[0][50:], cu_seqlens((150,)), 150, *whole[3:9], whole[9][50:], *whole[10:]]
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        expected = ENCODER(*whole)
        assert torch.equal(ENCODER(*alone), expected[50:])
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            assert torch.equal(ENCODER(*whole), expected)
        finally:
            torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize(("norm_first", "gated"), KINDS)
@pytest.mark.parametrize("linears", [(0, 1), (0,), (1,)])
def test_stacks_in_int8(linears: tuple[int, ...], norm_first: bool, gated: bool) -> None:
    """The error is that of the reference in int8, of quantised activations, and little besides."""
    exact = stack_arguments((70, 0, 33), 96, 32, norm_first, gated, width=72)
    arguments = in_int8(exact, linears)
    with use_backend("reference"):
        budget = ENCODER(*arguments) - (truth := ENCODER(*dequantised(arguments, exact)))
    with use_backend("cpu"):
        error = ENCODER(*arguments) - truth
    assert error.square().mean() <= 1.3 * budget.square().mean() + 1e-8
    assert error.abs().max() <= 2 * budget.abs().max() + 1e-4


@needs_extension
@pytest.mark.skipif(bf16_capability() is None, reason="this processor has no AVX512_BF16")
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64])
@pytest.mark.parametrize(("norm_first", "gated"), KINDS)
def test_stacks_in_bfloat16(norm_first: bool, gated: bool, head_dim: int) -> None:
    """Attention in bfloat16 rounds q, k and v, twice where they are rotated, and the softmax's weights: the
    error is at most three times that of a reference that rounds the linears' inputs alone."""
    exact = stack_arguments((70, 0, 33, 530), 96, head_dim, norm_first, gated, width=72)
    arguments = in_bf16(exact)
    with use_backend("reference"):
        truth, rounded = ENCODER(*exact), ENCODER(*arguments)
    with use_backend("cpu"):
        found = ENCODER(*arguments)
    assert (found - truth).square().mean() <= 3 * (rounded - truth).square().mean()


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in READY])
def test_wrong_stacks_are_refused_by_name(backend: str) -> None:
    good = stack_arguments((5, 3))
    for place, bad, named in (
        (9, good[9].long(), "positions is"),
        (9, good[9].flip(0), "positions must be at least 0 and rise"),
        (10, good[10][:-1], "rotary has shape"),
        (11, good[11][:-1], "windows has 5 numbers"),
        (12, good[12][:-1], "position_bias has shape"),
        (13, good[13][:1], "final_norm has shape"),
        (3, [good[3][0], good[3][1], *good[3][2:6], good[3][6][:-1], *good[3][7:]], "first weight has shape"),
    ):
        with use_backend(backend), pytest.raises(RuntimeError, match=f"encoder: {named}"):
            pruned_ops.ops.encoder(*good[:place], bad, *good[place + 1 :])
