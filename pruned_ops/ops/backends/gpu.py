"""What the kernels for GPUs require of their arguments, Triton's and CUDA's alike."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The LayerNorm kernels keep whole rows in registers.
MAX_HIDDEN = 8192


def is_there() -> bool:
    """Whether there is a GPU that torch can use, without starting CUDA.

    NVIDIA's management library counts them, where it is installed. `torch.cuda.is_available` starts CUDA, and
    a process that is forked afterwards cannot use a GPU."""
    return torch.cuda.device_count() > 0


def refuse_tensors(
    args: Iterable[Any], taken: Sequence[torch.dtype], device_type: str = "cuda"
) -> str | None:
    """The reason why kernels do not take these arguments; None if they do.

    They take tensors of one dtype, which is in `taken`, on one device of this type, which is sm_80 or later.
    """
    dtypes, devices = set(), set()
    for arg in args:
        if not isinstance(arg, Tensor):
            continue
        if arg.device.type != device_type:
            return f"a tensor is on {arg.device}, the kernel takes tensors on {device_type}"
        devices.add(arg.device)
        if arg.is_floating_point():
            dtypes.add(arg.dtype)
    if not dtypes <= set(taken):
        others = ", ".join(sorted(map(str, dtypes - set(taken))))
        *names, last = [NAMES[dtype] for dtype in taken]
        return f"a tensor is {others}; {', '.join(names)} and {last} are taken"
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    # Asked here and not at import, which must not start CUDA (see is_there).
    if device_type == "cuda" and devices and capability(*devices) < (8, 0):
        return "this GPU is sm_{}{}, the kernels need sm_80 or later".format(*capability(*devices))
    if len(dtypes) > 1:
        return f"the tensors are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None


def refuse_by_distance(
    position_key: object = None, position_query: object = None, distance_rows: object = None
) -> str | None:
    """The reason why the attention kernels do not take these arguments of `attention`; None if they are not
    given."""
    arguments = (
        ("position_key", position_key), ("position_query", position_query), ("distance_rows", distance_rows),
    )  # fmt: skip
    passed = [name for name, value in arguments if value is not None]
    if passed:
        return f"{' and '.join(passed)} given; of the kernels only those of the cpu take that"
    return None


def refuse_hidden(rows: object) -> str | None:
    """The reason why the LayerNorm kernels do not take rows of this size; None if they do."""
    if isinstance(rows, Tensor) and rows.dim() and rows.size(-1) > MAX_HIDDEN:
        return f"hidden_size is {rows.size(-1)}, the kernel takes at most {MAX_HIDDEN}"
    return None


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)
