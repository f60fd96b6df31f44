"""Builds pruned_ops._C beside the metadata in pyproject.toml: `pip install --no-build-isolation .` or `-e .`.

The kernels that use at::vec are compiled once per capability (DEFAULT, AVX2, AVX512) and chosen at run time.
The CUDA kernels are compiled too where nvcc and a CUDA torch are, for TORCH_CUDA_ARCH_LIST, by MAX_JOBS jobs.
PRUNED_OPS_BUILD_EXTENSION=0 installs the package without the extension; the ops then run their references.
PRUNED_OPS_BUILD_CUDA=0 leaves the CUDA kernels out; 1 makes it an error that they cannot be built.
PRUNED_OPS_BUILD_LINES=1 keeps line numbers, by which a profiler knows inlined functions.
PRUNED_OPS_SANITIZE=1 builds the extension under AddressSanitizer and UBSan (`make asan`); =thread under
ThreadSanitizer (`make tsan`).
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

if int(setuptools.__version__.partition(".")[0]) < 77:  # the first that reads pyproject.toml's licence
    raise SystemExit(
        f"building pruned_ops needs setuptools 77 or newer, and this is {setuptools.__version__}: run "
        '`pip install "setuptools>=77" pybind11 ninja`, then the same command again'
    )

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:  # metadata and the sdist need no torch; a build says what it needs, below
    torch = cpp_extension = None
    missing_torch = error

ROOT = Path(__file__).parent
SWITCH = "PRUNED_OPS_BUILD_EXTENSION"
CUDA_SWITCH = "PRUNED_OPS_BUILD_CUDA"

# -fopenmp only compiles at::parallel_for's pragmas. Nothing is linked for it: the symbols come from the
# runtime that libtorch_cpu itself loads, so that a second one, with threads of its own, never appears.
# No errno and no traps in maths: torch is compiled so too, and loops vectorise better.
CXX_FLAGS = [
    *(
        "-O3",
        "-g1" if os.environ.get("PRUNED_OPS_BUILD_LINES") == "1" else "-g0",
        "-std=c++20",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ),
    # torch's headers: pragmas of other compilers, and notes on passing vectors by value.
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"),
]

# The first undefined behaviour ends the process, as the first bad access does.
SANITIZERS = {
    "0": [],
    "1": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"],
    # It cannot see into OpenMP's runtime: the header below makes threads that it knows.
    "thread": ["-fsanitize=thread", "-O1", "-fno-openmp"],
}
if os.environ.get("PRUNED_OPS_SANITIZE", "0") not in SANITIZERS:
    raise SystemExit(f"PRUNED_OPS_SANITIZE is {os.environ['PRUNED_OPS_SANITIZE']!r}; it is 0, 1 or thread")
SANITIZE = SANITIZERS[os.environ.get("PRUNED_OPS_SANITIZE", "0")]
THREADS_HEADER = ["-include", str(ROOT / "tests/tsan/std_threads.h")] if "-fno-openmp" in SANITIZE else []


# An empty one is as good as none, for torch's build too, which reads them later.
for name in ("CXX", "MAX_JOBS"):
    if not os.environ.get(name, "").strip():
        os.environ.pop(name, None)
COMPILER = os.environ.get("CXX", "c++")
try:
    COMPILER_WORDS = shlex.split(COMPILER)
except ValueError as error:
    raise SystemExit(f"CXX is {COMPILER!r}, which is no command line: {error}") from error


def knows(flags: list[str]) -> bool:
    """Whether there is a compiler, and it has these flags: gcc has those of AMX from version 11 on."""
    try:
        done = subprocess.run(
            [*COMPILER_WORDS, *flags, "-fsyntax-only", "-x", "c++", "-"], input=b"", capture_output=True
        )
    except OSError:
        return False
    return done.returncode == 0


# What torch compiles its own kernels with.
CAPABILITY_FLAGS: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITY_FLAGS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITY_FLAGS["AVX512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        # Zen 4 and Ice Lake on run 512-bit vectors at full clock; gcc's tuning would split some of them.
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",  # gcc's own _mm512_undefined_ps trips it
    ]
KERNELS = "csrc/cpu/kernels.cpp"
# The int8 kernels of VNNI and of AMX have capability names of their own, so that nothing inline in them is
# shared with files that run on other processors.
INT8_KERNELS = "csrc/cpu/int8_kernels.cpp"
INT8_FLAGS = {name: flags for name, flags in CAPABILITY_FLAGS.items() if name != "AVX512"}
if platform.machine().lower() in ("aarch64", "arm64"):
    # Every one has NEON, which DEFAULT uses; products of bytes came later.
    NEON_FLAGS = {
        "NEON_DOTPROD": ["-march=armv8.2-a+dotprod"],
        "NEON_I8MM": ["-march=armv8.2-a+dotprod+i8mm"],
    }
    INT8_FLAGS |= {name: flags for name, flags in NEON_FLAGS.items() if knows(flags)}
# bf16 has kernels for two instruction sets alone, under names of their own too.
BF16_KERNELS = "csrc/cpu/bf16_kernels.cpp"
BF16_FLAGS: dict[str, list[str]] = {}
if "AVX512" in CAPABILITY_FLAGS:
    INT8_FLAGS["AVX512_VNNI"] = [*CAPABILITY_FLAGS["AVX512"], "-mavx512vnni"]
    BF16_FLAGS["AVX512_BF16"] = [*CAPABILITY_FLAGS["AVX512"], "-mavx512bf16"]
    if knows(["-mamx-tile", "-mamx-int8", "-mamx-bf16"]):
        INT8_FLAGS["AMX_INT8"] = [*CAPABILITY_FLAGS["AVX512"], "-mamx-tile", "-mamx-int8"]
        BF16_FLAGS["AMX_BF16"] = [*BF16_FLAGS["AVX512_BF16"], "-mamx-tile", "-mamx-bf16"]

# The first chips that copy to shared memory in the background and multiply bfloat16; PTX for later ones.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
CUDA_SOURCES = [
    "csrc/cuda/ops.cpp",
    *sorted(f"csrc/cuda/{path.name}" for path in ROOT.glob("csrc/cuda/*.cu")),
]
# -lineinfo costs no speed: tools can then name the line that a kernel is at.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"]


def check_requirements() -> None:
    """SetupError, with what to do, where torch or the compiler is missing."""
    if cpp_extension is None:
        raise SetupError(
            f"building pruned_ops._C needs torch, and there is none here ({missing_torch}): pip hides it "
            "unless it is called with --no-build-isolation. Install torch first, then run "
            f"`pip install --no-build-isolation .`; or set {SWITCH}=0 to do without the C++ extension"
        )
    jobs = os.environ.get("MAX_JOBS", "1")
    if not jobs.isdecimal() or int(jobs) == 0:
        raise SetupError(f"MAX_JOBS is {jobs!r}; it is the number of files to compile at once, 1 or more")
    compiler = COMPILER.split()[0]  # the one that torch's build calls
    if shutil.which(compiler) is None:
        raise SetupError(
            f"building pruned_ops._C needs a C++ compiler, and there is no {compiler}: install g++ "
            f"(`apt install g++` on Debian and Ubuntu), name another in CXX, or set {SWITCH}=0 to do without "
            "the C++ extension"
        )


def wants_extension() -> bool:
    if os.environ.get(SWITCH, "1") == "0":
        print(f"pruned_ops: {SWITCH}=0, installing without the C++ extension", file=sys.stderr)
        return False
    if sys.platform != "linux":
        print(f"pruned_ops: no C++ extension on {sys.platform}, installing without it", file=sys.stderr)
        return False
    return True


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: where nvcc and a CUDA torch are, unless the switch says otherwise.

    Errors: SetupError if nvcc and torch do not fit each other, or if the switch asks for kernels that cannot
    be built.
    """
    switch = os.environ.get(CUDA_SWITCH, "auto")
    if switch not in ("0", "1", "auto"):
        raise SetupError(f"{CUDA_SWITCH} is {switch!r}; it is 0, 1 or auto")
    if switch == "0" or SANITIZE:
        return False
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA; install one that is built with it"
    elif nvcc() is None:
        missing = f"there is no nvcc; install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it"
    else:
        check_toolkit()
        return True
    if switch == "1":
        raise SetupError(f"{CUDA_SWITCH}=1 asks for the CUDA kernels, but {missing}")
    if torch.version.cuda is not None:
        print(f"pruned_ops: installing without the CUDA kernels: {missing}", file=sys.stderr)
    return False


def nvcc() -> Path | None:
    """The compiler that torch's build would use; None if there is none."""
    path = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    return path if cpp_extension.CUDA_HOME and path.is_file() else None


def check_toolkit() -> None:
    """Raise SetupError unless the toolkit has torch's major version, because both use one CUDA runtime."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+)[.\d]*", version)
    cuda = torch.version.cuda
    major = cuda.partition(".")[0]
    if toolkit is None or toolkit[1] != major:
        release = toolkit[0] if toolkit else "an unknown release"
        raise SetupError(
            f"{nvcc()} is of {release}, torch {torch.__version__} is built with CUDA {cuda}: set CUDA_HOME "
            f"to a toolkit of CUDA {major}, install a torch for that nvcc, or set {CUDA_SWITCH}=0 to leave "
            "the CUDA kernels out"
        )
    # The nvcc on PATH may be a script that runs one elsewhere, and torch's build looks for headers beside it.
    plan = subprocess.run([nvcc(), "--dryrun", "-c", "a.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top is not None and Path(top[1], "include", "cuda_runtime_api.h").is_file():
        cpp_extension.CUDA_HOME = os.path.normpath(top[1])


def refusing(reason: str) -> type:
    """A build command that raises SetupError with this reason; metadata and the sdist do not run it."""

    class Refusing(build_ext):
        def run(self) -> None:
            raise SetupError(reason)

    return Refusing


def make_build_extension() -> type:
    class BuildExtension(cpp_extension.BuildExtension):
        """torch's build with ninja, which knows each object's headers and compiles what changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:
                # Editable installs build in a temporary directory; a lasting one keeps them incremental.
                self.build_temp = str(ROOT / "build" / "editable")

        def build_extension(self, ext: Extension) -> None:
            try:
                ext.extra_objects = self.compile_kernels(ext)
                super().build_extension(ext)
            except Exception as error:
                raise CompileError(
                    f"building {ext.name} failed: {error}\nTo do without the C++ extension, set {SWITCH}=0."
                ) from error

        def compile_kernels(self, ext: Extension) -> list[str]:
            """Compile each file once per capability, those of DEFAULT first: where several objects hold the
            same inline function the linker keeps the first copy, which must run on every processor. As many
            capabilities are compiled at once as MAX_JOBS says, or as there are processors."""
            files = {KERNELS: CAPABILITY_FLAGS, INT8_KERNELS: INT8_FLAGS, BF16_KERNELS: BF16_FLAGS}

            def compiled(capability: str) -> list[str]:
                sources = [source for source, known in files.items() if capability in known]
                # ATen's headers know its own capabilities, not what a processor may have besides.
                vectors = capability if capability in CAPABILITY_FLAGS else list(CAPABILITY_FLAGS)[-1]
                macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{vectors}"]
                flags = files[sources[0]][capability]
                return self.compiler.compile(
                    sources,
                    output_dir=os.path.join(self.build_temp, capability),
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": [*CXX_FLAGS, *SANITIZE, *macros, *flags]},
                    depends=ext.depends,
                )

            order = CAPABILITY_FLAGS | INT8_FLAGS | BF16_FLAGS
            jobs = int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))
            with ThreadPoolExecutor(jobs) as pool:
                return [each for objects in pool.map(compiled, order) for each in objects]

    return BuildExtension


def extension(cuda: bool) -> Extension:
    # Relative: a wheel's metadata records sources, and absolute paths would not survive a copy of the tree.
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h"))
    sources = [
        "csrc/bindings.cpp",
        "csrc/cpu/amx_permission.cpp",
        "csrc/cpu/attention.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/encoder.cpp",
        "csrc/cpu/layer_norm.cpp",
    ]
    defined = [
        (f"PRUNED_OPS_HAVE_{name}", "1")
        for name in CAPABILITY_FLAGS | INT8_FLAGS | BF16_FLAGS
        if name != "DEFAULT"
    ]
    make = cpp_extension.CppExtension
    if cuda:
        make, sources = cpp_extension.CUDAExtension, [*sources, *CUDA_SOURCES]
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # torch's build reads it there
        defined.append(("PRUNED_OPS_HAVE_CUDA", f'"{architectures}"'))
    return make(
        "pruned_ops._C",
        sources=sources,
        depends=[KERNELS, INT8_KERNELS, BF16_KERNELS, *headers],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=defined,
        extra_compile_args={"cxx": [*CXX_FLAGS, *SANITIZE, *THREADS_HEADER], "nvcc": NVCC_FLAGS},
        extra_link_args=SANITIZE,
    )


def build_arguments() -> dict[str, Any]:
    if not wants_extension():
        return {}
    try:
        check_requirements()
        return {"ext_modules": [extension(wants_cuda())], "cmdclass": {"build_ext": make_build_extension()}}
    except SetupError as error:
        stand_in = Extension("pruned_ops._C", sources=[])
        return {"ext_modules": [stand_in], "cmdclass": {"build_ext": refusing(str(error))}}


setup(
    packages=[*find_packages(include=["pruned_ops*"]), *find_packages("python", include=["pruned_trainer*"])],
    **build_arguments(),
)
