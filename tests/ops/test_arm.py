"""The CPU kernels for 64-bit ARM, compiled on another machine and run on emulated processors: what is right,
and nothing of speed. `make arm` runs the tests of the ops so, which takes a torch for ARM."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
TRIPLET = "aarch64-linux-gnu"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
MISSING = [
    package
    for package, found in (
        ("the checkout", (ROOT / "setup.py").exists()),
        ("g++-aarch64-linux-gnu", shutil.which(f"{TRIPLET}-g++")),
        ("qemu-user-static", EMULATOR),
    )
    if not found
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"ARM is not emulated here without {MISSING}")
# The instructions that products are made of.
PRODUCTS = ("fmla", "sdot", "smmla")


@pytest.fixture(scope="module")
def settings() -> Iterator[dict[str, Any]]:
    """What setup.py compiles with on ARM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        patch.setattr(platform, "machine", lambda: "aarch64")
        patch.setenv("CXX", f"{TRIPLET}-g++")
        yield runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def objects(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An object for each file of kernels and capability, in the order in which setup.py links them."""
    made = []
    for source, known in (
        (settings["KERNELS"], settings["CAPABILITY_FLAGS"]),
        (settings["INT8_KERNELS"], settings["INT8_FLAGS"]),
        (settings["BF16_KERNELS"], settings["BF16_FLAGS"]),
    ):
        for capability, flags in known.items():
            made.append(tmp_path_factory.mktemp(capability) / f"{Path(source).stem}.o")
            macros = [f"-DCPU_CAPABILITY={capability}", "-DCPU_CAPABILITY_DEFAULT"]
            include = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
            command = [
                f"{TRIPLET}-g++",
                *settings["CXX_FLAGS"],
                *macros,
                *flags,
                *include,
                "-c",
                ROOT / source,
            ]
            subprocess.run([*command, "-o", made[-1]], check=True)
    return made


@pytest.fixture(scope="module")
def program(objects: list[Path]) -> Path:
    out = objects[0].with_name("drive")
    command = [f"{TRIPLET}-g++", "-static", "-O2", "-std=c++20", "-I", ROOT / "csrc"]
    subprocess.run([*command, ROOT / "tests" / "arm" / "drive.cpp", *objects, "-o", out], check=True)
    return out


@pytest.mark.parametrize(
    ("processor", "asked", "expected"),
    [
        ("max", "", ["DEFAULT", "NEON_DOTPROD", "NEON_I8MM"]),
        ("neoverse-n1", "", ["DEFAULT", "NEON_DOTPROD"]),
        ("cortex-a72", "", ["DEFAULT"]),
        ("max", "default", ["DEFAULT"]),
    ],
)
def test_kernels(program: Path, processor: str, asked: str, expected: list[str]) -> None:
    """int8 of every capability gives the same bits and exact sums, fp32 what double precision gives; nothing
    is read beyond its end."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": asked}
    done = subprocess.run(
        [str(EMULATOR), "-cpu", processor, str(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == expected


def loops(object_file: Path) -> Iterator[list[tuple[str, str]]]:
    """The innermost loops of an object: for each, its instructions with their operands. A jump back over the
    end of a function is none."""
    text = subprocess.run(
        [f"{TRIPLET}-objdump", "-d", "--no-show-raw-insn", object_file],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for function in re.split(r"^[0-9a-f]+ <.*>:$", text, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", function, flags=re.MULTILINE)
        place = {address: number for number, (address, _, _) in enumerate(lines)}
        ends = []
        for number, (_, name, operands) in enumerate(lines):
            goal = re.search(r"\b([0-9a-f]+) <", operands)
            if name.startswith(("b", "cb", "tb")) and goal and place.get(goal[1], number) < number:
                ends.append((place[goal[1]], number))
        for first, last in ends:
            loop = [line[1:] for line in lines[first : last + 1]]
            is_innermost = not any(first <= begin and end < last for begin, end in ends)
            if is_innermost and all(name != "ret" for name, _ in loop):
                yield loop


def test_tiles_stay_in_registers(objects: list[Path]) -> None:
    """The loops of the largest tiles hold 16 vectors of sums, and move none to the stack and back."""
    counts = dict.fromkeys(PRODUCTS, 0)
    for file in objects:
        for loop in loops(file):
            names = [name for name, _ in loop]
            for product in PRODUCTS:
                if names.count(product) >= 16 and len(names) < 3 * names.count(product):
                    counts[product] += 1
                    assert not any("[sp" in operands for _, operands in loop), (file, loop)
    assert all(counts.values()), counts
