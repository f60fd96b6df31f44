"""Backend "cuda": the C++ extension's kernels (csrc/cuda) for GPUs of sm_80 and later.

They are compiled with the package, so that the first call compiles nothing. They take fp16 and bf16; those
that multiply no matrices take fp32 too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruned_ops import ops
from pruned_ops.ops.backends.cpu import BACKEND as CPU
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.backends.gpu import is_there, refuse_by_distance, refuse_hidden, refuse_tensors
from pruned_ops.ops.registry import Backend, Op, add_backend, register

BUILD_COMMAND = "PRUNED_OPS_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
HEAD_DIMS = (32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)
ALL = (torch.float32, *HALVES)


def _missing() -> str | None:
    if extension is None:
        return CPU.missing
    if extension.build_info().get("cuda") is None:
        needed = "nvcc" if torch.version.cuda else "nvcc and a torch that is built with CUDA"
        return f"the C++ extension was built without CUDA; where there is {needed}: {BUILD_COMMAND}"
    return None if is_there() else "torch sees no GPU"


BACKEND = add_backend(Backend("cuda", _missing(), "CUDA kernels, compiled with the package"))


def _refuse_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int, *by_position: object
) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, the kernel takes {', '.join(map(str, HEAD_DIMS))}"
    refusal = refuse_by_distance(*by_position[4:]) or _refuse_by_position(*by_position[:4])
    return refusal or refuse_tensors((qkv, cu_seqlens), HALVES)


def _refuse_by_position(
    positions: object = None, rotary: object = None, window: object = None, position_bias: object = None
) -> str | None:
    """The reason why the attention kernel does not take these arguments of `attention`; None if they are not
    given."""
    arguments = (
        ("positions", positions), ("rotary", rotary), ("window", window), ("position_bias", position_bias),
    )  # fmt: skip
    passed = [name for name, value in arguments if value is not None]
    if passed:
        return f"{' and '.join(passed)} given; the kernel knows no positions, Triton's do: pip install triton"
    return None


def _refuse_linear_gelu(*args: Any) -> str | None:
    return refuse_tensors(args, HALVES)


def _refuse_add_layer_norm(*args: Any) -> str | None:
    return refuse_hidden(args[2]) or refuse_tensors(args, ALL)


def _refuse_linear_add_layer_norm(*args: Any) -> str | None:
    return refuse_hidden(args[3]) or refuse_tensors(args, HALVES)


def _refuse_embed_layer_norm(*args: Any) -> str | None:
    return refuse_hidden(args[3]) or refuse_tensors(args, ALL)


def _register(op: Op, refuse: Any) -> None:
    def launch(*args: Any) -> Tensor:
        return getattr(torch.ops.pruned_ops_cuda, op.name).default(*args)

    register(op, BACKEND, launch, refuse)


_register(ops.attention, _refuse_attention)
_register(ops.linear_gelu, _refuse_linear_gelu)
_register(ops.add_layer_norm, _refuse_add_layer_norm)
_register(ops.linear_add_layer_norm, _refuse_linear_add_layer_norm)
_register(ops.embed_layer_norm, _refuse_embed_layer_norm)
