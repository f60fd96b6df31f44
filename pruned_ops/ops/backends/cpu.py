"""Backend "cpu": the C++ extension's kernels (csrc/cpu), for float32, with weights in float32, bfloat16 or
int8.

They are compiled for AVX-512, for AVX2 and for neither (on ARM for NEON, which every such processor has),
and the processor decides when they run. A single linear runs on torch's GEMM, which takes plain weights;
`encoder` has weights in panels and a GEMM of its own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops import ops
from pruned_ops.ops.reference import check_linear_geglu, check_linear_gelu
from pruned_ops.ops.registry import Backend, add_backend, register, tensors_of

BUILD_COMMAND = "pip install --no-build-isolation ."


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        _C = importlib.import_module("pruned_ops._C")
    except ImportError as error:
        return (
            None,
            f"the C++ extension pruned_ops._C cannot be loaded ({error}); build it with: {BUILD_COMMAND}",
        )
    return _C, None


extension, _missing = _load()
# A forked child has none of the threads of torch's OpenMP pool, and its next parallel region would wait for
# them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
BACKEND = add_backend(Backend("cpu", _missing, "C++ kernels with AVX-512, AVX2 and NEON paths"))


def int8_capability() -> str | None:
    """The capability that int8 weights run with: DEFAULT, AVX2, AVX512_VNNI, AMX_INT8, NEON_DOTPROD or
    NEON_I8MM. None where the extension was built before int8 ran everywhere, or is not there."""
    return extension.int8_capability() if hasattr(extension, "int8_capability") else None  # type: ignore


def slow_int8() -> str | None:
    """Why int8 is not expected to be faster than float32 on this processor; None where it is faster."""
    if extension is None:
        return None
    capability = int8_capability()
    if capability == "DEFAULT":
        return (
            "this processor has neither AVX2 nor ARM's SDOT, or ATEN_CPU_CAPABILITY forbids them, so that "
            "int8 runs in plain C++, slower than float32"
        )
    if capability == "AVX2" and extension.cpu_capability() == "AVX512":
        return (
            "this processor has AVX-512 without VNNI, so that int8 runs by AVX2, which multiplies fewer "
            "numbers in a cycle than AVX-512 does in float32"
        )
    return None


def bf16_capability() -> str | None:
    """The capability that bfloat16 weights run with: AVX512_BF16 or AMX_BF16. None where nothing here
    runs them."""
    return extension.bf16_capability() if hasattr(extension, "bf16_capability") else None  # type: ignore


def _refuse_encoder(*args: Any) -> str | None:
    """As `_refuse`, but for panels, which have three dimensions and may be bfloat16."""
    tensors = list(tensors_of(args))
    others = [tensor for tensor in tensors if tensor.dtype != torch.bfloat16 or tensor.dim() != 3]
    if len(others) < len(tensors) and bf16_capability() is None:
        if not hasattr(extension, "bf16_capability"):
            return f"a weight is bfloat16, and pruned_ops._C is of before it; build it again: {BUILD_COMMAND}"
        return (
            "bfloat16 needs a processor with AVX512_BF16 or AMX, and this one has none (or "
            'ATEN_CPU_CAPABILITY forbids it): leave dtype out, or take dtype="int8", which runs on every '
            "processor"
        )
    return _refuse(*others)


def _refuse(*args: Any) -> str | None:
    for tensor in tensors_of(args):
        if tensor.dtype == torch.int8 and int8_capability() is None:
            return f"a weight is int8, and pruned_ops._C is of before int8; build it again: {BUILD_COMMAND}"
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, the kernel takes tensors on the CPU"
        if tensor.dtype != torch.float32 and tensor.is_floating_point():
            return f"a tensor is {tensor.dtype}, the kernel takes torch.float32"
    return None


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check_linear_gelu(x, weight, bias)
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))  # in place, which saves a pass over the rows


def _linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    check_linear_geglu(x, weight, bias)
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return F.gelu(gate).mul_(up)


def _linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    native = torch.ops.pruned_ops_cpu
    return native.add_layer_norm(F.linear(x, weight), bias, residual, norm_weight, norm_bias, eps)


def _native(name: str) -> Callable[..., Tensor]:
    def launch(*args: Any) -> Tensor:
        return getattr(torch.ops.pruned_ops_cpu, name)(*args)

    return launch


for _op in (ops.attention, ops.add_layer_norm, ops.embed_layer_norm):
    register(_op, BACKEND, _native(_op.name), _refuse)
register(ops.encoder, BACKEND, _native("encoder"), _refuse_encoder)
register(ops.linear_gelu, BACKEND, _linear_gelu, _refuse)
register(ops.linear_geglu, BACKEND, _linear_geglu, _refuse)
register(ops.linear_add_layer_norm, BACKEND, _linear_add_layer_norm, _refuse)
