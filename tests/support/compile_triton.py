"""Compile Triton kernels for GPUs that need not be here: `python compile_triton.py [--all]`.

Prints a JSON line for each kernel, configuration, dtype and target: registers, bytes spilled, shared memory,
warps, constants, programs a multiprocessor, whether the PTX holds wgmma, and, where a test looks at them, the
instructions. A process of its own, because the interpreter's switch disables compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

os.environ.pop("TRITON_INTERPRET", None)
# The default of Triton 3.10 on: the kernels ask for what they need.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"

from pruned_ops.ops.backends.triton import ahead_of_time, configs  # noqa: E402
from pruned_ops.ops.backends.triton.ahead_of_time import Case  # noqa: E402

NOT_BERTS = ("linear_geglu_kernel", "bias_geglu_kernel", "rotate_kernel")
# To disassemble a kernel takes half a second: only where a test looks at its instructions.
COUNTED = (
    "linear_gelu_kernel", "linear_geglu_kernel", "attention_kernel", "add_layer_norm_kernel",
    "embed_layer_norm_kernel",
)  # fmt: skip
# Of these, how sizes compile that are no multiples of 16 is looked at, too.
UNALIGNED = ("linear_gelu_kernel", "linear_add_layer_norm_kernel")
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}


def cases_of(dtype: str) -> Iterator[Case]:
    """Every configuration of the tables."""
    size = SIZES[dtype]
    for gemm in configs.LINEAR_GELU[size]:
        yield ahead_of_time.gemm_case(gemm, dtype)
    for gemm in configs.LINEAR_GEGLU[size]:
        if gemm.split_k == 1:
            yield ahead_of_time.geglu_case(gemm, dtype)
    for block, fused in configs.FUSED_NORM[size].items():
        for gemm in fused:
            yield ahead_of_time.fused_case(replace(gemm, block_n=block), dtype)
    for head_dim, known in configs.ATTENTION[size].items():
        short = configs.SHORT[size].values() if size == 2 or head_dim <= 32 else ()  # else never chosen
        for config in (*known, *short):
            yield ahead_of_time.attention_case(config, head_dim, dtype)
        for config in (configs.BY_POSITION[size][head_dim], *short):
            for bias in (False, True):
                yield ahead_of_time.attention_case(config, head_dim, dtype, window=True, bias=bias)
        yield ahead_of_time.rotate_case(head_dim, dtype)
    for block in (1024, 8192):
        for rows in configs.row_configs(block):
            yield ahead_of_time.add_layer_norm_case(rows, block, dtype)
            yield ahead_of_time.embed_layer_norm_case(rows, block, dtype)
    yield from ahead_of_time.split_cases(dtype)
    for places in (True, False):
        yield ahead_of_time.loading_case(dtype, places)


def cases(everything: bool) -> Iterator[tuple[Case, int]]:
    """Of fp16 for sm_90, a kernel's first configuration of each number of warps, of programs a
    multiprocessor, and with TMA and without (linear_geglu's, which are linear_gelu's: of each number of
    warps; attention's with a window or a bias: the first); for sm_80, in fp16 and fp32, the first of a kernel
    that BERT has. `everything`: all of them, in every dtype."""
    if everything:
        wanted = [(dtype, target) for dtype in SIZES for target in (80, 90)]
    else:
        wanted = [("fp16", 90), ("fp16", 80), ("fp32", 80)]
    for dtype, target in wanted:
        seen = set()
        for case in cases_of(dtype):
            kind = _kind(case, target)
            if not everything and target < 90 and case.kernel.__name__ in NOT_BERTS:
                continue
            if (target >= 90 or not case.tma) and (everything or kind not in seen):
                seen.add(kind)
                yield case, target
                if (dtype, target) == ("fp16", 90) and not case.tma and case.kernel.__name__ in UNALIGNED:
                    yield replace(case, aligned=False, constants=case.constants | {"WHOLE_K": False}), target


def _kind(case: Case, target: int) -> tuple[object, ...]:
    """Where not all cases are compiled, the first of each kind is."""
    name = case.kernel.__name__
    if target < 90:
        return (name,)
    if case.constants.get("POSITIONS"):
        return name, case.constants["BIAS"]
    programs = 0 if name == "linear_geglu_kernel" else case.programs
    return name, case.warps, programs, case.tma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration in every dtype")
    for case, target in cases(parser.parse_args().all):
        compiled = ahead_of_time.compiled(case, target, case.kernel.__name__ in COUNTED)
        found = {
            "kernel": case.kernel.__name__, "config": case.config, "dtype": case.dtype, "target": target,
            "rows": case.rows, "warps": case.warps, "constants": case.constants, "programs": case.programs,
            "aligned": case.aligned,
            "holds": compiled.programs(case.warps, target), **asdict(compiled),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
