"""bfloat16 in `ops.encoder`: the layout, the arithmetic, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bf16_cases import in_bf16, whole_number_arguments
from fuzzing import guarded_all
from inputs import cu_seqlens, encoder_arguments, randn, stock_model
from pruned_ops.ops.panels import bf16_linear, from_bf16_panels, to_bf16_panels
from pruned_ops.ops.registry import OPS, BackendError, use_backend
from pruned_ops.runtime.refusals import refuse_encoder

REFUSED = refuse_encoder(stock_model().bert, bfloat16=True)
needs_bf16 = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@pytest.mark.parametrize(("out", "inputs"), [(64, 32), (70, 51), (1, 1), (33, 4), (0, 8), (8, 0)])
def test_panels_give_back_the_rounded_weight(out: int, inputs: int) -> None:
    weight = randn(0, out, inputs)
    panels = to_bf16_panels(weight)
    assert panels.shape == (-(-out // 32), -(-inputs // 2), 64) and panels.dtype == torch.bfloat16
    assert torch.equal(from_bf16_panels(panels, out, inputs), weight.bfloat16().float())
    if out > 32 and inputs > 3:
        assert torch.equal(panels[1, 1, :2], weight[32, 2:4].bfloat16())  # the inputs of a channel together


def test_the_reference_rounds_operands_and_not_sums() -> None:
    x, weight, bias = randn(0, 5, 300), randn(1, 7, 300), randn(2, 7)
    found = bf16_linear(x, to_bf16_panels(weight), bias)
    exact = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-4
    assert (found - F.linear(x, weight, bias)).abs().max() > 1e-3


@needs_bf16
@pytest.mark.parametrize("inputs", [1, 2, 3, 7, 16, 33, 387, 4099])
def test_kernels_compute_the_reference_exactly(inputs: int) -> None:
    """Where no order of additions rounds, no bit differs, and no byte outside the arguments is touched."""
    for number, width in enumerate((1, 15, 16, 17, 31, 32, 33, 65)):
        rows = (1, 2, 5, 12, 13, 25, 97, 100)[number] if inputs < 1000 else 3
        arguments = whole_number_arguments(rows, inputs, width, seed=number)
        with use_backend("reference"):
            expected = OPS["encoder"](*arguments)
        with use_backend("cpu"):
            found = OPS["encoder"](*guarded_all(arguments, at_end=number % 2 == 0))
        torch.testing.assert_close(found, expected, atol=1e-3 + inputs * 1e-4, rtol=1e-5)


@needs_bf16
@pytest.mark.parametrize("linears", [(0, 1), (0,), (1,)])
def test_kernels_compute_the_reference(linears: tuple[int, ...]) -> None:
    """A stack with and without heads and FFN: where fp32 rounding moves a number to the next bfloat16 one,
    that is a small part of what bfloat16 changes. Attention behind a bfloat16 linear rounds, too, which does
    not make the whole less exact."""
    for hidden, width in ((90, 72), (16, 0), (1, 16), (384, 200)):
        for tokens in (0, 1, 13, 230):
            plain = encoder_arguments(tokens, hidden, width, seed=2)
            arguments = in_bf16(plain, linears)
            with use_backend("reference"):
                expected, in_fp32 = OPS["encoder"](*arguments), OPS["encoder"](*plain)
            with use_backend("cpu"):
                found = OPS["encoder"](*arguments)
            assert found.shape == expected.shape
            least = 1e-5 * expected.norm()
            if linears == (1,):
                assert (found - expected).norm() <= 0.15 * (expected - in_fp32).norm() + least
            else:
                assert (found - in_fp32).norm() <= 1.15 * (expected - in_fp32).norm() + least


@needs_bf16
def test_rows_do_not_depend_on_each_other() -> None:
    """A sequence alone, among more tokens than go through at once, and with any number of threads, gives the
    same bits."""
    lengths = (700, 50, 0, 650, 150)
    x, _, _, weights, *rest = in_bf16(encoder_arguments(sum(lengths), 48, 56, seed=0))
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        whole = OPS["encoder"](x, cu_seqlens(lengths), 700, weights, *rest)
        alone = OPS["encoder"](x[-150:], cu_seqlens((150,)), 150, weights, *rest)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            again = OPS["encoder"](x, cu_seqlens(lengths), 700, weights, *rest)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(whole[-150:], alone) and torch.equal(whole, again)


@needs_bf16
def test_what_is_not_a_number_stays_in_its_token() -> None:
    arguments = in_bf16(encoder_arguments(20, 33, 0, seed=2))
    with_ffn = in_bf16(encoder_arguments(20, 33, 8, seed=2))  # of 0 heads, with an FFN
    for case in (arguments, with_ffn):
        with use_backend("cpu"):
            clean = OPS["encoder"](*case)
            for bad in (float("nan"), float("inf"), -float("inf")):
                spoilt = case[0].clone()
                spoilt[7, 32] = bad
                found = OPS["encoder"](spoilt, *case[1:])
                assert found[7].isnan().all()
                assert torch.equal(found[:7], clean[:7]) and torch.equal(found[8:], clean[8:])


@needs_bf16
def test_wrong_panels_are_refused_by_name() -> None:
    good = in_bf16(encoder_arguments(9, 32, 48, seed=0))
    for place, bad, named in (
        (0, good[3][0][:, :-1].contiguous(), "first weight has shape"),
        (3, good[3][3][:-1], "second bias has shape"),
    ):
        weights: list[Tensor] = [*good[3]]
        weights[place] = bad
        for backend in ("reference", "cpu"):
            with use_backend(backend), pytest.raises(RuntimeError, match=f"encoder: {named}"):
                OPS["encoder"](*good[:3], weights, *good[4:])
    with use_backend("cpu"), pytest.raises(BackendError, match="a tensor is torch.bfloat16"):
        OPS["encoder"](good[0].bfloat16(), *good[1:])
