"""What all launchers of this backend share: whether Triton can run here, which tensors its kernels take, and
how those tensors lie in memory."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pruned_ops.ops.backends.gpu import capability, is_there, refuse_tensors
from pruned_ops.ops.backends.triton.configs import SHARED_MEMORY, GemmConfig
from pruned_ops.ops.registry import KernelError, tensors_of

T = TypeVar("T")

# With TRITON_INTERPRET=1 the kernels run on the CPU, in numpy: for tests, not for speed.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Options of every launch. A product and the sum that it goes into are one instruction, whatever is Triton's
# default (off from 3.10 on): the budgets of instructions count on it.
OPTIONS = {"enable_fp_fusion": True}
# TMA and wide loads need rows that begin at a multiple of so many bytes.
ALIGNMENT = 16


def missing() -> str | None:
    """The reason why Triton's kernels cannot run here, and what would help; None if they can."""
    if not INTERPRETING and not is_there():
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


@functools.lru_cache
def cannot_start() -> str | None:
    """The reason why Triton can start no kernel here, and what would help; None if it can. The first call
    starts Triton's driver, which needs a C compiler and Python's headers, and CUDA's library."""
    if INTERPRETING:
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of the compiler, of the search for the library, or of Triton itself
        return (
            f"triton cannot start kernels here ({type(error).__name__}: {error}); it needs gcc and Python's "
            "headers: apt install gcc python3-dev"
        )
    return None


def refuse(*args: Any) -> str | None:
    """The reason why the kernels do not take these arguments; None if they do."""
    return refuse_tensors(args, DTYPES, "cpu" if INTERPRETING else "cuda") or cannot_start()


def rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, which the kernels need; a copy only if it has none."""
    return x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How products are computed: exactly, unless they are fp32 and torch allows TF32."""
    # Reading the older setting, allow_tf32, raises an error once the newer one was used.
    return (
        "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands must be cast to fp32: the interpreter multiplies the raw bits of bfloat16."""
    return INTERPRETING and dtype == torch.bfloat16


def tma_takes(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe all of these matrices: their bases and row strides are
    multiples of 16 bytes, and the GPU has TMA."""
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


def in_16_bytes(width: int, *matrices: Tensor) -> bool:
    """Whether kernels read these matrices, and write another of `width` columns, 16 bytes at a time.

    Triton knows that where bases are multiples of 16 bytes, and strides and sizes of 16 numbers. Else it
    moves 2 bytes at once, and a GEMM takes nearly all registers, or spills some, and has a shorter pipeline
    (test_triton_compiled.py)."""
    sizes = [width, *(n for x in matrices for n in (x.size(1), x.stride(0)))]
    return not any(n % 16 for n in sizes) and all(x.data_ptr() % ALIGNMENT == 0 for x in matrices)


def descriptors(x: Tensor, weight: Tensor, config: GemmConfig) -> tuple[Any, Any]:
    """Descriptors of tiles of x (tokens, k) and weight (width, k) for TMA loads."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has. In the interpreter few, so that persistent kernels take several tiles there."""
    return 2 if INTERPRETING else torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def l2_bytes(device: torch.device) -> int:
    """The size of the GPU's L2 cache; 0 in the interpreter."""
    return 0 if INTERPRETING else int(torch.cuda.get_device_properties(device).L2_cache_size)


@functools.lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have: 227 KiB on sm_90, 163 on sm_80, but 99 on sm_86, sm_89 and sm_120."""
    if INTERPRETING:
        return SHARED_MEMORY[90]
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def guarded(launcher: Callable[..., T]) -> Callable[..., T]:
    """Make the launcher raise KernelError where Triton cannot compile a kernel for this GPU, or load it.
    Nothing has been computed at that point, so another backend may run the op."""

    @functools.wraps(launcher)
    def launched(*args: Any) -> T:
        from triton.errors import TritonError

        try:
            return launcher(*args)
        except TritonError as error:
            raise KernelError(f"{type(error).__name__}: {error}") from error

    return launched


def on_its_device(launcher: Callable[..., T]) -> Callable[..., T]:
    """Make the device of the first tensor the current one, where Triton launches whatever the tensors'."""

    @functools.wraps(launcher)
    def launched(*args: Any) -> T:
        first = next(tensors_of(args))
        if not first.is_cuda:
            return launcher(*args)
        with torch.cuda.device(first.device):
            return launcher(*args)

    return launched
