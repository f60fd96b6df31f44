"""Compiles csrc/cuda/ops.cpp for CPU tensors, on the emulated kernels: torch.ops.cuda_on_host.

The headers in stand_ins/ are found before torch's of the same names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils import cpp_extension

from cuda_on_host import build

STAND_INS = build.HERE / "stand_ins"
CSRC = build.KERNELS.parent


@cache
def ops_on_host() -> Any:
    """The ops, with `begin` and `launches`: how many kernels were started since."""
    sources = [*build.KERNELS.glob("*.cu"), build.HERE / "emulator.cpp"]
