"""int8 in `ops.encoder`: weights for it, and checks that every CPU capability has to pass.

The sums of int8 products are exact everywhere, so kernels and reference differ by float rounding alone as
long as they quantise the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuzzing import guarded_all
from inputs import encoder_arguments, generator
from pruned_ops.ops.panels import PART_TENSORS, ffn_part, from_panels, to_int8_panels, to_panels
from pruned_ops.ops.registry import OPS, use_backend

DEPTHS = (1, 2, 3, 4, 5, 7, 8, 13, 64, 387, 4099)
WIDTHS = (1, 8, 15, 16, 17, 31, 32, 33, 49, 65)
ROWS = (1, 2, 5, 6, 7, 13)


def in_int8(arguments: list[Any], linears: Sequence[int] = (0, 1)) -> list[Any]:
    """`encoder`'s arguments with the first (0) or second (1) linears of all parts in int8."""
    weights = list(arguments[3])
    for part in range(0, len(weights), PART_TENSORS):
        for linear in linears:
            at = part + 2 * linear
            panels, scales = to_int8_panels(from_panels(weights[at], weights[at + 1].size(0)))
            weights[at : at + 2] = [panels, torch.stack([weights[at + 1], scales])]
    return [*arguments[:3], weights, *arguments[4:]]


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
    """A stack computes the reference: rounding may move a value to the next one, rarely and no further."""
    for hidden, width in ((90, 72), (16, 0), (1, 16), (384, 200)):
        for tokens in (0, 1, 13, 230):
            # With seed 1 one value moves among 13 tokens of 384, and with it a whole row: more than 2%.
            arguments = in_int8(encoder_arguments(tokens, hidden, width, seed=2), linears)
            with use_backend("reference"):
                expected = OPS["encoder"](*arguments)
            with use_backend("cpu"):
                found = OPS["encoder"](*arguments)
            error = (found - expected).abs()
            assert bool((error < 0.2).all()) and (error > 1e-4).float().mean() < 0.02 if tokens else True


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
