"""The CUDA part of the extension where there is no GPU: what nvcc makes of the kernels, whether torch's and
CUDA's headers take the rest, and when setup.py builds them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from setuptools.errors import SetupError
from torch.utils import cpp_extension

from cuda_budgets import KERNELS, TARGETS, compiled, nvcc, toolkit_headers

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")

# Each breaks its budget in its own way.
FAULTY = """
__global__ void unbounded(float* x) { *x = 0; }
__global__ void __launch_bounds__(1024) half_bounded(float* x) { *x = 0; }
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = y[i] * y[63 - i];
}
__global__ void __launch_bounds__(64, 4) good(float* x) {
  __shared__ float y[64];
  y[threadIdx.x] = *x;
  __syncthreads();
  x[threadIdx.x] = y[63 - threadIdx.x];
}
"""


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: f"cuda-{path.stem}")
def test_cuda_kernels_keep_their_budgets(source: Path) -> None:
    for target in TARGETS:
        kernels = compiled(source, target)
        assert kernels and {one.target for one in kernels} == {target}
        assert not [fault for one in kernels for fault in one.faults()]
        for dtype in ("half", "bfloat16"):
            assert any(dtype in one.name for one in kernels)


@needs_nvcc
def test_broken_budgets_are_found(tmp_path: Path) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    found = {one.name: one for one in compiled(source, 80)}
    for name in ("unbounded", "half_bounded"):
        assert found[name].faults() == [f"{name} has no __launch_bounds__(threads, blocks)"]
    (fault,) = found["spilling"].faults()
    assert re.fullmatch(r"spilling has [1-9]\d* bytes of stack and spills [1-9]\d* on sm_80", fault)
    good = found["good"]
    assert (good.threads, good.blocks, good.shared, good.faults()) == (64, 4, 256, [])
    # By hand: 65536 registers for 2 blocks of 32 warps are 1024 a warp; 8 warps leave more than a thread
    # can have.
    assert (found["spilling"].limit, good.limit) == (32, 255)


LAUNCH = """
#include <cstdio>
#include "cuda/launch.h"
__global__ void nothing() {}
int main() {
  for (int failed = 0; failed < 2; ++failed) {
    cudaGetLastError();
    if (failed) cudaSetDevice(-1);
    const char* refused = pruned_ops::cuda::launch(nothing, {}, 32, 0, nullptr);
    std::puts(refused == nullptr ? "started" : refused);
  }
}
"""


@needs_nvcc
def test_an_earlier_error_is_not_called_the_launchs(tmp_path: Path) -> None:
    """Without a driver CUDA has an error of its own from the start: the first launch tells on a GPU only."""
    source, program = tmp_path / "launch.cu", tmp_path / "launch"
    source.write_text(LAUNCH)
    subprocess.run([str(nvcc()), "-std=c++20", f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 2 and (said[0] == "started" or not torch.cuda.is_available())
    assert said[1].startswith("an earlier CUDA call failed: ")


@needs_nvcc
@pytest.mark.parametrize("source", ["cuda/ops.cpp", "bindings.cpp"])
def test_the_cuda_build_compiles_without_a_cuda_torch(source: str) -> None:
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], toolkit_headers()]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", f"-I{SOURCES}"]
    # What a CPU torch's headers lack: the macros that its own CUDA build wrote down.
    command += ['-DPRUNED_OPS_HAVE_CUDA="8.0"', "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    for folder in headers:
        command += ["-isystem", str(folder)]
    done = subprocess.run([*command, str(SOURCES / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_of_torchs_cuda_headers_only_c10s_are_included() -> None:
    """And the kernels include none of torch's at all: nvcc alone compiles them."""
    for path in [*SOURCES.rglob("*.*h"), *SOURCES.rglob("*.h"), *SOURCES.rglob("*.cpp"), *KERNELS]:
        included = re.findall(r'#include [<"](.+)[>"]', path.read_text(encoding="utf-8"))
        known = {"cuda_runtime_api.h", "cuda/kernels.h", "cuda/ops.h"}
        others = [name for name in included if "cuda" in name and name not in known]
        assert all(name.startswith("c10/cuda/") for name in others), (path, others)
        if path.parent.name == "cuda" and path.stem != "ops":
            assert not [name for name in included if re.match("ATen|c10|torch|pybind11", name)], path


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch for CUDA 13.0 and the nvcc of 13.2 that it finds: a script beside no headers. Returns the
    toolkit that the script's compiler is of."""
    toolkit, home = tmp_path / "toolkit", tmp_path / "home"
    for folder in (toolkit / "bin", toolkit / "include", home / "bin"):
        folder.mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime_api.h").touch()
    version, top = "Cuda compilation tools, release 13.2, V13.2.1", f"#$ TOP={toolkit}/bin/.."
    for path, does in (
        (toolkit / "bin" / "nvcc", f'[ "$1" = --version ] && echo "{version}" || echo "{top}" >&2'),
        (home / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"'),
    ):
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    return toolkit


@pytest.fixture
def cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def planned(monkeypatch: pytest.MonkeyPatch, **switches: str) -> tuple[Any, Any]:
    """setup.py's extension and its command, with these environment variables."""
    for name in ("PRUNED_OPS_BUILD_CUDA", "PRUNED_OPS_BUILD_EXTENSION", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, switches.get(name, ""))
        if name not in switches:
            monkeypatch.delenv(name)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: asked.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return asked["ext_modules"][0], asked["cmdclass"]["build_ext"]


def macros(extension: Any) -> dict[str, str]:
    return dict(extension.define_macros)


def refusal(command: Any) -> str:
    with pytest.raises(SetupError) as raised:
        command(setuptools.Distribution()).run()
    return str(raised.value)


def test_a_cuda_torch_with_nvcc_builds_the_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, cuda_torch: Path
) -> None:
    extension, _ = planned(monkeypatch)
    kernels = {str(path.relative_to(ROOT)) for path in KERNELS}
    assert kernels | {"csrc/cuda/ops.cpp", "csrc/cpu/encoder.cpp"} <= set(extension.sources) and kernels
    assert macros(extension)["PRUNED_OPS_HAVE_CUDA"] == '"8.0;9.0+PTX"'
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"  # what torch's build compiles for
    assert str(cuda_torch / "include") in extension.include_dirs
    assert {"cudart", "c10_cuda"} <= set(extension.libraries)
    extension, _ = planned(monkeypatch, TORCH_CUDA_ARCH_LIST="9.0")
    assert macros(extension)["PRUNED_OPS_HAVE_CUDA"] == '"9.0"'
    extension, _ = planned(monkeypatch, TORCH_CUDA_ARCH_LIST="")
    assert macros(extension)["PRUNED_OPS_HAVE_CUDA"] == '"8.0;9.0+PTX"'


def test_the_switch_leaves_the_cuda_kernels_out(monkeypatch: pytest.MonkeyPatch, cuda_torch: Path) -> None:
    extension, _ = planned(monkeypatch, PRUNED_OPS_BUILD_CUDA="0")
    assert not [name for name in extension.sources if "cuda" in name]
    assert {"csrc/bindings.cpp", "csrc/cpu/encoder.cpp"} <= set(extension.sources)
    _, command = planned(monkeypatch, PRUNED_OPS_BUILD_CUDA="yes")
    assert "PRUNED_OPS_BUILD_CUDA is 'yes'; it is 0, 1 or auto" in refusal(command)


def test_a_cpu_torch_builds_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch, cpu_torch: None) -> None:
    extension, command = planned(monkeypatch)
    assert "csrc/bindings.cpp" in extension.sources and issubclass(command, cpp_extension.BuildExtension)
    assert not [name for name in extension.sources if "cuda" in name]
    assert "PRUNED_OPS_HAVE_CUDA" not in macros(extension) and "cudart" not in extension.libraries
    _, command = planned(monkeypatch, PRUNED_OPS_BUILD_CUDA="1")
    assert re.search("asks for the CUDA kernels, but torch .* is built without CUDA", refusal(command))


def test_another_major_version_of_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, cuda_torch: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _, command = planned(monkeypatch)
    said = refusal(command)
    assert re.search(r"nvcc is of release 13\.2, torch .* is built with CUDA 12\.8: set CUDA_HOME to a", said)
    assert "PRUNED_OPS_BUILD_CUDA=0" in said
    extension, command = planned(monkeypatch, PRUNED_OPS_BUILD_CUDA="0")
    assert "csrc/bindings.cpp" in extension.sources and issubclass(command, cpp_extension.BuildExtension)


def test_a_cuda_torch_without_nvcc_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, cuda_torch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    extension, _ = planned(monkeypatch)
    assert not [name for name in extension.sources if "cuda" in name]
    assert {"csrc/bindings.cpp", "csrc/cpu/encoder.cpp"} <= set(extension.sources)
    assert "without the CUDA kernels: there is no nvcc; install the CUDA 13.0" in capsys.readouterr().err
    _, command = planned(monkeypatch, PRUNED_OPS_BUILD_CUDA="1")
    assert "asks for the CUDA kernels, but there is no nvcc" in refusal(command)


def test_the_sdist_has_what_the_cuda_build_and_its_tests_need() -> None:
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    patterns = {folder: names for rule, folder, *names in rules if rule == "recursive-include"}
    for folder in ("csrc", "tests"):
        sources = [path for kind in ("cu", "cuh", "h", "cpp") for path in (ROOT / folder).rglob(f"*.{kind}")]
        assert sources
        left_out = [path for path in sources if not any(path.match(name) for name in patterns[folder])]
        assert not left_out
