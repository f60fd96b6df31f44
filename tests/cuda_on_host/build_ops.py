"""Compiles csrc/cuda/ops.cpp for CPU tensors and emulated kernels: torch.ops.cuda_on_host.

The headers in stand_ins/ are found before torch's of the same names.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from typing import Any

import torch
from cuda_on_host import build
from torch.utils import cpp_extension

STAND_INS = build.HERE / "stand_ins"
CSRC = build.KERNELS.parent
SOURCES = [build.KERNELS / "ops.cpp", STAND_INS / "ops_on_host.cpp"]
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{STAND_INS}", f"-I{CSRC}"),
    *(f"-I{build.HERE}", *(f"-isystem{path}" for path in cpp_extension.include_paths())),
]
LIBRARIES = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]


@cache
def ops_on_host() -> Any:
    """The ops, with `begin` and `launches`: how many kernels were started since."""
    emulator = [path for path in build.HERE.glob("*.cpp") if path.name != "module.cpp"]
    objects = [str(build.compiled(path)) for path in sorted([*emulator, *build.KERNELS.glob("*.cu")])]
    command = [build.compiler(), *FLAGS, "-shared", *map(str, SOURCES), *objects, *LIBRARIES]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in [*SOURCES, *STAND_INS.rglob("*.h"), *CSRC.glob("*.h"), *build.KERNELS.glob("*.h")]:
        digest.update(path.read_bytes())
    library = build.OUTPUT / f"ops_on_host-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        build.run([*command, "-o", f"{library}.{os.getpid()}"])
        os.replace(f"{library}.{os.getpid()}", library)
    torch.ops.load_library(library)
    return torch.ops.cuda_on_host
