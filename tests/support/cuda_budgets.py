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
    """A compiled kernel. stack, spilled: bytes a thread; shared: bytes that the kernel itself declares;
    threads, blocks: of its __launch_bounds__, 0 where it has none."""

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
        """Registers that a thread may have for the blocks to fit."""
        warps = -(-self.threads // WARP) * self.blocks
        return min(MOST_REGISTERS, REGISTERS // warps // STEP * STEP // WARP) if warps else 0

    def faults(self) -> list[str]:
        """How it breaks its budget; nothing where it keeps it."""
        if not self.threads or not self.blocks:
            return [f"{self.name} has no __launch_bounds__(threads, blocks)"]
        found = []
        if self.stack or self.spilled:
            found.append(f"{self.name} has {self.stack} bytes of stack and spills {self.spilled}")
        if self.registers > self.limit:
            found.append(f"{self.name} takes {self.registers} registers of {self.limit}")
        if self.blocks > BLOCKS or self.threads * self.blocks > THREADS:
            found.append(f"{self.name} asks for {self.blocks} blocks of {self.threads} threads: too many")
        return [f"{fault} on sm_{self.target}" for fault in found]


@functools.lru_cache
def nvcc() -> str | None:
    """The CUDA compiler; None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def toolkit_headers() -> Path:
    """The folder of CUDA's headers, as nvcc tells: it may be a script that runs one elsewhere."""
    plan = subprocess.run([str(nvcc()), "--dryrun", "-c", "a.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    assert top is not None, plan
    return Path(top[1], "include").resolve()


def compiled(source: Path, target: int) -> list[Kernel]:
    """The kernels of a file on sm_`target`; RuntimeError where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernels.ptx")
        _run([*FLAGS, f"-arch=compute_{target}", "-ptx", str(source), "-o", str(ptx)])
        said = _run([f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v", str(ptx), "-o", f"{ptx}.cubin"])
        bounds = _bounds(ptx.read_text(encoding="utf-8"))
    return [_kernel(part, target, bounds) for part in said.split("Compiling entry function '")[1:]]


def _run(arguments: list[str]) -> str:
    done = subprocess.run([str(nvcc()), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _bounds(ptx: str) -> dict[str, tuple[int, int]]:
    """Kernel -> threads and blocks, as .maxntid and .minnctapersm in front of its body have them."""
    found = {}
    for name, directives in re.findall(r"\.entry (\S+?)\([^)]*\)([^{]*)\{", ptx):
        threads = re.search(r"\.maxntid (\d+), 1, 1", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        found[name] = (int(threads[1]) if threads else 0, int(blocks[1]) if blocks else 0)
    return found


def _kernel(said: str, target: int, bounds: dict[str, tuple[int, int]]) -> Kernel:
    """From what ptxas -v says of one kernel."""
    symbol = said.partition("'")[0]
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said

    def number(pattern: str) -> int:
        found = re.search(rf"(\d+) bytes {pattern}", said)
        return int(found[1]) if found else 0

    spilled = number("spill stores") + number("spill loads")
    taken = (int(registers[1]), number("stack frame"), spilled, number("smem"))
    return Kernel(_readable(symbol), target, *taken, *bounds[symbol])


def _readable(symbol: str) -> str:
    """attention_kernel<half, 32>, of what the linker knows it by."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|pruned_ops::cuda::", "", name.removeprefix("void "))
    depth = 0
    for place, letter in enumerate(name):  # the arguments, after those of the template
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def table(kernels: Iterable[Kernel]) -> Table:
    """What each takes, beside its budget."""
    made = Table(title="registers a thread, bytes a thread; blocks that a multiprocessor must hold")
    for column in ("kernel", "arch", "registers", "limit", "stack", "spilled", "threads", "blocks", "shared"):
        made.add_column(column, justify="left" if column == "kernel" else "right")
    for one in sorted(kernels, key=lambda one: (one.name, one.target)):
        taken = (one.registers, one.limit, one.stack, one.spilled, one.threads, one.blocks, one.shared)
        made.add_row(one.name, f"sm_{one.target}", *map(str, taken))
    return made


def main() -> int:
    if nvcc() is None:
        print("there is no nvcc: nothing can be compiled", file=sys.stderr)
        return 2
    sources = [Path(one) for one in sys.argv[1:]] or KERNELS
    kernels = [one for source in sources for target in TARGETS for one in compiled(source, target)]
    Console(width=150).print(table(kernels))
    faults = [fault for one in kernels for fault in one.faults()]
    print("\n".join(faults) or f"{len(kernels)} kernels keep their budgets")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
