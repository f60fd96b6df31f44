"""What the CUDA kernels take of a GPU, which need not be here: `cuda_budgets.py [FILE.cu ...]`.

nvcc alone compiles them for sm_80 and sm_90. A kernel's budget stands in its source: of
__launch_bounds__(threads, blocks) a multiprocessor must hold so many blocks, with nothing on a stack and
nothing spilled. Shared memory that a launch asks for is held to the same by the sources' static_asserts.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = (80, 90)
FLAGS = ["-O3", "-std=c++20", "-Werror", "all-warnings"]  # the first two are setup.py's
# Of a multiprocessor of sm_80 and sm_90 alike (CUDA programming guide, technical specifications): registers,
# taken in steps of 256 a warp, of at most 255 a thread; threads; blocks.
REGISTERS, STEP, MOST_REGISTERS, THREADS, BLOCKS = 65536, 256, 255, 2048, 32
WARP = 32


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    registers, stack, spilled: per thread, the latter two in bytes. shared: the bytes of shared memory that
    the kernel itself declares. threads, blocks: its __launch_bounds__, 0 if it has none.
    """

    name: str
    target: int
    registers: int
    stack: int
    spilled: int
    shared: int
    threads: int
    blocks: int

    @property
    def limit(self) -> int:
        """The registers that a thread may have so that the blocks fit."""
        warps = -(-self.threads // WARP) * self.blocks
        return min(MOST_REGISTERS, REGISTERS // warps // STEP * STEP // WARP) if warps else 0

    def faults(self) -> list[str]:
        """The ways in which it breaks its budget, a sentence each."""
        if not self.threads or not self.blocks:
            return [f"{self.name} has no __launch_bounds__(threads, blocks)"]
        faults = []
        if self.stack or self.spilled:
            faults.append(f"{self.name} has {self.stack} bytes of stack and spills {self.spilled}")
        if self.registers > self.limit:
            faults.append(f"{self.name} takes {self.registers} registers of {self.limit}")
        if self.blocks > BLOCKS or self.threads * self.blocks > THREADS:
            faults.append(f"{self.name} asks for {self.blocks} blocks of {self.threads} threads: too many")
        return [f"{fault} on sm_{self.target}" for fault in faults]


@functools.lru_cache
def nvcc() -> str | None:
    """The CUDA compiler; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def toolkit_headers() -> Path:
    """The folder of CUDA's headers, as nvcc names it: nvcc may be a script that runs one elsewhere."""
    plan = subprocess.run([str(nvcc()), "--dryrun", "-c", "a.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    assert top is not None, plan
    return Path(top[1], "include").resolve()


def compiled(source: Path, target: int) -> list[Kernel]:
    """The kernels of a file on sm_`target`; RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernels.ptx")
        _run([*FLAGS, f"-arch=compute_{target}", "-ptx", str(source), "-o", str(ptx)])
        report = _run([f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v", str(ptx), "-o", f"{ptx}.cubin"])
        bounds = _bounds(ptx.read_text(encoding="utf-8"))
    return [_kernel(part, target, bounds) for part in report.split("Compiling entry function '")[1:]]


def _run(arguments: list[str]) -> str:
    done = subprocess.run([str(nvcc()), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Kernel -> threads and blocks, from the .maxntid and .minnctapersm in front of its body."""
    bounds = {}
    for name, directives in re.findall(r"\.entry (\S+?)\([^)]*\)([^{]*)\{", ptx):
        threads = re.search(r"\.maxntid (\d+), 1, 1", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        bounds[name] = (int(threads[1]) if threads else 0, int(blocks[1]) if blocks else 0)
    return bounds


def _kernel(report: str, target: int, bounds: dict[str, tuple[int, int]]) -> Kernel:
    """Make a Kernel from what ptxas -v reports about it."""
    symbol = report.partition("'")[0]
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report

    def number(pattern: str) -> int:
        match = re.search(rf"(\d+) bytes {pattern}", report)
        return int(match[1]) if match else 0

    spilled = number("spill stores") + number("spill loads")
    taken = (int(registers[1]), number("stack frame"), spilled, number("smem"))
    return Kernel(_readable(symbol), target, *taken, *bounds[symbol])


def _readable(symbol: str) -> str:
    """Turn a linker's symbol into a name such as attention_kernel<half, 32>."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|pruned_ops::cuda::", "", name.removeprefix("void "))
    depth = 0
    for place, letter in enumerate(name):  # the arguments, after those of the template
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def budget_table(kernels: Iterable[Kernel]) -> Table:
    """A table of what each kernel takes, beside its budget."""
    table = Table(title="registers a thread, bytes a thread; blocks that a multiprocessor must hold")
    for column in ("kernel", "arch", "registers", "limit", "stack", "spilled", "threads", "blocks", "shared"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.target)):
        taken = (kernel.registers, kernel.limit, kernel.stack, kernel.spilled)
        bounds = (kernel.threads, kernel.blocks, kernel.shared)
        table.add_row(kernel.name, f"sm_{kernel.target}", *map(str, (*taken, *bounds)))
    return table


def main() -> int:
    if nvcc() is None:
        print("there is no nvcc: nothing can be compiled", file=sys.stderr)
        return 2
    sources = [Path(name) for name in sys.argv[1:]] or KERNELS
    kernels = [kernel for source in sources for target in TARGETS for kernel in compiled(source, target)]
    Console(width=150).print(budget_table(kernels))
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    print("\n".join(faults) or f"{len(kernels)} kernels keep their budgets")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
