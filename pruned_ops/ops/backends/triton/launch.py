"""What every launcher here needs: whether Triton can run, which tensors its kernels take, and how they lie in
memory."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pruned_ops.ops.backends.gpu import capability, refuse_tensors
from pruned_ops.ops.backends.triton.configs import SHARED_MEMORY, GemmConfig

Launcher = Callable[..., Tensor]

# With TRITON_INTERPRET=1 the kernels run on the CPU, in numpy: for tests, not for speed.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# TMA and wide loads want rows that begin at a multiple of this.
ALIGNMENT = 16


def missing() -> str | None:
    """Why Triton's kernels cannot run here, and what would help; None if they can."""
    if not INTERPRETING and not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises whatever it likes
        return f"triton cannot be imported ({error}); install it with: pip install triton"
    return _interpreter_fault() if INTERPRETING else None


def _interpreter_fault() -> str | None:
    """Triton 3.6's interpreter fails with numpy 2.4 (it asks for an attribute that is gone)."""
    import numpy
    import triton

    versions = [
        tuple(int(part) for part in v.split(".")[:2]) for v in (triton.__version__, numpy.__version__)
    ]
    if versions[0] < (3, 8) and versions[1] >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}; "
            "install numpy<2.4"
        )
    return None


def refuse(*args: Any) -> str | None:
    """What all kernels here ask of their arguments: one dtype that they take, on a GPU."""
    return refuse_tensors(args, DTYPES, "cpu" if INTERPRETING else "cuda")


def rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous: what the kernels' pointers go along. A copy only if needed."""
    return x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: exactly, unless torch is told that TF32 will do."""
    # Not by the older allow_tf32: reading that raises once the newer setting was used.
    return (
        "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )


def upcast(dtype: torch.dtype) -> bool:
    """Whether products are taken in fp32: the interpreter multiplies the raw bits of bfloat16."""
    return INTERPRETING and dtype == torch.bfloat16


def tma_takes(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can describe all of these: base and row stride at multiples of 16 bytes,
    on a GPU that has TMA."""
    if not INTERPRETING and capability(tensors[0].device) < (9, 0):
        return False
    return all(
        x.dim() == 2
        and min(x.shape) > 0
        and x.stride(1) == 1
        and x.data_ptr() % ALIGNMENT == 0
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
        for x in tensors
    )


def descriptors(x: Tensor, weight: Tensor, config: GemmConfig) -> tuple[Any, Any]:
    """Descriptors of tiles of x (tokens, k) and weight (width, k) for TMA loads."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a small number in the interpreter, so that persistent kernels take several tiles there."""
    return 4 if INTERPRETING else torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have: 227 KiB on sm_90, 163 on sm_80, but 99 on sm_86, sm_89 and sm_120."""
    if INTERPRETING:
        return SHARED_MEMORY[90]
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def on_its_device(launcher: Launcher) -> Launcher:
    """Triton launches on the current device, whatever the tensors' is: make theirs the current one."""

    @functools.wraps(launcher)
    def launched(*args: Any) -> Tensor:
        if not args[0].is_cuda:
            return launcher(*args)
        with torch.cuda.device(args[0].device):
            return launcher(*args)

    return launched
