"""Every Triton configuration compiles for sm_80 and sm_90 and fits them, with no GPU at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from thorough import only_in_test_all

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of a program, in bytes (CUDA programming guide)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What compile_triton.py says, in a process in which the interpreter is off."""
    everything = ["--all"] if os.environ.get("PRUNED_OPS_COMPILE_ALL") else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "compile_triton.py"), *everything],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def made(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of these, the kernels as they are launched."""
    return [kernel for kernel in compiled if kernel["aligned"]]


def test_products_of_odd_sizes_would_spill_or_wait(compiled: list[dict[str, Any]]) -> None:
    """Why those are torch's: without 16 bytes at a time a configuration takes nearly all registers, and some
    spill (one, by Triton 3.6, all but 32 of them); what shared memory it takes is of one stage or two."""
    odd = [kernel for kernel in compiled if not kernel["aligned"]]
    aligned = {
        (kernel["kernel"], kernel["config"]): kernel
        for kernel in compiled
        if kernel["aligned"] and (kernel["dtype"], kernel["target"]) == ("fp16", 90)
    }
    assert {kernel["kernel"] for kernel in odd} == {"linear_gelu_kernel", "linear_add_layer_norm_kernel"}
    for kernel in odd:
        launched = aligned[kernel["kernel"], kernel["config"]]
        assert kernel["registers"] >= 250 or kernel["spilled"] >= 1000, kernel
        assert kernel["shared"] < 0.6 * launched["shared"], kernel
    assert any(kernel["spilled"] for kernel in odd)


def test_a_split_product_is_compiled_as_it_is_launched(made: list[dict[str, Any]]) -> None:
    """Its shares are whole blocks of columns. Were they of any number, it would take 254 registers."""
    split = [kernel for kernel in made if kernel["kernel"] == "partial_linear_kernel"]
    of_sm_90 = [
        kernel["registers"] for kernel in split if kernel["target"] == 90 and kernel["dtype"] == "fp16"
    ]
    assert of_sm_90 and max(of_sm_90) <= 128, of_sm_90


def test_triton_kernels_are_all_compiled(made: list[dict[str, Any]]) -> None:
    kernels = {one["kernel"] for one in made}
    assert kernels == {
        "linear_gelu_kernel", "linear_geglu_kernel", "bias_geglu_kernel", "partial_linear_kernel",
        "bias_gelu_kernel", "linear_add_layer_norm_kernel",
        "attention_kernel", "short_attention_kernel", "rotate_kernel",
        "add_layer_norm_kernel", "embed_layer_norm_kernel", "load_graph_inputs_kernel",
    }  # fmt: skip
    assert {(one["dtype"], one["target"]) for one in made} >= {("fp16", 80), ("fp16", 90), ("fp32", 80)}


def test_triton_kernels_spill_nothing(made: list[dict[str, Any]]) -> None:
    assert all(one["registers"] for one in made)
    spilt = [one for one in made if one["spilled"]]
    assert not spilt, spilt


def test_triton_kernels_fit_shared_memory(made: list[dict[str, Any]]) -> None:
    assert not [one for one in made if one["shared"] > SHARED_MEMORY[one["target"]]]


def test_triton_kernels_use_the_tensor_cores_of_sm_90(made: list[dict[str, Any]]) -> None:
    """wgmma wherever a tile has the 64 rows and the 4 warps that it needs."""
    able = [
        one
        for one in made
        if one["target"] == 90 and one["dtype"] != "fp32" and one["rows"] >= 64 and one["warps"] >= 4
    ]
    assert able and not [one for one in able if not one["wgmma"]]


def test_a_multiprocessor_holds_the_programs_that_the_configurations_count_on(
    made: list[dict[str, Any]],
) -> None:
    """Two of the large tiles of linear_gelu, so that one multiplies while the other activates."""
    wanted = [one for one in made if one["target"] == 90 and one["dtype"] != "fp32"]
    assert any(one["programs"] > 1 for one in wanted)
    assert not [one for one in wanted if one["holds"] < one["programs"]]


def test_an_activation_takes_few_instructions(made: list[dict[str, Any]]) -> None:
    """Of all that follows a tile's last product: bias, GELU, rounding and writing. erf alone takes 30 a
    number."""
    found = [
        (one["epilogue"], one["constants"]["BLOCK_M"] * one["constants"]["BLOCK_N"] // (32 * one["warps"]))
        for one in made
        if one["kernel"] == "linear_gelu_kernel" and one["target"] == 90 and one["dtype"] != "fp32"
        and not one["constants"]["PERSISTENT"] and one["constants"]["BLOCK_N"] == 128
    ]  # fmt: skip
    assert found and all(instructions <= 21 * numbers for instructions, numbers in found), found


def test_a_gated_activation_takes_few_instructions(made: list[dict[str, Any]]) -> None:
    """A thread holds both products of a unit: no exchange between threads comes before the activation."""
    found = [
        (one["epilogue"], one["constants"]["BLOCK_M"] * one["constants"]["BLOCK_N"] // (64 * one["warps"]))
        for one in made
        if one["kernel"] == "linear_geglu_kernel" and one["target"] == 90 and one["dtype"] != "fp32"
        and one["constants"]["BLOCK_N"] == 128
    ]  # fmt: skip
    assert found and all(instructions <= 27 * units for instructions, units in found), found


def test_attention_loads_all_keys_ahead(made: list[dict[str, Any]]) -> None:
    """By cp.async (LDGSTS), the last block's too. Only cu_seqlens' two numbers and the queries, 16 bytes a
    thread, are waited for."""
    found = [one for one in made if one["kernel"] == "attention_kernel" and one["dtype"] != "fp32"]
    for one in found:
        queries = one["constants"]["BLOCK_M"] * one["constants"]["HEAD_DIM"] * 2 // 16 // (32 * one["warps"])
        waited = one["instructions"]["LDG"] <= 2 + max(queries, 1)
        assert one["instructions"]["LDGSTS"] and (waited or one["constants"]["POSITIONS"]), one
    assert {one["target"] for one in found} >= {80, 90}


def test_a_row_of_one_warp_needs_no_barrier(made: list[dict[str, Any]]) -> None:
    """A multiprocessor holds two dozen of them, each with all of its loads under way."""
    found = [one for one in made if one["kernel"] in ("add_layer_norm_kernel", "embed_layer_norm_kernel")]
    single = [one for one in found if one["warps"] == 1]
    assert single and all("BAR" not in one["instructions"] for one in single)
    assert all(one["holds"] >= 24 for one in single), single
    assert all("BAR" in one["instructions"] for one in found if one["warps"] > 1)


def test_how_many_programs_a_multiprocessor_holds() -> None:
    """By hand: 164 registers of 32 threads are 21 steps of 256, so 4 warps take 21504 of 65536."""
    from pruned_ops.ops.backends.triton.ahead_of_time import Compiled

    assert Compiled(164, 0, 32 * 1024, True).programs(warps=4, target=90) == 3
    assert Compiled(32, 0, 0, False).programs(warps=4, target=90) == 16  # all of 64 warps
    assert Compiled(32, 0, 100 * 1024, False).programs(warps=4, target=90) == 2  # of 228 KiB
    assert Compiled(32, 0, 100 * 1024, False).programs(warps=4, target=80) == 1  # of 164 KiB
    assert Compiled(16, 0, 0, False).programs(warps=1, target=90) == 32


@only_in_test_all
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it is measured instead")
def test_the_page_of_bounds() -> None:
    """Bounds and what the compiled kernels take, called so; no word of a result."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_ops.py"), "--device", "cuda"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "BOUNDS for an H200 in fp16, not results: 64 sequences, 11200 tokens" in done.stdout
    # q|k|v read and the context written, 11200 x 4 x 384 numbers, at 4.3 TB/s; 12 heads of a tile a sequence
    # or two or three.
    first = next(line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["attention"])
    assert first == ["attention", "3715", "34.4", "8.00", "memory"]
    assert "128x128x64 tma" in done.stdout and "cuBLAS" in done.stdout
