"""Compiles the CUDA kernels for the host, with the emulator, into a Python module: build/cuda_on_host/.

Objects are named by a digest of all that went into them, so what did not change is not compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
OUTPUT = HERE.parents[1] / "build" / "cuda_on_host"
NAME = "cuda_on_host"

FLAGS = [
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fPIC"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *(f"-I{KERNELS}", f"-I{HERE}"),
    *(
        f"-isystem{path}"
        for path in (Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"])
    ),
]


class CompileError(Exception):
    """The compiler's words."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sources() -> list[Path]:
    """Every kernel's source, the emulator's and the module's."""
    return sorted([*KERNELS.glob("*.cu"), *HERE.glob("*.cu"), *HERE.glob("*.cpp")])


@cache
def _digest_of_all() -> str:
    """Of what every object depends on: the compiler and what it makes of this processor, headers, flags."""
    targets = subprocess.run(
        [compiler(), "-march=native", "-Q", "--help=target", "--version"], capture_output=True, check=True
    )
    headers = sorted(path for folder in (KERNELS, HERE) for path in folder.glob("*.*h"))
    digest = hashlib.sha256(targets.stdout + " ".join(FLAGS).encode())
    for path in headers:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(name: str, text: bytes) -> Path:
    """The object of this source."""
    digest = hashlib.sha256(_digest_of_all().encode() + text).hexdigest()[:16]
    stem = f"{Path(name).stem}-{digest}"
    target = OUTPUT / f"{stem}.o"
    if not target.exists():
        copy = OUTPUT / f"{stem}{Path(name).suffix}"
        copy.write_bytes(b'#line 1 "%s"\n' % name.encode() + text)
        # Nothing in the module needs to be quick.
        flags = [*FLAGS, "-O0"] if name == "module.cpp" else FLAGS
        run([compiler(), "-x", "c++", *flags, "-c", str(copy), "-o", f"{target}.{os.getpid()}"])
        os.replace(f"{target}.{os.getpid()}", target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def build(changed: Mapping[str, str] | None = None) -> Any:
    """The module. changed: file name -> text that stands in for that kernel's source.

    CompileError where the compiler has anything to say, a warning too. As many compilers run at once as
    MAX_JOBS says, or as there are processors.
    """
    texts = {path.name: path.read_bytes() for path in sources()}
    for name, text in (changed or {}).items():
        if name not in texts:
            raise ValueError(f"there is no source {name}; there are {', '.join(texts)}")
        texts[name] = text.encode()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(compiled, texts, texts.values())]
    library = OUTPUT / f"{NAME}-{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        run([compiler(), "-shared", *objects, "-o", f"{library}.{os.getpid()}"])
        os.replace(f"{library}.{os.getpid()}", library)
    return _loaded(library)


@cache
def _loaded(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
