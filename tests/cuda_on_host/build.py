"""Compiles the CUDA kernels for the host, with the emulator, into a Python module: build/cuda_on_host/.

Objects are named by a digest of all that went into them, so what did not change is not compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
OUTPUT = HERE.parents[1] / "build" / "cuda_on_host"
NAME = "kernels_on_host"

FLAGS = [
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fPIC"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *(
        f"-isystem{path}"
        for path in (Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"])
    ),
]


class CompileError(Exception):
    """The compiler's words."""


def compiler() -> str:
    return "g++"


@cache
def _target() -> bytes:
    """The compiler, and what it makes of this processor."""
    command = [compiler(), "-march=native", "-Q", "--help=target", "--version"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def included(source: Path, kernels: Path) -> list[Path]:
    """The file and all files of ours that it includes, directly or through others."""
    files = [source]
    for path in files:  # which grows meanwhile
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            places = [folder / name for folder in (path.parent, kernels, HERE)]
            header = next((place for place in places if place.exists()), None)
            if header is not None and header not in files:
                files.append(header)
    return files


def _flags(source: Path) -> list[str]:
    # Nothing in the module needs to be quick.
    return [*FLAGS, f"-I{HERE}", *(["-O0"] if source.name == "module.cpp" else [])]


def object_of(source: Path, kernels: Path = KERNELS) -> Path:
    """Where the object of this source is, or will be: the same for the same text in any folder."""
    digest = hashlib.sha256(_target() + " ".join(_flags(source)).encode())
    for path in included(source, kernels):
        digest.update(path.read_bytes())
    return OUTPUT / f"{source.stem}-{digest.hexdigest()[:16]}.o"


def compiled(source: Path, kernels: Path = KERNELS) -> Path:
    """The object of this source. kernels: the folder of the kernels and of their headers."""
    target = object_of(source, kernels)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that compiles it is waited for
        if not target.exists():
            command = [compiler(), "-x", "c++", f"-I{kernels}", *_flags(source), "-c", str(source)]
            run([*command, "-o", f"{target}.{os.getpid()}"])
            os.replace(f"{target}.{os.getpid()}", target)
    return target


def run(command: list[str]) -> None:
    """CompileError where the compiler has anything to say, a warning too."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def build(kernels: Path = KERNELS) -> Any:
    """The module, of the kernels in this folder. As many compilers run at once as MAX_JOBS says, or as there
    are processors."""
    sources = sorted([*kernels.glob("*.cu"), *HERE.glob("*.cu"), *HERE.glob("*.cpp")])
    jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(lambda source: compiled(source, kernels), sources)]
    library = OUTPUT / f"{NAME}-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        run([compiler(), "-shared", *objects, "-o", f"{library}.{os.getpid()}"])
        os.replace(f"{library}.{os.getpid()}", library)
    return _loaded(library)


@cache
def _loaded(library: Path) -> Any:
    # As if each were in a package of its own: pybind11 takes modules of one name for the same.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{NAME}", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
