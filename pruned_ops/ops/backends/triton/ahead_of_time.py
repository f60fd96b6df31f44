"""Compiles the kernels for GPUs that need not be present, and reads the registers and memory that they take.

The interpreter must be off: with TRITON_INTERPRET=1 Triton compiles nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pruned_ops.ops.backends.triton import graph_inputs, launch, rotary
from pruned_ops.ops.backends.triton.add_layer_norm import add_layer_norm_kernel
from pruned_ops.ops.backends.triton.attention import attention_kernel, short_attention_kernel
from pruned_ops.ops.backends.triton.configs import SHARED_MEMORY, AttentionConfig, GemmConfig, RowConfig
from pruned_ops.ops.backends.triton.embed_layer_norm import embed_layer_norm_kernel
from pruned_ops.ops.backends.triton.linear import meta, partial_linear_kernel
from pruned_ops.ops.backends.triton.linear_add_layer_norm import linear_add_layer_norm_kernel
from pruned_ops.ops.backends.triton.linear_geglu import bias_geglu_kernel, linear_geglu_kernel
from pruned_ops.ops.backends.triton.linear_gelu import bias_gelu_kernel, linear_gelu_kernel

# The limits of a multiprocessor, equal on sm_80 and sm_90 (CUDA programming guide, technical specifications).
# A program takes registers in steps of 256 per warp, and 1 KiB of shared memory beside its own.
MOST_WARPS, MOST_PROGRAMS, REGISTERS, REGISTER_STEP, RESERVED = 64, 32, 65536, 256, 1024


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, and its constants.

    rows: the rows of its matrix tile; 0 if it has none. programs: how many of it a multiprocessor of sm_90
    has to hold at once. aligned: whether the sizes that strides come from, and the columns of a share, are
    multiples of 16, as `optimize` lays weights out; `tuning` leaves products of other sizes to torch.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    dtype: str
    config: str
    rows: int = 0
    tma: bool = False
    programs: int = 1
    aligned: bool = True


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes: registers and spilled bytes per thread, bytes of shared memory per
    program; whether it multiplies by wgmma. Where they were counted: how many instructions follow the last
    product, and how many there are of each kind (LDGSTS, say, which is cp.async)."""

    registers: int
    spilled: int
    shared: int
    wgmma: bool
    epilogue: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    def programs(self, warps: int, target: int) -> int:
        """How many programs of this many warps a multiprocessor of sm_`target` holds at once."""
        step = -(-self.registers * 32 // REGISTER_STEP) * REGISTER_STEP * warps
        return min(
            MOST_PROGRAMS,
            MOST_WARPS // warps,
            REGISTERS // step,
            (SHARED_MEMORY[target] + RESERVED) // (self.shared + RESERVED),
        )


def gemm_case(config: GemmConfig, dtype: str) -> Case:
    """linear_gelu, or the GEMM with split_k. WHOLE_K is True, as for all but odd hidden sizes."""
    constants = _gemm_constants(config)
    shared = (config.warps, config.stages, dtype, str(config), config.block_m)
    if config.split_k > 1:
        types = _pointers("x weight", dtype) | {"out": "*fp32"}
        types |= _integers("tokens width hidden share stride_x stride_w")
        return Case(partial_linear_kernel, types, constants, *shared)
    types = _pointers("x weight bias out", dtype)
    types |= _integers("tokens width hidden stride_x stride_w stride_out programs")
    if config.tma:
        types["x"] = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
    constants |= {"TMA": config.tma, "PERSISTENT": config.persistent}
    return Case(linear_gelu_kernel, types, constants, *shared, tma=config.tma, programs=config.programs)


def geglu_case(config: GemmConfig, dtype: str) -> Case:
    """linear_geglu without split_k, whose GEMM is linear_gelu's."""
    types = _pointers("x weight bias out", dtype)
    types |= _integers("tokens width hidden stride_x stride_w stride_out")
    shared = (config.warps, config.stages, dtype, str(config), config.block_m)
    constants = _gemm_constants(config)
    return Case(linear_geglu_kernel, types, constants, *shared, programs=config.programs)


def fused_case(config: GemmConfig, dtype: str) -> Case:
    """linear_add_layer_norm in one kernel."""
    types = _pointers("x weight bias residual norm_weight norm_bias out", dtype)
    types |= _integers("tokens hidden inner") | {"eps": "fp32"}
    types |= _integers("stride_x stride_w stride_residual")
    shared = (config.warps, config.stages, dtype, str(config), config.block_m)
    return Case(linear_add_layer_norm_kernel, types, _gemm_constants(config), *shared)


def attention_case(
    config: AttentionConfig, head_dim: int, dtype: str, window: bool = False, bias: bool = False
) -> Case:
    """attention, for long sequences or for several short ones per program. window, bias: with such, by given
    positions; a bias is within a window."""
    types = _pointers("qkv", dtype) | {"cu_seqlens": "*i32"} | _pointers("out", dtype)
    types |= _integers("tokens batch width") | {"scale": "fp32"}
    types |= _integers("window reach stride_qkv stride_out")
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "PRECISION": "ieee", "UPCAST": False}
    constants |= {"POSITIONS": window, "WINDOW": window, "BIAS": bias}
    optional_types = {"positions": "*i32" if window else None, "bias": f"*{dtype}" if bias else None}
    types |= {name: kind for name, kind in optional_types.items() if kind is not None}
    constants |= {name: None for name, kind in optional_types.items() if kind is None}
    shared = (config.warps, config.stages, dtype, f"head_dim {head_dim}, {config}", config.block_m)
    if config.sequences:
        segment = config.block_m // config.sequences
        constants |= {"SEGMENT": segment, "SEQUENCES": config.sequences}
        return Case(short_attention_kernel, types, constants, *shared)
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    types |= _integers("tiles")
    return Case(attention_kernel, types, constants, *shared, programs=config.programs)


def rotate_case(head_dim: int, dtype: str) -> Case:
    """The kernel that rotates query and key before attention."""
    types = _pointers("qkv", dtype) | {"positions": "*i32", "rotary": "*fp32"}
    types |= _integers("tokens width stride_qkv")
    constants = {"HALF": head_dim // 2, "ROWS": rotary.ROWS}
    return Case(rotary.rotate_kernel, types, constants, rotary.WARPS, 2, dtype, f"head_dim {head_dim}")


def add_layer_norm_case(config: RowConfig, block: int, dtype: str) -> Case:
    types = _pointers("x bias residual weight norm_bias out", dtype) | _integers("tokens hidden")
    types |= {"eps": "fp32"} | _integers("stride_x stride_residual stride_part")
    constants = {"BIAS": True, "RESIDUAL": True, "PARTS": 1, "ROWS": config.rows, "BLOCK": block}
    return Case(add_layer_norm_kernel, types, constants, config.warps, 2, dtype, f"{config}, block {block}")


def embed_layer_norm_case(config: RowConfig, block: int, dtype: str) -> Case:
    types = dict.fromkeys(("input_ids", "position_ids", "token_type_ids"), "*i64")
    types |= _pointers("word position token_type weight norm_bias out", dtype) | _integers("tokens hidden")
    types |= {"eps": "fp32"}
    types |= _integers("words positions types stride_word stride_position stride_type")
    constants = {"ROWS": config.rows, "BLOCK": block}
    return Case(embed_layer_norm_kernel, types, constants, config.warps, 2, dtype, f"{config}, block {block}")


def loading_case(dtype: str, places: bool) -> Case:
    """The kernel that loads a graph's buffers, which hold integers, whatever the model's dtype. places: also
    those that a bias by position reads."""
    types = dict.fromkeys(("ids", "positions", "types", "rows"), "*i64")
    types |= dict.fromkeys(("cu_seqlens", "bounds"), "*i32")
    types |= _integers("tokens batch room_tokens room_batch row_stride longest")
    constants: dict[str, Any] = {"PLACES": places, "BLOCK": graph_inputs.BLOCK}
    if places:
        types["places"] = "*i64"
    else:
        constants["places"] = None
    kernel = graph_inputs.load_graph_inputs_kernel
    return Case(kernel, types, constants, graph_inputs.WARPS, 2, dtype, f"places: {places}")


def split_cases(dtype: str) -> list[Case]:
    """The kernels that follow a GEMM with split_k = 4."""
    types = {"partials": "*fp32"} | _pointers("bias out", dtype) | _integers("tokens width")
    return [
        Case(kernel, types, {"SPLIT": 4, "BLOCK": 512}, 4, 2, dtype, "split 4")
        for kernel in (bias_gelu_kernel, bias_geglu_kernel)
    ]


def kernel_of(case: Case, target: int) -> Any:
    """Triton's kernel for sm_`target`. Pointers are taken to be multiples of 16, and so are the sizes of an
    aligned case, but for those that the kernel is not specialised on."""
    signature = {**case.types, **dict.fromkeys(case.constants, "constexpr")}
    arguments = list(case.kernel.arg_names)
    general = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize}
    sizes = ("stride", "width", "hidden", "inner", "share") if case.aligned else ()
    aligned = [
        name
        for name, kind in case.types.items()
        if name not in general and (kind.startswith("*") or name.startswith(sizes))
    ]
    source = ASTSource(
        case.kernel,
        {name: signature[name] for name in arguments if name in signature},
        {(arguments.index(name),): value for name, value in case.constants.items()},
        {(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, **launch.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compiled(case: Case, target: int, counts: bool = False) -> Compiled:
    """Compile a case for sm_`target`, and read what the kernel takes. counts: whether its instructions are
    counted, too; to disassemble a kernel takes about half a second."""
    kernel = kernel_of(case, target)
    taken = _resources(kernel.asm["cubin"])
    kinds = _instructions(kernel.asm["cubin"]) if counts else []
    products = [place for place, kind in enumerate(kinds) if kind in ("HGMMA", "HMMA")]
    return Compiled(
        taken["REG"], taken["STACK"] + taken["LOCAL"], kernel.metadata.shared, "wgmma" in kernel.asm["ptx"],
        len(kinds) - 1 - products[-1] if products else 0, dict(Counter(kinds)),
    )  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """A kernel's REG, STACK, SHARED and LOCAL, as cuobjdump prints them."""
    text = _output_of("cuobjdump", "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def disassembly(cubin: bytes) -> str:
    """A kernel's machine code, as nvdisasm prints it: an instruction or a label a line."""
    return _output_of("nvdisasm", "--print-code", cubin)


def _instructions(cubin: bytes) -> list[str]:
    """The kinds of a kernel's machine instructions in order, without their variants: LDG for LDG.E.128."""
    text = disassembly(cubin)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", text)


def _output_of(tool: str, option: str, cubin: bytes) -> str:
    """The output of a tool that comes with Triton for this kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def _gemm_constants(config: GemmConfig) -> dict[str, Any]:
    constants = {name: value for name, value in meta(config).items() if not name.startswith("num_")}
    return {**constants, "WHOLE_K": True, "PRECISION": "ieee", "UPCAST": False}


def _pointers(names: str, dtype: str) -> dict[str, str]:
    return {name: f"*{dtype}" for name in names.split()}


def _integers(names: str) -> dict[str, str]:
    return {name: "i32" for name in names.split()}
