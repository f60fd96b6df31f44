"""int8 in `ops.encoder`: weights for it, and checks that every CPU capability has to pass.

The sums of int8 products are exact everywhere, so kernels and reference differ by float rounding alone as
long as they quantise the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzzing import guarded_all
from inputs import cu_seqlens, encoder_arguments, generator, randn
from pruned_ops.ops import reference
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.panels import (
    LEVELS,
    PART_TENSORS,
    attention_part,
    ffn_part,
    from_int8_panels,
    from_panels,
    gated_rows,
    inner_width,
    int8_linear,
    to_int8_panels,
    to_panels,
    ungated,
)
from pruned_ops.ops.registry import OPS, use_backend

DEPTHS = (1, 2, 3, 4, 5, 7, 8, 13, 64, 387, 4099)
WIDTHS = (1, 8, 15, 16, 17, 31, 32, 33, 49, 65)
ROWS = (1, 2, 5, 6, 7, 13, 17, 33, 97)


def in_int8(arguments: list[Any], linears: Sequence[int] = (0, 1)) -> list[Any]:
    """`encoder`'s arguments with the first (0) or second (1) linears of all parts in int8."""
    weights = list(arguments[3])
    for part in range(0, len(weights), PART_TENSORS):
        for linear in linears:
            at = part + 2 * linear
            panels, scales = to_int8_panels(from_panels(weights[at], weights[at + 1].size(0)))
            weights[at : at + 2] = [panels, torch.stack([weights[at + 1], scales])]
    return [*arguments[:3], weights, *arguments[4:]]


def edge_arguments() -> list[list[Any]]:
    """`encoder`'s arguments for int8 FFNs with rows, depths and widths at the edges of tiles of AMX, of 16
    rows of 64 bytes, and beside them."""
    cases = []
    for rows, hidden, width in (
        (16, 64, 64),
        (17, 63, 65),
        (31, 65, 33),
        (33, 100, 1),
        (49, 128, 200),
        (96, 1, 63),
        (128, 72, 80),
    ):
        x, bounds, longest, weights, widths, *rest = in_int8(
            encoder_arguments(rows, hidden, width, seed=rows)
        )
        cases.append([x, bounds, longest, weights[PART_TENSORS:], widths[1:], *rest])  # without the attention
    return cases


def extreme_arguments(rows: int, inputs: int, width: int, values: Tensor, weight: Tensor) -> list[Any]:
    """`encoder`'s arguments for one FFN whose output shows each number of its int8 linear.

    values (rows, inputs), weight (width, inputs): both of 1 and -1, so that every byte is at an end. The bias
    keeps all sums where GELU is the identity, the second linear hands the first `inputs` of them on, and a
    large eps leaves LayerNorm nothing to do but to take the mean off.
    """
    eps = 1e10
    panels, scales = to_int8_panels(weight)
    bias = torch.full((width,), inputs + 10.0)
    second = torch.eye(inputs, width)
    norm = [torch.full((inputs,), eps**0.5), torch.zeros(inputs)]
    weights = [panels, torch.stack([bias, scales]), to_panels(second), torch.zeros(inputs), *norm]
    bounds = torch.tensor([0, rows], dtype=torch.int32)
    return [values, bounds, rows, weights, [ffn_part(width)], 16, eps]


def signs(seed: int, rows: int, columns: int) -> Tensor:
    """Rows of 1, of -1, of both in turn, and of any of them."""
    table = torch.randint(0, 2, (rows, columns), generator=generator(seed)).float() * 2 - 1
    table[0::4], table[1::4] = 1, -1
    table[2::4, 1::2], table[2::4, 0::2] = -1, 1
    return table


def check_extremes() -> None:
    """All bytes at their ends, in sums of one sign and of both, at odd sizes and over a longer depth than any
    model's: nothing overflows or saturates, and no byte outside the arguments is touched."""
    for number, inputs in enumerate(DEPTHS):
        for place, width in enumerate(WIDTHS):
            rows = ROWS[(number + place) % len(ROWS)]
            values, weight = signs(number, rows, inputs), signs(place + 1, width, inputs)
            arguments = extreme_arguments(rows, inputs, width, values, weight)
            with use_backend("reference"):
                expected = OPS["encoder"](*arguments)
            with use_backend("cpu"):
                found = OPS["encoder"](*guarded_all(arguments, at_end=(number + place) % 2 == 0))
            torch.testing.assert_close(found, expected, atol=1e-3 + inputs * 1e-6, rtol=1e-5)


def check_layers(linears: Sequence[int]) -> None:
    """A stack computes the reference. With int8 in second linears alone the numbers that are quantised are
    the same: rounding may move a value to the next one, rarely and no further. First linears bring attention
    in bfloat16 or a shorter GELU with them: what that adds is small beside the error of int8 itself."""
    for hidden, width in ((90, 72), (16, 0), (1, 16), (384, 200)):
        for tokens in (0, 1, 13, 230):
            # With seed 1 one value moves among 13 tokens of 384, and with it a whole row: more than 2%.
            exact = encoder_arguments(tokens, hidden, width, seed=2)
            arguments = in_int8(exact, linears)
            with use_backend("reference"):
                expected = OPS["encoder"](*arguments)
                truth = OPS["encoder"](*dequantised(arguments, exact))
            with use_backend("cpu"):
                found = OPS["encoder"](*arguments)
            error = (found - expected).abs()
            if not tokens:
                assert found.shape == expected.shape
            elif linears == (1,) or not width:
                assert bool((error < 0.2).all()) and (error > 1e-4).float().mean() < 0.02
            else:
                own, budget = found - truth, expected - truth
                assert own.square().mean() <= 1.3 * budget.square().mean() + 1e-8
                assert own.abs().max() <= 2 * budget.abs().max() + 1e-4


def dequantised(arguments: list[Any], exact: list[Any]) -> list[Any]:
    """int8 `arguments` with their weights in fp32, so that no activation is quantised. exact: what they were
    made of."""
    weights = list(arguments[3])
    for part, _ in enumerate(arguments[4]):
        for place in (PART_TENSORS * part, PART_TENSORS * part + 2):
            if weights[place].dtype == torch.int8:
                bias, scales = weights[place + 1]
                values = from_int8_panels(weights[place], bias.size(0), exact[3][place].size(1))
                weights[place : place + 2] = [to_panels(values.float() * scales[:, None]), bias]
    return [*arguments[:3], weights, *arguments[4:]]


def bare_part(
    part: int, first: Tensor, bias: Tensor, x: Tensor, head_dim: int, lengths: Sequence[int]
) -> list[Any]:
    """`encoder`'s arguments for one int8 part that adds what lies between its linears to x and takes the mean
    off: its second linear is the identity, and a large eps leaves LayerNorm nothing else to do."""
    eps = 1e10
    hidden, inner = x.size(1), inner_width(part, head_dim)
    weights: list[Tensor] = []
    for weight, added in ((first, bias), (torch.eye(hidden, inner), torch.zeros(hidden))):
        panels, scales = to_int8_panels(weight)
        weights += [panels, torch.stack([added, scales])]
    weights += [torch.full((hidden,), eps**0.5), torch.zeros(hidden)]
    return [x, cu_seqlens(lengths), max(lengths), weights, [part], head_dim, eps]


def check_gelu() -> None:
    """Quantised GELU is within half a step of the exact one, and within 2e-4 besides."""
    for low, high in ((-7.0, 0.5), (-1.0, 9.0), (-0.01, 0.02)):
        size = 640
        x = torch.zeros(1, size)
        x[0, 0] = 1.0  # quantised without an error, as a weight alone in its row is
        values = torch.linspace(low, high, size)
        values[1] = 0.0  # shows the mean that LayerNorm takes off
        first = torch.zeros(size, size)
        first[:, 0] = values
        with use_backend("cpu"):
            found = OPS["encoder"](*bare_part(ffn_part(size), first, torch.zeros(size), x, 16, [1]))
        exact = F.gelu(values.double())
        step = float(exact.abs().max()) / LEVELS
        error = (found[0] - found[0, 1] - x[0]).double() - exact
        assert error.abs().max() <= step / 2 + min(2e-4, step / 20)


def check_gated() -> None:
    """Gated units of any number, all of them below 0, are quantised and multiplied as they are: a value that
    moves to the next one is all that differs. Channels whose scales differ, and no LayerNorm, show what all
    channels have too much or too little."""
    hidden = 33
    for place, width in enumerate((*range(1, 18), 20, 31, 40, 63, 72)):
        rows = ROWS[place % len(ROWS)]
        x, weight = randn(place, rows, hidden), randn(1, 2 * width, hidden) / hidden
        bias = torch.cat([torch.full((width,), 6.0), torch.full((width,), -6.0)])
        first, first_scales = to_int8_panels(gated_rows(weight))
        first_bias = torch.stack([gated_rows(bias), first_scales])
        rising = torch.logspace(-2, 2, hidden)[:, None]
        second, second_scales = to_int8_panels(randn(2, hidden, width) * rising)
        second_bias = torch.stack([torch.zeros(hidden), second_scales])
        weights = [first, first_bias, second, second_bias, torch.empty(0), torch.empty(0)]
        with use_backend("cpu"):
            found = OPS["encoder"](
                x, cu_seqlens((rows,)), rows, weights, [ffn_part(width)], 16, 1e-5, True, True
            )
        gate, up = ungated(int8_linear(x, first, first_bias), width)
        units = F.gelu(gate) * up
        assert bool((units < 0).all())
        step = units.abs().amax(1, keepdim=True) / LEVELS * (second_scales * LEVELS)
        error = (found - x - int8_linear(units, second, second_bias)).abs()
        assert bool((error <= 1.01 * step + 1e-5).all()), f"{width} units"


def check_attention() -> None:
    """Attention behind an int8 linear, at all sizes of heads and blocks. Where it runs in bfloat16, q, k, v
    and the softmax's weights are rounded to it, and nothing else; a value of v in the middle of two may go to
    the other one."""
    in_bf16 = extension is not None and extension.bf16_capability() is not None
    for head_dim, heads, lengths, scale in (
        (16, 3, (1, 16, 17, 33, 50), 1.0),
        (32, 2, (97, 0, 31), 3.0),
        (48, 1, (530, 2), 1.0),
        (64, 2, (1100, 15), 6.0),
        (128, 1, (12, 48), 1.0),
        (8, 2, (20, 3), 1.0),
    ):
        inner = heads * head_dim
        x = randn(head_dim, sum(lengths), inner)
        first = randn(1, 3 * inner, inner) / inner**0.5
        first[: 2 * inner] *= scale
        bias = randn(2, 3 * inner)
        arguments = bare_part(attention_part(heads), first, bias, x, head_dim, lengths)
        # The identity's own error is not of interest here.
        arguments[3][2:4] = [to_panels(torch.eye(inner)), torch.zeros(inner)]
        qkv = int8_linear(x, *arguments[3][:2])
        rounded = in_bf16 and head_dim % 16 == 0
        if rounded:
            qkv = qkv.bfloat16().float()
        context = reference.attention(qkv.double(), arguments[1], max(lengths), head_dim)
        with use_backend("cpu"):
            found = OPS["encoder"](*arguments)
        expected = context + x - (context + x).mean(1, keepdim=True)
        largest = float(qkv[:, 2 * inner :].abs().max())
        assert (found - expected).abs().max() <= (8e-3 if rounded else 1e-4) * largest


def check_values_that_are_no_numbers() -> None:
    """NaN and infinities stay in their token; all others keep their bits."""
    arguments = in_int8(encoder_arguments(20, 32, 0, seed=2))
    with use_backend("cpu"):
        clean = OPS["encoder"](*arguments)
        for bad in (float("nan"), float("inf"), -float("inf")):
            spoilt = arguments[0].clone()
            spoilt[7, 3] = bad
            found = OPS["encoder"](spoilt, *arguments[1:])
            assert found[7].isnan().all()
            assert torch.equal(found[:7], clean[:7]) and torch.equal(found[8:], clean[8:])


def check_int8() -> None:
    """All checks, on the capability of this process."""
    check_extremes()
    for linears in ((0, 1), (0,), (1,)):
        check_layers(linears)
    check_values_that_are_no_numbers()
    check_gelu()
    check_gated()
    check_attention()
