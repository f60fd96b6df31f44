"""int8: the layout, the kernels against the reference, and what optimize(model, dtype="int8") promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pruned_ops
from inputs import (
    READY,
    SUPPORT,
    cu_seqlens,
    encoder_arguments,
    logits,
    padded_batch,
    pruned_model,
    randn,
    stock_model,
)
from int8_cases import (
    bare_part,
    check_attention,
    check_extremes,
    check_gated,
    check_gelu,
    check_layers,
    check_values_that_are_no_numbers,
    edge_arguments,
    in_int8,
)
from pruned_ops.ops.backends.cpu import extension, int8_capability
from pruned_ops.ops.panels import (
    GROUP,
    LEVELS,
    PANEL,
    ffn_part,
    from_int8_panels,
    quantize,
    to_int8_panels,
)
from pruned_ops.ops.registry import OPS, record, use_backend
from pruned_ops.runtime.int8_choice import choose_int8

needs_extension = pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
READY_FOR_INT8 = [backend for backend in ("reference", "cpu") if backend in READY]


@pytest.mark.parametrize(("out", "inputs"), [(64, 32), (70, 50), (1, 1), (33, 4), (0, 8), (8, 0)])
def test_panels_give_back_the_quantised_weight(out: int, inputs: int) -> None:
    weight = randn(0, out, inputs)
    panels, scales = to_int8_panels(weight)
    values = from_int8_panels(panels, out, inputs)
    assert panels.dtype == torch.int8 and scales.shape == (out,) and values.shape == (out, inputs)
    error = (values.float() * scales[:, None] - weight).abs()
    assert bool((error <= scales[:, None] / 2 * 1.001).all())
    start = panels[:, 0].contiguous().view(torch.int32).flatten()[:out]
    assert torch.equal(start, -128 * values.sum(1, dtype=torch.int32))


@needs_extension
@pytest.mark.parametrize("linears", [(0, 1), (0,), (1,)])
def test_kernels_compute_the_reference(linears: tuple[int, ...]) -> None:
    check_layers(linears)


@needs_extension
def test_the_largest_sums_do_not_overflow_or_saturate() -> None:
    check_extremes()


@needs_extension
def test_gelu_is_as_exact_as_int8_needs_it() -> None:
    check_gelu()


@needs_extension
def test_gated_units_of_any_number() -> None:
    check_gated()


@needs_extension
def test_attention_behind_int8() -> None:
    check_attention()


@needs_extension
def test_what_is_not_a_number_stays_in_its_token() -> None:
    check_values_that_are_no_numbers()


@pytest.mark.skipif(extension is None, reason="pruned_ops._C is not built")
def test_the_products_of_arm_run_where_they_are() -> None:
    assert extension is not None
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "")
    best = [
        name
        for name in ("NEON_I8MM", "NEON_DOTPROD")
        if name in extension.build_info()["capabilities"] and extension.cpu_features()[name.lower()]
    ]
    expected = best[0] if best and asked != "default" else None
    found = extension.int8_capability()
    assert (found if found.startswith("NEON") else None) == expected


# What ATEN_CPU_CAPABILITY asks for where the int8 kernels of a capability are compared with lesser ones, and
# the capability of those. Their fp32 kernels are the same.
LESSER = {
    "AMX_INT8": ("avx512", "AVX512_VNNI"),
    "NEON_I8MM": ("default", "DEFAULT"),
    "NEON_DOTPROD": ("default", "DEFAULT"),
}
LESSER_SCRIPT = """
import sys
sys.path.insert(0, {support!r})
import torch
from int8_cases import edge_arguments
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.registry import OPS, use_backend
assert extension.int8_capability() == {capability!r}, extension.int8_capability()
with use_backend("cpu"):
    torch.save([OPS["encoder"](*arguments) for arguments in edge_arguments()], {out!r})
"""


@pytest.mark.skipif(int8_capability() not in LESSER, reason="int8 runs by neither AMX, SDOT nor SMMLA here")
def test_int8_has_the_bits_of_lesser_kernels(tmp_path: Path) -> None:
    """Sums are exact, and what is done with them is the same code."""
    asked, capability = LESSER[str(int8_capability())]
    out = tmp_path / "lesser.pt"
    script = LESSER_SCRIPT.format(support=SUPPORT, capability=capability, out=str(out))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": asked}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with use_backend("cpu"):
        for arguments, expected in zip(edge_arguments(), torch.load(out), strict=True):
            assert torch.equal(OPS["encoder"](*arguments), expected)


@needs_extension
def test_optimize_runs_every_linear_in_int8(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)[real]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = pruned_ops.optimize(model, dtype="int8")
    encoder = fast.base_model.packed.encoder
    assert encoder.int8_linears == set(encoder.linear_names)
    with record() as ran:
        found = logits(fast, batch)[real]
    assert ran["encoder"] == {"cpu": 1}
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.998
    assert not torch.equal(found, expected)
    restored = pruned_ops.restore(fast).state_dict()
    assert all(torch.equal(restored[name], value) for name, value in before.items())


@needs_extension
def test_calibration_keeps_in_fp32_what_hurts() -> None:
    batches = [padded_batch((20, 13), seed=seed) for seed in range(2)]
    model = pruned_model()
    exact = torch.cat([logits(model, batch)[batch["attention_mask"].bool()] for batch in batches])

    def error(tolerance: float) -> tuple[float, int]:
        fast = pruned_ops.optimize(pruned_model(), dtype="int8", calibration=batches, tolerance=tolerance)
        found = torch.cat([logits(fast, batch)[batch["attention_mask"].bool()] for batch in batches])
        off, varies = (found - exact).norm(dim=0), (exact - exact.mean(0)).norm(dim=0)
        share = off / torch.maximum(varies, exact.norm(dim=0) / 4)  # of the start logits, and of the end's
        return float(share.max()), len(fast.base_model.packed.encoder.int8_linears)

    none, some, every = error(0.0), error(0.04), error(1.0)
    assert none[0] < 1e-5 and every[1] == len(
        pruned_ops.optimize(model).base_model.packed.encoder.linear_names
    )
    assert none[1] < some[1] < every[1] and none[0] < some[0] < every[0]
    assert some[0] <= 0.04


@needs_extension
def test_calibration_names_every_linear() -> None:
    model = pruned_ops.optimize(stock_model(), dtype="int8")
    errors = choose_int8(model, [padded_batch((9,))], tolerance=1.0)
    assert set(errors) == {f"bert.encoder.{name}" for name in model.bert.packed.encoder.linear_names}
    assert all(0 < value < 1 for value in errors.values())


@needs_extension
def test_refusals() -> None:
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        pruned_ops.optimize(stock_model(), dtype="int4")
    with pytest.raises(ValueError, match="calibration is for dtype='int8'"):
        pruned_ops.optimize(stock_model(), calibration=[])
    with pytest.raises(ValueError, match="calibration has no batch"):
        pruned_ops.optimize(stock_model(), dtype="int8", calibration=[])
    model = stock_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        pruned_ops.optimize(model, dtype="int8", calibration=[{"attention_mask": torch.ones(1, 2)}])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="int8 takes a float32 model.*float16"):
        pruned_ops.optimize(stock_model().half(), dtype="int8")
    with pytest.raises(ValueError, match="with relu"):
        pruned_ops.optimize(stock_model(hidden_act="relu"), dtype="int8")
    with pytest.raises(ValueError, match="optimised already, in another dtype"):
        pruned_ops.optimize(pruned_ops.optimize(stock_model()), dtype="int8")
    fast = pruned_ops.optimize(stock_model(), dtype="int8")
    assert pruned_ops.optimize(fast, dtype="int8") is fast
    with pytest.raises(ValueError, match="optimised already, and calibration"):
        pruned_ops.optimize(fast, dtype="int8", calibration=[padded_batch()])
    encoder = pruned_ops.optimize(stock_model()).bert.packed.encoder
    with pytest.raises(ValueError, match="there is no linear layers.9.ffn.up"):
        encoder.pack(int8=["layers.9.ffn.up"])


@needs_extension
def test_rows_do_not_depend_on_each_other() -> None:
    """A sequence alone, and with any number of threads, gives the same bits in int8, too."""
    x, _, _, weights, *rest = in_int8(encoder_arguments(200, 64, 96, seed=3))
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        whole = OPS["encoder"](x, cu_seqlens((50, 150)), 150, weights, *rest)
        alone = OPS["encoder"](x[50:], cu_seqlens((150,)), 150, weights, *rest)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            again = OPS["encoder"](x, cu_seqlens((50, 150)), 150, weights, *rest)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(whole[50:], alone) and torch.equal(whole, again)


def test_wrong_panels_are_refused_by_name() -> None:
    good = in_int8(encoder_arguments(9, 32, 48, seed=0))
    for place, bad, named in (
        (0, good[3][0][:, :-1].contiguous(), "first weight has shape"),
        (3, good[3][3][0], "second bias has shape|second bias has 1 dim"),
    ):
        weights: list[Tensor] = [*good[3]]
        weights[place] = bad
        for backend in READY_FOR_INT8:
            with use_backend(backend), pytest.raises(RuntimeError, match=f"encoder: ({named})"):
                OPS["encoder"](*good[:3], weights, *good[4:])


@pytest.mark.parametrize("backend", READY_FOR_INT8)
def test_rows_of_the_least_numbers(backend: str) -> None:
    """What they would be multiplied by is no number; they weigh as little as they are."""
    x = torch.zeros(5, 8)
    x[0, 0], x[1, 3], x[1, 5], x[2] = 1e-45, 1e-38, -1e-39, -4e-38
    values, scales = quantize(x)
    assert bool((values.abs() <= LEVELS).all()) and (values * scales - x).abs().max() < 1e-36
    first, bias = randn(0, 8, 8), torch.full((8,), 3.0)
    with use_backend(backend):
        rows = OPS["encoder"](*bare_part(ffn_part(8), first, bias, x, 16, [5]))
    assert bool(torch.isfinite(rows).all()) and (rows - rows[4]).abs().max() < 1e-30


@needs_extension
def test_more_inputs_than_sums_hold_are_refused() -> None:
    """At their ends, 133145 products are more than 32 bits hold."""
    most = (2**31 - 1) // LEVELS**2
    for width in (most, most + 1):
        first = torch.zeros(-(-width // PANEL), 1 + 4, PANEL * GROUP, dtype=torch.int8)
        second = torch.zeros(1, 1 + -(-width // GROUP), PANEL * GROUP, dtype=torch.int8)
        weights = [first, torch.zeros(2, width), second, torch.zeros(2, 16), torch.ones(16), torch.zeros(16)]
        arguments = [torch.zeros(1, 16), cu_seqlens((1,)), 1, weights, [ffn_part(width)], 16, 1e-5]
        with use_backend("cpu"):
            if width == most:
                assert torch.equal(OPS["encoder"](*arguments), torch.zeros(1, 16))
                continue
            with pytest.raises(RuntimeError, match=f"second weight has {width} inputs, .* hold {most}: keep"):
                OPS["encoder"](*arguments)


def test_rounding_is_to_the_nearest_of_255() -> None:
    values, scales = quantize(torch.tensor([[0.0, 0.0], [-2.0, 1.01], [0.1, 0.03]]))
    assert values.tolist() == [[0, 0], [-127, 64], [127, 38]]
    torch.testing.assert_close(scales[:, 0], torch.tensor([0.0, 2.0, 0.1]) / 127)
