"""Triton's kernels in the interpreter: every configuration of the tables, shapes at the edges of tiles,
planted faults. Which of them runs: test_triton_choices.py. Whether they fit a GPU: test_triton_compiled.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import pruned_ops
from by_position import frequencies, with_gaps
from inputs import arguments_for, attention_arguments, cu_seqlens, moved_to, randn
from numerics import assert_within_budget, within_budget
from pruned_ops.ops.backends import triton as triton_backend
from pruned_ops.ops.registry import BACKENDS, OPS, given_up, record, use_backend
from thorough import only_in_test_all

TRITON_OPS = sorted(name for name, op in OPS.items() if "triton" in op.kernels)

MISSING = BACKENDS["triton"].missing
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"triton: {MISSING}")

if MISSING is None:
    import triton
    import triton.language as tl

    from pruned_ops.ops.backends.triton import add_layer_norm, configs, launch, tuning
    from pruned_ops.ops.backends.triton.add_layer_norm import launch_add_layer_norm
    from pruned_ops.ops.backends.triton.attention import launch_attention
    from pruned_ops.ops.backends.triton.configs import GemmConfig
    from pruned_ops.ops.backends.triton.graph_inputs import load_graph_inputs
    from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm
    from pruned_ops.ops.backends.triton.linear_geglu import launch_linear_geglu
    from pruned_ops.ops.backends.triton.linear_gelu import launch_linear_gelu
    from pruned_ops.ops.backends.triton.tiles import cos_sin, gelu

    @triton.jit
    def gelu_kernel(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + places, gelu(tl.load(x + places)))

    @triton.jit
    def cos_sin_kernel(x, cos, sin, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        found = cos_sin(tl.load(x + places))
        tl.store(cos + places, found[0])
        tl.store(sin + places, found[1])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16's raw bits and rounds it towards zero: bf16 runs on a GPU only.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SIZES = {"fp32": 4, "half": 2}
moved = partial(moved_to, DEVICE)


def edges() -> list[Any]:
    """Each head_dim in each dtype; in the interpreter's minutes every one of both once."""
    once = {(16, torch.float32), (32, torch.float16), (64, torch.float16), (128, torch.float32)}
    return [
        pytest.param(*case, marks=[] if case in once or DEVICE == "cuda" else only_in_test_all)
        for case in product((16, 32, 64, 128), DTYPES)
    ]


@pytest.mark.parametrize(("head_dim", "dtype"), edges(), ids=str)
def test_triton_attention_at_the_edges_of_tiles(head_dim: int, dtype: torch.dtype) -> None:
    """Lengths at block sizes +-1, one token, no token, one head; short sequences share a program."""
    for lengths in [(63, 1), (64,), (65, 0, 127), (129,), (1,), (16,) * 5, (3, 17, 0, 32, 31)]:
        arguments = moved(attention_arguments(lengths, 2, head_dim), dtype)
        with use_backend("triton"), record() as ran:
            output = pruned_ops.ops.attention(*arguments)
        assert ran["attention"] == {"triton": 1}
        within_budget("attention", output, arguments)


def test_triton_attention_over_many_short_sequences() -> None:
    lengths = tuple(1 + (7 * i) % 30 for i in range(200))
    arguments = moved(attention_arguments(lengths, 1, 32), torch.float32)
    with use_backend("triton"):
        within_budget("attention", pruned_ops.ops.attention(*arguments), arguments)


def attention_configs() -> list[Any]:
    if MISSING is not None:
        return []
    found = [
        pytest.param(
            config, head_dim, dtype, id=f"triton-{head_dim}-{config.block_m}x{config.block_n}-{name}"
        )
        for name, size in SIZES.items()
        for dtype in DTYPES
        if dtype.itemsize == size
        for head_dim, known in configs.ATTENTION[size].items()
        for config in known
    ]
    short = [
        pytest.param(config, 32, dtype, id=f"triton-short-{segment}-{size}")
        for size, dtype in ((2, torch.float16), (4, torch.float32))
        for segment, config in configs.SHORT[size].items()
    ]
    return found + short


@pytest.mark.parametrize(("config", "head_dim", "dtype"), attention_configs())
def test_every_attention_configuration(config: Any, head_dim: int, dtype: torch.dtype) -> None:
    longest = config.block_m // config.sequences if config.sequences else 150
    lengths = (longest, 1, longest // 2 + 1)
    arguments = moved(attention_arguments(lengths, 1, head_dim), dtype)
    within_budget("attention", launch_attention(*arguments, config), arguments)


BY_POSITION = {"window": (9, False), "bias": (None, True), "both": (40, True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", BY_POSITION)
def test_every_attention_configuration_by_position(given: str, dtype: torch.dtype) -> None:
    """A window and a bias for each head, by places and by positions with gaps, at the edges of tiles."""
    window, has_bias = BY_POSITION[given]
    known, short = configs.BY_POSITION[dtype.itemsize], configs.SHORT[dtype.itemsize]
    for config, head_dim in [(known[64], 64), *((one, 32) for one in short.values())]:
        longest = config.block_m // config.sequences if config.sequences else config.block_m + 9
        lengths = (longest, 1, longest // 2 + 1)
        arguments = moved(attention_arguments(lengths, 2, head_dim), dtype)
        bias = (randn(1, 2, 25) * 3).to(DEVICE, dtype) if has_bias else None
        for positions in (None, with_gaps(lengths).to(DEVICE)):
            output = launch_attention(*arguments, config, positions, window, bias)
            within_budget("attention", output, [*arguments, positions, None, window, bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_and_key_are_rotated_in_place_where_they_are_given_up(dtype: torch.dtype) -> None:
    """Else in a copy. Frequencies are in fp32, and values stay as they are."""
    arguments = moved(attention_arguments((5, 0, 40), 3, 32), dtype)
    qkv = arguments[0].clone()
    more = [with_gaps((5, 0, 40)).to(DEVICE), frequencies(32).to(DEVICE), 16]
    expected = assert_within_budget(pruned_ops.ops.attention, "triton", [*arguments, *more])
    assert torch.equal(arguments[0], qkv)
    with use_backend("triton"), given_up(arguments[0]):
        found = pruned_ops.ops.attention(*arguments, *more)
    assert torch.equal(found, expected)
    assert torch.equal(arguments[0][:, 192:], qkv[:, 192:]) and not torch.equal(arguments[0], qkv)


def test_keys_beyond_every_window_are_not_read() -> None:
    """Not even NaN comes from them; all that a block of queries can see lies in as many blocks of keys."""
    arguments = moved(attention_arguments((300,), 1, 32), torch.float32)
    arguments[0][200:, 64:] = torch.nan  # values
    with use_backend("triton"):
        context = pruned_ops.ops.attention(*arguments, None, None, 20)
    block = configs.ATTENTION[4][32][0].block_m
    assert context[: 200 - 20 - 2 * block].isfinite().all() and context[200 - 20 :].isnan().all()


def gemm_configs(known: str) -> list[Any]:
    """Those of a table of configs.py, with the dtypes that they are for."""
    if MISSING is not None:
        return []
    return [
        pytest.param(
            config, dtype, id=f"triton-{i}-{config.block_m}x{config.block_n}x{config.block_k}-{name}"
        )
        for name, size in SIZES.items()
        for dtype in DTYPES
        if dtype.itemsize == size
        for i, config in enumerate(getattr(configs, known)[size])
    ]


@pytest.mark.parametrize(("config", "dtype"), gemm_configs("LINEAR_GEGLU"))
def test_every_geglu_configuration(config: Any, dtype: torch.dtype) -> None:
    """Units beyond a tile, in whole blocks of columns, and an odd number of them, and not."""
    for tokens, hidden, width in (
        (config.block_m + 3, 2 * config.block_k, config.block_n // 2 + 16),
        (5, 72, 3),
    ):
        weight, bias = randn(1, 2 * width, hidden) / hidden**0.5, randn(2, 2 * width)
        arguments = moved([randn(0, tokens, hidden), weight, bias], dtype)
        within_budget("linear_geglu", launch_linear_geglu(*arguments, config), arguments)


@pytest.mark.parametrize(("config", "dtype"), gemm_configs("LINEAR_GELU"))
def test_every_gemm_configuration(config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole number of blocks of columns, and not; sizes by which a kernel writes 16 bytes at once, and not;
    more tiles than programs where it is persistent, on whatever GPU."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    for tokens, hidden, width in ((config.block_m + 3, 2 * config.block_k, config.block_n + 16), (5, 72, 24)):
        arguments = moved([randn(0, tokens, hidden), randn(1, width, hidden), randn(2, width)], dtype)
        if config.persistent:
            arguments[0] = torch.cat([arguments[0]] * 3)
        within_budget("linear_gelu", launch_linear_gelu(*arguments, config), arguments)


def triton_gelu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    gelu_kernel[(x.numel() // 1024,)](x, out, BLOCK=1024)
    return out


def test_gelu_is_exact_to_rounding() -> None:
    """Two million numbers against erfc in fp64: between them evenly, about 0 densely, far out."""
    evenly, tiny = torch.linspace(-12, 12, 2**20), torch.logspace(-38, 1, 2**18)
    x = torch.cat([evenly, tiny, -tiny, randn(0, 2**19)]).to(DEVICE)
    wide = x.double()
    truth = wide / 2 * torch.special.erfc(-wide * 0.5**0.5)
    error = (triton_gelu(x).double() - truth).abs()
    assert x.numel() == 2**21 and float(error.max()) <= 3.5e-7
    small = x.abs() < 0.1  # relatively, too, where fp16 has many numbers
    assert float((error[small] / truth[small].abs().clamp(min=1e-30)).max()) <= 1e-6


@pytest.mark.parametrize(("farthest", "allowed"), [(1.0, 1.2e-7), (12_000.0, 2e-7), (100_000.0, 4e-6)])
def test_cosine_and_sine_of_angles_of_all_sizes(farthest: float, allowed: float) -> None:
    angles = torch.linspace(0, farthest, 2**16).to(DEVICE)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    cos_sin_kernel[(2**6,)](angles, cos, sin, BLOCK=2**10)
    for found, expected in ((cos, angles.double().cos()), (sin, angles.double().sin())):
        assert float((found.double() - expected).abs().max()) <= allowed


def test_gelu_of_what_is_hardly_a_number() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 3e38, -3e38, 65504.0, -65504.0, 1e-45]).to(DEVICE)
    found = triton_gelu(torch.cat([x, torch.zeros(1014, device=DEVICE)]))
    expected = torch.tensor([0.0, 0.0, inf, 0.0, nan, 3e38, 0.0, 65504.0, 0.0, 0.0]).to(DEVICE)
    torch.testing.assert_close(found[:10], expected, rtol=0, atol=2e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 1499])
def test_triton_linear_gelu_of_any_width(width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 19):
        arguments = moved([randn(0, tokens, 40), randn(1, width, 40), randn(2, width)], dtype)
        with use_backend("triton"):
            within_budget("linear_gelu", pruned_ops.ops.linear_gelu(*arguments), arguments)
        for config in (GemmConfig(16, 32, 32, 4, 2), GemmConfig(16, 32, 32, 4, 2, split_k=2)):
            within_budget("linear_gelu", launch_linear_gelu(*arguments, config), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [90, 384, 700])
def test_every_way_to_linear_add_layer_norm(hidden: int, dtype: torch.dtype) -> None:
    """Fused, split, and a plain GEMM before `add_layer_norm`: all are the op."""
    arguments = moved(arguments_for("linear_add_layer_norm", 37, hidden, 72), dtype)
    split = GemmConfig(16, 32, 32, 4, 2, split_k=2)
    for config in [None, split, *tuning.fused_configs(hidden, dtype)]:
        output = launch_linear_add_layer_norm(*arguments, config)
        within_budget("linear_add_layer_norm", output, arguments)


@pytest.mark.parametrize("hidden", [1, 384, 1024, 1500, 8192])
def test_every_row_configuration(hidden: int) -> None:
    arguments = moved(arguments_for("add_layer_norm", 9, hidden), torch.float16)
    found = configs.row_configs(hidden)
    assert found[0].rows == 1 and all(hidden * one.rows <= 32 * 32 * one.warps for one in found)
    for config in found:
        within_budget("add_layer_norm", launch_add_layer_norm(*arguments, config), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_that_is_given_up_is_added_in_the_gemm(dtype: torch.dtype) -> None:
    """Into its own memory, and only then. The error budget is the same."""
    arguments = moved(arguments_for("linear_add_layer_norm", 37, 90, 72), dtype)
    residual = arguments[3].clone()
    with given_up(arguments[3][:]):  # another tensor, though of the same memory
        output = launch_linear_add_layer_norm(*arguments, None)
    within_budget("linear_add_layer_norm", output, arguments)
    assert torch.equal(arguments[3], residual)
    with given_up(arguments[3]):
        output = launch_linear_add_layer_norm(*arguments, None)
    torch.testing.assert_close(arguments[3], torch.addmm(residual, arguments[0], arguments[1].t()))
    arguments[3] = residual
    within_budget("linear_add_layer_norm", output, arguments)


def test_the_op_knows_the_tensor_that_was_given_up() -> None:
    """Through torch's dispatcher, in inference mode and out of it. Another backend leaves it alone."""
    arguments = moved(arguments_for("linear_add_layer_norm", 37, 90, 72), torch.float32)
    for backend, mode in (("triton", True), ("triton", False), ("reference", True)):
        given = list(arguments)
        given[3] = arguments[3].clone()
        with torch.inference_mode(mode), use_backend(backend), given_up(given[3]):
            pruned_ops.ops.linear_add_layer_norm(*given)
        assert torch.equal(given[3], arguments[3]) == (backend == "reference")


def test_partial_sums_are_added_in_fp32() -> None:
    parts = randn(0, 3, 5, 48).to(DEVICE)
    _, bias, residual, *norm = moved(arguments_for("add_layer_norm", 5, 48), torch.float32)
    output = launch_add_layer_norm(parts, bias, residual, *norm, configs.ROWS[0])
    within_budget("add_layer_norm", output, [parts.sum(0), bias, residual, *norm])


def test_nothing_is_written_outside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op's output lies between two sentinels, which stay. Sizes are odd, and kernels run on them."""
    monkeypatch.setattr(launch, "in_16_bytes", lambda width, *matrices: True)
    tuning.forget()
    guards: list[Tensor] = []
    original = torch.empty

    def guarded(size: Any, **kwargs: Any) -> Tensor:
        count = int(torch.tensor(size).prod())
        whole = original((count + 64,), **kwargs).fill_(7.0)
        guards.append(whole)
        return whole[32 : 32 + count].view(size)

    for op in TRITON_OPS:
        arguments = moved(arguments_for(op, 37, 90, 56), torch.float16)
        if op == "attention":
            arguments = moved(attention_arguments((12, 25), 2, 32), torch.float16)
        with monkeypatch.context() as patch, use_backend("triton"):
            patch.setattr(torch, "empty", guarded)
            OPS[op](*arguments)
    assert len(guards) >= len(TRITON_OPS)
    for whole in guards:
        assert bool((whole[:32] == 7).all()) and bool((whole[-32:] == 7).all())
        assert not bool((whole[32:-32] == 7).all())


def test_every_launch_asks_for_fused_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's default is: the budgets of instructions (test_triton_compiled.py) count on it."""
    kind, asked = type(add_layer_norm.add_layer_norm_kernel), {}
    run = kind.run

    def seen(kernel: Any, *args: Any, **options: Any) -> Any:
        asked[kernel.fn.__name__] = options.get("enable_fp_fusion")
        return run(kernel, *args, **options)

    monkeypatch.setattr(kind, "run", seen)
    with use_backend("triton"):
        for op in TRITON_OPS:
            OPS[op](*moved(arguments_for(op, 9), torch.float16))
        for longest in (16, 65):
            more = (None, frequencies(32).to(DEVICE)) if longest == 16 else ()
            pruned_ops.ops.attention(*moved(attention_arguments((longest,), 1, 32), torch.float16), *more)
    arguments = moved(arguments_for("linear_gelu"), torch.float16)
    launch_linear_gelu(*arguments, GemmConfig(16, 32, 32, 4, 2, split_k=2))
    launch_linear_gelu(*arguments, GemmConfig(16, 32, 32, 4, 2))
    arguments = moved(arguments_for("linear_geglu", 5, 40, 8), torch.float16)
    launch_linear_geglu(*arguments, GemmConfig(16, 32, 32, 4, 2, split_k=2))
    launch_linear_geglu(*arguments, GemmConfig(16, 32, 32, 4, 2))
    arguments = moved(arguments_for("linear_add_layer_norm"), torch.float16)
    launch_linear_add_layer_norm(*arguments, tuning.fused_configs(arguments[1].size(0), torch.float16)[0])
    ids, bounds = [torch.ones(5, dtype=torch.int64, device=DEVICE)] * 3, cu_seqlens((5,)).to(DEVICE)
    load_graph_inputs(ids, bounds, torch.stack(ids), bounds.clone(), 5, 5)
    modules = [
        importlib.import_module(f"{triton_backend.__name__}.{info.name}")
        for info in pkgutil.iter_modules(triton_backend.__path__)
    ]
    kernels = {
        name
        for module in modules
        for name, one in vars(module).items()
        if isinstance(one, kind) and name.endswith("_kernel")
    }
    assert asked == dict.fromkeys(kernels, True)


def test_wrong_values_never_lead_outside() -> None:
    """cu_seqlens and ids that a check would refuse are clamped by the kernels."""
    qkv, _, _, head_dim = moved(attention_arguments((40,), 1, 32), torch.float32)
    with use_backend("triton"):
        wrong = cu_seqlens((20, 900)).to(DEVICE)
        pruned_ops.ops.attention(qkv, wrong, 64, head_dim)
        places = torch.tensor([0, -(2**31), 2**31 - 1, -7] * 10, dtype=torch.int32, device=DEVICE)
        more = (places, frequencies(head_dim).to(DEVICE), 5, randn(1, 1, 9).to(DEVICE))
        assert pruned_ops.ops.attention(qkv, wrong, 64, head_dim, *more).isfinite().all()
        arguments = moved(arguments_for("embed_layer_norm", 9, 48), torch.float32)
        arguments[0] = arguments[0] + 10_000
        expected = list(arguments)
        expected[0] = torch.full_like(arguments[0], arguments[3].size(0) - 1)
        output = pruned_ops.ops.embed_layer_norm(*arguments)
    within_budget("embed_layer_norm", output, expected)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests have teeth: a wrong scale, a sequence that is too long, a lost bias leave the budget."""
    from pruned_ops.ops.backends.triton import attention as module

    arguments = moved(attention_arguments((40, 25), 2, 32), torch.float32)
    config = configs.ATTENTION[4][32][0]
    monkeypatch.setattr(module, "LOG2_E", 1.0)
    with pytest.raises(AssertionError, match="budget"):
        within_budget("attention", launch_attention(*arguments, config), arguments)
    monkeypatch.undo()
    blind = [arguments[0], cu_seqlens((39, 26)).to(DEVICE), *arguments[2:]]
    with pytest.raises(AssertionError, match="budget"):
        within_budget("attention", launch_attention(*blind, config), arguments)
    gelu = moved(arguments_for("linear_gelu"), torch.float32)
    without = [gelu[0], gelu[1], torch.zeros_like(gelu[2])]
    with pytest.raises(AssertionError, match="budget"):
        within_budget("linear_gelu", launch_linear_gelu(*without, configs.LINEAR_GELU[4][0]), gelu)
