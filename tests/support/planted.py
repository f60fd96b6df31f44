"""Faults written into a copy of the CUDA kernels' sources, for test_cuda_faults.py to find each.

All are in one copy, which is compiled once; at most one is there when it runs (`emulator::fault`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from cuda_on_host.build import KERNELS, OUTPUT, build

from inputs import arguments_for, attention_arguments, randn


@dataclass(frozen=True)
class Fault:
    """`right` stands once in a file and becomes `wrong`: an expression, or statements where it ends with ";".

    make: arguments of the op with which it shows. shows: what an error of the emulator says (a regular
    expression); "wrong": the result, or it changes with the order of threads; "conflicts": of banks.
    """

    name: str
    file: str
    right: str
    wrong: str
    op: str
    make: Callable[[], list[Any]]
    shows: str = "wrong"

    def plant(self, text: str, number: int) -> str:
        assert text.count(self.right) == 1, f"{self.file} has {text.count(self.right)} times: {self.right}"
        if self.right.endswith(";"):
            both = f"{{ if (emulator::fault == {number}) {{ {self.wrong} }} else {{ {self.right} }} }}"
        else:
            both = f"(emulator::fault == {number} ? ({self.wrong}) : ({self.right}))"
        return text.replace(self.right, both)


def wrong_bounds(*bounds: int) -> list[Any]:
    """Attention's arguments with a cu_seqlens that leads outside its 40 tokens."""
    return [randn(0, 40, 3 * 64), torch.tensor(bounds, dtype=torch.int32), 64, 32]


def wrong_ids() -> list[Any]:
    arguments = arguments_for("embed_layer_norm", 9, 96)
    arguments[1] = arguments[1] + 40
    return arguments


# Several tiles of keys, the last of them not whole.
LONG = partial(attention_arguments, (200, 130), 1, 64)
# Many steps of 32, rows and columns that do not fill a tile; 16 bytes at once, and number by number.
WIDE = partial(arguments_for, "linear_gelu", 70, 264, 72)
ODD = partial(arguments_for, "linear_gelu", 70, 261, 73)
ROWS = partial(arguments_for, "add_layer_norm", 9, 384)
LONG_ROWS = partial(arguments_for, "add_layer_norm", 3, 1032)

FAULTS = [
    Fault("the maximum of another row's lane", "attention.cu",
          "shuffle_xor(highest, 2)", "shuffle_xor(highest, 4)", "attention", LONG),
    Fault("the sum of another row's lane", "attention.cu",
          "shuffle_xor(sum, 1)", "shuffle_xor(sum, 8)", "attention", LONG),
    Fault("one key too many", "attention.cu",
          "8 * i + column + j % 2 >= count", "8 * i + column + j % 2 > count", "attention", LONG),
    Fault("an earlier sum that does not shrink", "attention.cu",
          "total[half_row] * shrink + sum", "total[half_row] + sum", "attention", LONG),
    Fault("values in one buffer", "attention.cu", "keys(2 + buffer)", "keys(2)", "attention", LONG),
    Fault("a key past the end", "attention.cu",
          "memory.keys(buffer).template copy_async<kThreads>(from + width, stride, length - key, HEAD_DIM);",
          "memory.keys(buffer).template copy_async<kThreads>(from + width, stride, length + 1 - key, "
          "HEAD_DIM);",
          "attention", LONG, "reads 16 bytes at index .* of qkv, which has"),
    Fault("a row written past the end", "attention.cu",
          "row < rows", "row <= rows", "attention", LONG, "writes 16 bytes at index .* of out, which has"),
    Fault("the end as cu_seqlens has it", "attention.cu",
          "min(max(cu_seqlens[sequence + 1], begin), tokens)", "cu_seqlens[sequence + 1]", "attention",
          partial(wrong_bounds, 0, 20, 60), "reads 16 bytes at index .* of qkv, which has"),
    Fault("the beginning as cu_seqlens has it", "attention.cu",
          "min(max(cu_seqlens[sequence], 0), tokens)", "cu_seqlens[sequence]", "attention",
          partial(wrong_bounds, -20, 20, 40), "reads 16 bytes at index -.* of qkv, which has"),
    Fault("no permutation", "tile.cuh", "chunk ^ permutation", "chunk", "attention", LONG, "conflicts"),
    Fault("a row of x past the end", "tile.cuh",
          "inside && row + i < rows", "inside && row + i <= rows", "linear_gelu", WIDE,
          "reads 16 bytes at index"),
    Fault("a chunk past the end", "tile.cuh",
          "chunk * kChunk < columns", "chunk * kChunk <= columns", "linear_gelu", WIDE,
          "reads 16 bytes at index"),
    Fault("a number past the end", "tile.cuh",
          "column < columns", "column <= columns", "linear_gelu", ODD, "reads 2 bytes at index"),
    Fault("the rows of other lanes", "tile.cuh",
          "row + lane / 16 * 8 + lane % 8", "row + lane / 8 % 2 * 8 + lane % 8", "linear_gelu", WIDE),
    Fault("a wait for one copy too few", "linear.cuh",
          "cp_async_wait<S::kStages - 2>();", "cp_async_wait<S::kStages - 1>();", "linear_gelu", WIDE),
    Fault("a copy to where others read", "linear.cuh",
          "copy(step + S::kStages - 1);", "copy(step + S::kStages);", "linear_gelu", WIDE),
    Fault("whole chunks at the end", "linear.cuh",
          "min(kChunk, columns - chunk * kChunk)", "kChunk", "linear_gelu", ODD,
          "writes 2 bytes at index .* of out"),
    Fault("the tail of another GELU", "gelu.cuh",
          "size * exp2_approx(-scaled * scaled)", "exp2_approx(-scaled * scaled)", "linear_gelu", WIDE),
    Fault("16 bytes where they do not lie", "linear.cuh",
          "is_aligned(a.out, a.width, sizeof(T))", "true", "linear_gelu", ODD,
          "of out, which is not aligned to 16"),
    Fault("a bias past the end", "linear.cuh",
          "first + k < columns", "first + k <= columns", "linear_gelu", WIDE,
          "reads 2 bytes at index 72 of bias"),
    Fault("a row past the end", "linear.cuh",
          "r >= rows", "r > rows", "linear_gelu", WIDE, "writes 16 bytes at index .* of out"),
    Fault("what is not in the row", "row_norm.cuh",
          "column(i) < hidden ? values[i] - mean : 0.0f", "values[i] - mean", "add_layer_norm", ROWS),
    Fault("half a sum", "row_norm.cuh", "bits > 0", "bits > 1", "add_layer_norm", ROWS),
    Fault("two sums in one place", "row_norm.cuh",
          "shared_memory<float>() + slot * kWarps", "shared_memory<float>()", "add_layer_norm", LONG_ROWS),
    Fault("16 bytes past the end read", "row_norm.cuh",
          "if (column(i) < hidden) bits = load_128<T>(row + column(i));",
          "if (column(i) <= hidden) bits = load_128<T>(row + column(i));", "add_layer_norm", ROWS,
          "reads 16 bytes at index .*, which has"),
    Fault("16 bytes past the end written", "row_norm.cuh",
          "if (column(i) < hidden) store_128<T>(row + column(i), bits);",
          "if (column(i) <= hidden) store_128<T>(row + column(i), bits);", "add_layer_norm", ROWS,
          "writes 16 bytes at index .* of out, which has"),
    Fault("tokens that are not there", "add_layer_norm.cu",
          "token >= tokens", "false", "add_layer_norm", ROWS, "reads 2 bytes at index .* of x, which has"),
    Fault("ids as they are", "embed_layer_norm.cu",
          "id < 0 ? 0 : id > last ? last : id", "id", "embed_layer_norm", wrong_ids,
          "reads 2 bytes at index .* of position, which has"),
]  # fmt: skip

# A statement by which threads wait; without it, a fault.
WAIT = re.compile(r"(?:sync_threads|sync_warp|cp_async_wait<[^;]*>)\(\);")
# With these nothing is wrong, and every wait of a file is needed.
USUAL = {
    "attention.cu": [("attention", LONG)],
    "linear.cuh": [("linear_gelu", WIDE), ("linear_gelu", ODD)],
    "row_norm.cuh": [("add_layer_norm", ROWS), ("add_layer_norm", LONG_ROWS)],
}


@dataclass(frozen=True)
class Wait:
    file: str
    line: int
    statement: str


def waits() -> list[Wait]:
    """Every one of the kernels'."""
    found = []
    for path in sorted(KERNELS.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.name != "ptx.cuh" and (match := WAIT.search(line)):
                found.append(Wait(path.name, number, match.group()))
    return found


def number_of(planted: Fault | Wait) -> int:
    """What `emulator::fault` is when it is there."""
    every: Sequence[Fault | Wait] = [*FAULTS, *waits()]
    return 1 + every.index(planted)


@cache
def faulty_kernels() -> Any:
    """The module of the copy. AssertionError where a fault's text is not once in its file."""
    folder = OUTPUT / "planted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder)
    for wait in waits():
        lines = (folder / wait.file).read_text().splitlines(keepends=True)
        without = f"if (emulator::fault != {number_of(wait)}) {wait.statement}"
        lines[wait.line - 1] = lines[wait.line - 1].replace(wait.statement, without)
        (folder / wait.file).write_text("".join(lines))
    for fault in FAULTS:
        text = (folder / fault.file).read_text()
        (folder / fault.file).write_text(fault.plant(text, number_of(fault)))
    return build(folder)
