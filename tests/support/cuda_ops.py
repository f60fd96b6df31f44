"""The CUDA backend's ops for tests: on a GPU if the extension has its kernels; else by csrc/cuda/ops.cpp,
compiled for CPU tensors and emulated kernels. PRUNED_OPS_TEST_EMULATOR=0 does without the latter, where what
passes is to be of the GPU."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated import missing as emulator_missing
from inputs import arguments_for, attention_arguments, moved_to
from numerics import within_budget
from pruned_ops.ops.registry import BACKENDS, OPS, record, use_backend

MISSING = BACKENDS["cuda"].missing
ON_GPU = MISSING is None
DEVICE = "cuda" if ON_GPU else "cpu"
moved = partial(moved_to, DEVICE)

NOT_EMULATED = (
    "it is switched off" if os.environ.get("PRUNED_OPS_TEST_EMULATOR") == "0" else emulator_missing()
)
SKIPPED = pytest.mark.skipif(
    not ON_GPU and NOT_EMULATED is not None, reason=f"cuda: {MISSING}; emulated: {NOT_EMULATED}"
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"cuda: {MISSING}")

HALVES = [torch.float16, torch.bfloat16]
ALL = [torch.float32, *HALVES]
GEMMS = ["linear_gelu", "linear_add_layer_norm"]
NORMS = ["add_layer_norm", "embed_layer_norm"]
CUDA_OPS = ["attention", *GEMMS, *NORMS]


class OnGpu(Tensor):
    """A tensor's shape and dtype on a device that need not be here. It has no memory and runs nothing; a fake
    tensor would start the device up wherever torch sees a GPU."""

    @staticmethod
    def __new__(cls, like: Tensor, device: str) -> OnGpu:
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)  # type: ignore[attr-defined]
        assert isinstance(made, OnGpu)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise AssertionError(f"{function} was called on a tensor that is not there")


def native() -> Any:
    """The namespace in which bindings.cpp, or its stand-in for the host, registers the ops."""
    if ON_GPU:
        return torch.ops.pruned_ops_cuda
    from cuda_on_host.build_ops import ops_on_host

    return ops_on_host()


def run(op: str, arguments: list[Any], launches: bool = True) -> Tensor:
    """Run the op on this backend; in the emulator, check whether a kernel was started."""
    if ON_GPU:
        with use_backend("cuda"), record() as ran:
            output = OPS[op](*arguments)
        assert ran[op] == {"cuda": 1}
        return output
    native().begin()
    output = getattr(native(), op)(*arguments)
    assert (native().launches() > 0) == launches
    return output


def checked(op: str, arguments: list[Any], launches: bool = True) -> Tensor:
    """Run the op, and check its output against the error budget of the reference."""
    output = run(op, arguments, launches)
    within_budget(op, output, arguments)
    floating = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    assert (output.dtype, output.device) == (floating.dtype, floating.device) and output.is_contiguous()
    return output


def arguments_of(op: str, dtype: torch.dtype, **sizes: int) -> list[Any]:
    """Small arguments that the kernels take."""
    arguments = attention_arguments((12, 25), 2, 32) if op == "attention" else arguments_for(op, **sizes)
    return moved(arguments, dtype)


def cases() -> list[Any]:
    """Every op in every dtype that it takes."""
    return [
        pytest.param(op, dtype, id=f"cuda-{op}-{str(dtype)[6:]}")
        for op in CUDA_OPS
        for dtype in (ALL if op in NORMS else HALVES)
    ]
