"""Compile Triton kernels for GPUs that need not be here: `python compile_triton.py [--all]`.

Prints a JSON line for each kernel, configuration, dtype and target: registers, bytes spilled, shared memory,
threads, whether the PTX holds wgmma. A process of its own, because the interpreter's switch disables
compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pruned_ops.backends.triton import configs  # noqa: E402
from pruned_ops.backends.triton.add_layer_norm import add_layer_norm_kernel  # noqa: E402
from pruned_ops.backends.triton.attention import attention_kernel, short_attention_kernel  # noqa: E402
from pruned_ops.backends.triton.embed_layer_norm import embed_layer_norm_kernel  # noqa: E402
from pruned_ops.backends.triton.linear_add_layer_norm import linear_add_layer_norm_kernel  # noqa: E402
from pruned_ops.backends.triton.linear_gelu import (  # noqa: E402
    bias_gelu_kernel,
    linear_gelu_kernel,
    meta,
    partial_linear_kernel,
)

NAMES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """A kernel with its arguments' types and its constants. rows: those of its matrix tile, 0 without one."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    dtype: str
    config: str
    rows: int = 0
    tma: bool = False


def pointers(names: str, dtype: str) -> dict[str, str]:
    return {name: f"*{dtype}" for name in names.split()}


def integers(names: str) -> dict[str, str]:
    return {name: "i32" for name in names.split()}


def gemm_cases(dtype: str) -> Iterator[Case]:
    """linear_gelu, split and not; WHOLE_K is the form that every hidden size but odd ones takes."""
    for config in configs.LINEAR_GELU[NAMES[dtype]]:
        constants = {k: v for k, v in meta(config).items() if not k.startswith("num_")}
        constants.update(WHOLE_K=True, PRECISION="ieee", UPCAST=False)
        shared = (config.warps, config.stages, dtype, str(config), config.block_m)
        if config.split_k > 1:
            types = pointers("x weight", dtype) | {"out": "*fp32"}
            types |= integers("tokens width hidden share stride_x stride_w")
            yield Case(partial_linear_kernel, types, constants, *shared)
            continue
        types = pointers("x weight bias out", dtype)
        types |= integers("tokens width hidden stride_x stride_w stride_out programs")
        if config.tma:
            types["x"] = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
            types["weight"] = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
        yield Case(linear_gelu_kernel, types, {**constants, "TMA": config.tma}, *shared, tma=config.tma)


def fused_cases(dtype: str) -> Iterator[Case]:
    for block, known in configs.FUSED_NORM[NAMES[dtype]].items():
        for config in known:
            config = replace(config, block_n=block)
            constants = {k: v for k, v in meta(config).items() if not k.startswith("num_")}
            constants.update(WHOLE_K=True, PRECISION="ieee", UPCAST=False)
            types = pointers("x weight bias residual norm_weight norm_bias out", dtype)
            types |= integers("tokens hidden inner") | {"eps": "fp32"}
            types |= integers("stride_x stride_w stride_residual")
            shared = (config.warps, config.stages, dtype, str(config), config.block_m)
            yield Case(linear_add_layer_norm_kernel, types, constants, *shared)


def attention_cases(dtype: str) -> Iterator[Case]:
    types = pointers("qkv", dtype) | {"cu_seqlens": "*i32"} | pointers("out", dtype)
    long = types | integers("tokens batch width tiles") | {"scale": "fp32"}
    short = types | integers("tokens batch width") | {"scale": "fp32"}
    strides = integers("stride_qkv stride_out")
    for head_dim, known in configs.ATTENTION[NAMES[dtype]].items():
        common = {"HEAD_DIM": head_dim, "PRECISION": "ieee", "UPCAST": False}
        for c in known:
            constants = {**common, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n}
            shared = (c.warps, c.stages, dtype, f"head_dim {head_dim}, {c}", c.block_m)
            yield Case(attention_kernel, long | strides, constants, *shared)
        for segment, c in configs.SHORT[NAMES[dtype]].items():
            if NAMES[dtype] == 4 and head_dim > 32:
                continue  # never chosen
            constants = {**common, "SEGMENT": segment, "SEQUENCES": c.sequences}
            shared = (c.warps, c.stages, dtype, f"head_dim {head_dim}, {c}", c.block_m)
            yield Case(short_attention_kernel, short | strides, constants, *shared)


def row_cases(dtype: str) -> Iterator[Case]:
    for config, block in ((configs.ROWS[1], 512), (configs.ROWS[0], 1024), (configs.ROWS[2], 4096)):
        shared = (config.warps, 2, dtype, f"{config}, block {block}")
        types = pointers("x bias residual weight norm_bias out", dtype) | integers("tokens hidden")
        types |= {"eps": "fp32"} | integers("stride_x stride_residual stride_part")
        constants = {"BIAS": True, "PARTS": 1, "ROWS": config.rows, "BLOCK": block}
        yield Case(add_layer_norm_kernel, types, constants, *shared)
        types = {name: "*i64" for name in ("input_ids", "position_ids", "token_type_ids")}
        types |= pointers("word position token_type weight norm_bias out", dtype) | integers("tokens hidden")
        types |= {"eps": "fp32"}
        types |= integers("words positions types stride_word stride_position stride_type")
        yield Case(embed_layer_norm_kernel, types, {"ROWS": config.rows, "BLOCK": block}, *shared)
    types = {"partials": "*fp32"} | pointers("bias out", dtype) | integers("tokens width")
    yield Case(bias_gelu_kernel, types, {"SPLIT": 4, "BLOCK": 512}, 4, 2, dtype, "split 4")


def cases(everything: bool) -> Iterator[tuple[Case, int]]:
    """Every configuration: fp16 for both targets, fp32 for sm_80; `everything`: fp32 for sm_90, bf16."""
    wanted = [("fp16", 80), ("fp16", 90), ("fp32", 80)]
    if everything:
        wanted += [("fp32", 90), ("bf16", 80), ("bf16", 90)]
    for dtype, target in wanted:
        for make in (gemm_cases, fused_cases, attention_cases, row_cases):
            for case in make(dtype):
                if target >= 90 or not case.tma:
                    yield case, target


def compiled(case: Case, target: int) -> Any:
    """Pointers and the sizes that strides come from are taken as multiples of 16, as `optimize` lays them."""
    signature = {**case.types, **dict.fromkeys(case.constants, "constexpr")}
    names = list(case.kernel.arg_names)
    aligned = [
        name
        for name, kind in case.types.items()
        if kind.startswith("*") or name.startswith("stride") or name in ("width", "hidden", "inner")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    ordered = {name: signature[name] for name in names}
    source = ASTSource(case.kernel, ordered, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump (it comes with Triton) says of a kernel: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="in bf16 too")
    arguments = parser.parse_args()
    for case, target in cases(arguments.all):
        made = compiled(case, target)
        found = {
            "kernel": case.kernel.__name__, "config": case.config, "dtype": case.dtype, "target": target,
            "rows": case.rows, "warps": case.warps, "shared": made.metadata.shared,
            "wgmma": "wgmma" in made.asm["ptx"], **resources(made.asm["cubin"]),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
