"""Builds pruned_ops._C beside the metadata in pyproject.toml: `pip install --no-build-isolation .` or `-e .`.

The kernels that use at::vec are compiled once per capability (DEFAULT, AVX2, AVX512) and chosen at run time.
PRUNED_OPS_BUILD_EXTENSION=0 installs the package without the extension; the ops then run their references.
PRUNED_OPS_SANITIZE=1 builds the extension under AddressSanitizer and UBSan (`make asan`).
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:  # metadata and the sdist need no torch; a build says what it needs, below
    torch = cpp_extension = None
    missing_torch = error

ROOT = Path(__file__).parent
SWITCH = "PRUNED_OPS_BUILD_EXTENSION"

# -fopenmp only compiles at::parallel_for's pragmas. Nothing is linked for it: the symbols come from the
# runtime that libtorch_cpu itself loads, so that a second one, with threads of its own, never appears.
# No errno and no traps in maths: torch is compiled so too, and loops vectorise better.
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
    # torch's headers: pragmas of other compilers, and notes on passing vectors by value.
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"),
]

# The first undefined behaviour ends the process, as the first bad access does.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
SANITIZE = SANITIZE if os.environ.get("PRUNED_OPS_SANITIZE", "0") != "0" else []

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
# The int8 kernels, compiled once. A name of its own, as nothing inline in them may run elsewhere.
INT8_KERNELS = "csrc/cpu/int8_kernels.cpp"
INT8_FLAGS = (
    {"AVX512_VNNI": [*CAPABILITY_FLAGS["AVX512"], "-mavx512vnni"]} if "AVX512" in CAPABILITY_FLAGS else {}
)


def wants_extension() -> bool:
    if os.environ.get(SWITCH, "1") == "0":
        print(f"pruned_ops: {SWITCH}=0, installing without the C++ extension", file=sys.stderr)
        return False
    if sys.platform != "linux":
        print(f"pruned_ops: no C++ extension on {sys.platform}, installing without it", file=sys.stderr)
        return False
    return True


class NeedsTorch(build_ext):
    """Stands in for the build where torch is missing."""

    def run(self) -> None:
        raise SetupError(
            "building pruned_ops._C needs torch in this environment: install torch first, then run "
            f"`pip install --no-build-isolation .`; or set {SWITCH}=0 to do without the C++ extension "
            f"({missing_torch})"
        )


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
            """One object per capability. DEFAULT is first: of an inline function that several objects have,
            the linker keeps the first copy, and that one must run on every processor."""
            objects: list[str] = []
            copies = [(KERNELS, *copy) for copy in CAPABILITY_FLAGS.items()]
            copies += [(INT8_KERNELS, *copy) for copy in INT8_FLAGS.items()]
            for source, capability, flags in copies:
                # ATen's headers know AVX512, not what it may have besides.
                vectors = capability.partition("_")[0]
                macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{vectors}"]
                objects += self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, capability),
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": [*ext.extra_compile_args["cxx"], *macros, *flags]},
                    depends=ext.depends,
                )
            return objects

    return BuildExtension


def extension() -> Extension:
    # Relative: a wheel's metadata records sources, and absolute paths would not survive a copy of the tree.
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    sources = [
        "csrc/bindings.cpp",
        "csrc/cpu/attention.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/encoder.cpp",
        "csrc/cpu/layer_norm.cpp",
        "csrc/cpu/chunks.cpp",
    ]
    defined = [
        (f"PRUNED_OPS_HAVE_{name}", "1") for name in (*CAPABILITY_FLAGS, *INT8_FLAGS) if name != "DEFAULT"
    ]
    arguments: dict[str, Any] = {
        "sources": sources,
        "depends": [KERNELS, INT8_KERNELS, *headers],
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": defined,
        "extra_compile_args": {"cxx": [*CXX_FLAGS, *SANITIZE]},
        "extra_link_args": SANITIZE,
    }
    if cpp_extension is None:
        return Extension("pruned_ops._C", **arguments)
    return cpp_extension.CppExtension("pruned_ops._C", **arguments)


def build_arguments() -> dict[str, Any]:
    if not wants_extension():
        return {}
    command = make_build_extension() if cpp_extension is not None else NeedsTorch
    return {"ext_modules": [extension()], "cmdclass": {"build_ext": command}}


setup(
    packages=[*find_packages(include=["pruned_ops*"]), *find_packages("python", include=["pruned_trainer*"])],
    **build_arguments(),
)
