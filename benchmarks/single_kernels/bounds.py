"""Bounds of the Triton kernels on a machine without a GPU: the bytes and FLOP of each op, the least time that
a chip's ceilings allow for them, and how the compiled kernel fills the chip. A bound is never a result."""

from __future__ import annotations

import dataclasses
import math
import os

import torch
from rich import box
from rich.table import Table

from single_kernels.cases import MODELS, Case, Place, cases
from single_kernels.schedule import CEILINGS

os.environ.pop("TRITON_INTERPRET", None)  # which would switch compilation off

from pruned_ops.ops.backends.triton import ahead_of_time, configs, tuning  # noqa: E402
from pruned_ops.ops.backends.triton.configs import AttentionConfig, GemmConfig  # noqa: E402
from pruned_ops.ops.backends.triton.tuning import Problem  # noqa: E402

TARGET, H200 = 90, tuning.Chip(132, configs.SHARED_MEMORY[90], True)
DTYPE = torch.float16


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched: its case, and the number of its programs."""

    case: ahead_of_time.Case
    programs: int


def launch_of(case: Case) -> Launch | None:
    """The kernel that the model of time chooses on an H200 for this op; None: cuBLAS's GEMM does the work."""
    tokens, outputs, inner = case.shape
    if case.op in ("add_layer_norm", "embed_layer_norm"):
        rows = configs.row_configs(outputs)[0]
        make = getattr(ahead_of_time, f"{case.op}_case")
        return Launch(make(rows, configs.next_power_of_2(outputs), "fp16"), math.ceil(tokens / rows.rows))
    longest = tuning.length_bucket(max(case.lengths)) if case.op == "attention" else 0
    problem = Problem(case.op, str(DTYPE), tuning.bucket(tokens), outputs, inner, longest)
    config = tuning.modelled(problem, True, H200)
    if isinstance(config, AttentionConfig):
        tiles = sum(math.ceil(length / config.block_m) for length in case.lengths)
        if config.sequences:
            tiles = math.ceil(len(case.lengths) / config.sequences)
        return Launch(ahead_of_time.attention_case(config, inner, "fp16"), tiles * outputs)
    if not isinstance(config, GemmConfig):
        return None
    tiles = math.ceil(tokens / config.block_m) * math.ceil(outputs / config.block_n) * config.split_k
    if case.op == "linear_add_layer_norm" and config.split_k == 1:
        return Launch(ahead_of_time.fused_case(config, "fp16"), tiles)
    programs = min(tiles, H200.multiprocessors) if config.persistent else tiles
    return Launch(ahead_of_time.gemm_case(config, "fp16"), programs)


def bounds(lengths: tuple[int, ...]) -> tuple[Table, Table]:
    """Two tables with a line for each op: what it moves and computes, with the least time for that; and the
    kernel that would be chosen, with its tile, the number of its programs, and how many of them registers and
    shared memory let a multiprocessor hold."""
    title = f"an H200 in fp16, not results: {len(lengths)} sequences, {sum(lengths)} tokens"
    least = _table(f"BOUNDS for {title}", "MFLOP", "MB", "at least, us", "bound by")
    held = _table(
        "The same compiled for sm_90: what a multiprocessor holds, of 64 warps",
        "tile",
        "programs",
        "reg",
        "KiB",
        "a SM",
        "warps",
    )
    for model in MODELS:
        for table in (least, held):
            table.add_row(f"[bold]{model.name}[/]")
        for case in cases(model, lengths, Place(DTYPE, "cpu")):
            compute, move = case.flops / CEILINGS["flops"], case.bytes / CEILINGS["bytes"]
            name = f"{case.op}, {case.model.removeprefix(model.name).strip(', ')}".strip(", ")
            least.add_row(
                name, f"{case.flops / 1e6:.0f}", f"{case.bytes / 1e6:.1f}",
                f"{max(compute, move) * 1e6:.2f}", "products" if compute > move else "memory",
            )  # fmt: skip
            held.add_row(name, *filling(case))
        for table in (least, held):
            table.add_section()
    return least, held


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("op", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def filling(case: Case) -> tuple[str, ...]:
    """The cells of a kernel: tile, programs, registers a thread, KiB a program, programs a multiprocessor,
    and the warps of those."""
    launch = launch_of(case)
    if launch is None:
        return ("cuBLAS", "", "", "", "", "")
    kernel = ahead_of_time.compiled(launch.case, TARGET)
    programs = kernel.programs(launch.case.warps, TARGET)
    return (
        tile_of(launch.case), f"{launch.programs}", f"{kernel.registers}", f"{kernel.shared / 1024:.0f}",
        f"{programs}", f"{programs * launch.case.warps}",
    )  # fmt: skip


def tile_of(case: ahead_of_time.Case) -> str:
    """The kernel's tile: "128x64x64 tma", or rows x columns."""
    sizes = case.constants
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SEGMENT", "SEQUENCES", "ROWS", "BLOCK")
    return "x".join(str(sizes[name]) for name in names if name in sizes) + (" tma" if case.tma else "")
