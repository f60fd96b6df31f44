"""Where int8's time goes: addresses and callgrind's file, read as parts of a layer."""

from __future__ import annotations

import pytest

import bench_int8_parts
from bench_int8_parts import costs, part_of

CALLGRIND = """\
positions: instr line
events: Ir
ob=(1) /usr/lib/libc.so.6
fl=(1) malloc.c
fn=(1) malloc
0x4000 10 7
cob=(2) /here/_C.so
cfn=(2) encoder
calls=1 0x10
0x4004 10 900
ob=(3) /there/_C.so
fn=(4) another
0x4020 3 8
ob=(2)
fl=(2) csrc/cpu/encoder.cpp
fn=(2) encoder
0x10 5 3
+4 * 2
cob=(1)
cfn=(1)
calls=1 0x4000
+8 6 900
fi=(3) csrc/cpu/gelu_kernel.h
-4 9 5
* +1 1
ob=(1)
fn=(1)
0x4008 11 4
ob=(2)
fn=(3) attention
0x40 8 6
"""


def test_callgrind_names_own_costs_of_the_extension_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        __file__ = "/here/_C.so"

    monkeypatch.setattr(bench_int8_parts, "extension", Extension)
    assert list(costs(CALLGRIND)) == [(0x10, 3), (0x14, 2), (0x18, 5), (0x18, 1), (0x40, 6)]


@pytest.mark.parametrize(
    ("functions", "part"),
    [
        (
            "_mm512_fmadd_ps(float)\navx512fintrin.h:13368\npruned_ops::AVX512_VNNI::gelu_for_int8(Vec)\n"
            "/a/csrc/cpu/gelu_kernel.h:41\nint8_linear_gelu\n/a/csrc/cpu/int8_linear_kernel.h:99\n",
            "GELU",
        ),
        ("pruned_ops::AVX512_VNNI::quantize_row(float const*)\nint8_vnni_kernel.h:60\n", "quantising"),
        ("void pruned_ops::AVX512_VNNI::multiply_int8<12>(float)\nint8_vnni_kernel.h:90\n", "products"),
        ("multiply<12, 2, pruned_ops::AVX512::NothingAhead>\nmultiply_kernel.h:90\n", "attention: products"),
        ("pruned_ops::AVX512_BF16::PairWorker::powers(float)\nvec.h:2\n", "attention: softmax"),
        ("void multiply_int8_half<5, pruned_ops::AVX2::NothingAhead>\nint8_avx2_kernel.h:80\n", "products"),
        ("pruned_ops::AVX512::layer_norm_row(float)\nlayer_norm_kernel.h:38\n", "LayerNorm"),
        ("libgomp-a34b3233.so.1", "waiting"),
        ("libpython3.11.so", "rest"),
    ],
)  # fmt: skip
def test_the_functions_around_an_address_name_its_part(functions: str, part: str) -> None:
    assert part_of(functions) == part
