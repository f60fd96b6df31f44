"""Backend "cpu": the C++ extension's kernels (csrc/cpu) around torch's own GEMMs.

The kernels exist for AVX-512, AVX2 and neither, and choose when they run. They take float32.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops import ops
from pruned_ops.registry import Backend, add_backend, register

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
BACKEND = add_backend(Backend("cpu", _missing, "C++ kernels with AVX-512 and AVX2 paths, torch's GEMMs"))


def _refuse(*args: Any) -> str | None:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.device.type != "cpu":
                return f"a tensor is on {arg.device}, the kernel takes tensors on the CPU"
            if arg.dtype != torch.float32 and arg.is_floating_point():
                return f"a tensor is {arg.dtype}, the kernel takes torch.float32"
    return None


def _attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> Tensor:
    return torch.ops.pruned_ops_cpu.attention(qkv, cu_seqlens, max_seqlen, head_dim)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))  # in place: one pass over the rows less


def _add_layer_norm(
    x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    return torch.ops.pruned_ops_cpu.add_layer_norm(x, bias, residual, norm_weight, norm_bias, eps)


def _linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    return _add_layer_norm(F.linear(x, weight), bias, residual, norm_weight, norm_bias, eps)


def _embed_layer_norm(*args: Any) -> Tensor:
    return torch.ops.pruned_ops_cpu.embed_layer_norm(*args)


register(ops.attention, BACKEND, _attention, _refuse)
register(ops.linear_gelu, BACKEND, _linear_gelu, _refuse)
register(ops.add_layer_norm, BACKEND, _add_layer_norm, _refuse)
register(ops.linear_add_layer_norm, BACKEND, _linear_add_layer_norm, _refuse)
register(ops.embed_layer_norm, BACKEND, _embed_layer_norm, _refuse)
