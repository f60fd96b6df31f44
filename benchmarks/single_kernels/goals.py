"""What the schedules of our kernels allow for the goals' workloads on an H200: the share of the ceiling, what
limits it, and whether another configuration would do better. Bounds, never results."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from single_kernels.cases import Case, Model, Place, cases
from single_kernels.names import Measured, add_layer_norm_name, attention_name, described, linear_gelu_name
from single_kernels.schedule import CEILINGS, MULTIPROCESSORS, Estimate, Launched, Schedule, estimate, parsed

os.environ.pop("TRITON_INTERPRET", None)  # which would switch compilation off

from pruned_ops.ops.backends.triton import ahead_of_time, configs, tuning  # noqa: E402
from pruned_ops.ops.backends.triton.configs import AttentionConfig, GemmConfig, RowConfig  # noqa: E402

# BERT-large, and half of it as the goals prune it.
LARGE = (Model("large dense", 1024, 16, 64, 4096), Model("large half", 1024, 8, 64, 1840))
H200 = tuning.Chip(MULTIPROCESSORS, configs.SHARED_MEMORY[90], True)
PLACE = Place(torch.float16, "cpu")
ITEM, TARGET = 2, 90


@dataclass(frozen=True)
class Choice:
    """A configuration of an op at a size, and the least time that its schedule allows."""

    config: Any
    estimate: Estimate

    @property
    def seconds(self) -> float:
        return self.estimate.seconds


def choices(case: Case) -> list[Choice]:
    """Every configuration that could run a case, the present choice first; none where cuBLAS does it."""
    tokens, outputs, inner = case.shape
    longest = tuning.length_bucket(max(case.lengths)) if case.op == "attention" else 0
    problem = tuning.Problem(case.op, str(PLACE.dtype), tuning.bucket(tokens), outputs, inner, longest)
    chosen = tuning.modelled(problem, True, H200)
    if chosen is None or case.op == "linear_add_layer_norm":
        return []
    known = [config for config in tuning.candidates(problem, True, H200) if config != chosen]
    return [Choice(config, _estimate(case, config)) for config in (chosen, *known) if _is_whole(config)]


@dataclass(frozen=True, eq=False)
class _Compilable:
    """A kernel to compile, which is the same as another one if all that it is compiled with is."""

    case: ahead_of_time.Case

    def __hash__(self) -> int:
        return hash(repr(self.case))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Compilable) and repr(other.case) == repr(self.case)


def schedule_of(case: ahead_of_time.Case) -> Schedule:
    """The schedule of a kernel, compiled for an H200 when it first comes."""
    return _schedule(_Compilable(case))


@functools.cache
def _schedule(kernel: _Compilable) -> Schedule:
    case = kernel.case
    code = ahead_of_time.disassembly(ahead_of_time.kernel_of(case, TARGET).asm["cubin"])
    programs = ahead_of_time.compiled(case, TARGET).programs(case.warps, TARGET)
    return parsed(code, case.warps, programs, bool(case.constants.get("PERSISTENT")))


def _is_whole(config: Any) -> bool:
    """Whether one kernel computes the op: with split_k a second one adds up."""
    return not isinstance(config, GemmConfig) or config.split_k == 1


def _estimate(case: Case, config: Any) -> Estimate:
    tokens, outputs, inner = case.shape
    if isinstance(config, GemmConfig):
        tiles = math.ceil(tokens / config.block_m) * math.ceil(outputs / config.block_n)
        operands = (config.block_m + config.block_n) * inner + config.block_m * config.block_n
        launched = Launched(tiles, math.ceil(inner / config.block_k), ITEM * operands)
        return estimate(schedule_of(ahead_of_time.gemm_case(config, "fp16")), launched)
    if isinstance(config, AttentionConfig):
        schedule = schedule_of(ahead_of_time.attention_case(config, inner, "fp16"))
        return estimate(schedule, _attention(case, config, outputs, inner))
    assert isinstance(config, RowConfig)
    block = configs.next_power_of_2(outputs)
    make = getattr(ahead_of_time, f"{case.op}_case")
    tiles = math.ceil(tokens / config.rows)
    return estimate(schedule_of(make(config, block, "fp16")), Launched(tiles, 0, case.bytes / tiles))


def _attention(case: Case, config: AttentionConfig, heads: int, head_dim: int) -> Launched:
    """Tiles of different lengths are taken as so many of their mean."""
    if config.sequences:
        tiles = math.ceil(len(case.lengths) / config.sequences) * heads
        return Launched(tiles, 0, case.bytes / tiles)
    rows = [math.ceil(length / config.block_m) for length in case.lengths]
    steps = sum(
        count * math.ceil(length / config.block_n) for count, length in zip(rows, case.lengths, strict=True)
    ) / sum(rows)
    operands = (2 * config.block_m + 2 * steps * config.block_n) * head_dim
    return Launched(sum(rows) * heads, steps, ITEM * operands)


def problem_of(case: Case) -> str:
    """The case's name as a problem of bench_kernels.py."""
    tokens, outputs, inner = case.shape
    if case.op == "attention":
        return attention_name(outputs, inner, case.lengths)
    return (
        linear_gelu_name(tokens, inner, outputs)
        if case.op == "linear_gelu"
        else add_layer_norm_name(tokens, outputs)
    )


def goal_tables(workloads: Sequence[tuple[str, tuple[int, ...]]], measured: Measured) -> Iterator[Table]:
    """A table for each workload, a name and the lengths of a batch. Where a time was measured, a column says
    how far the estimate is from it. A better configuration is one whose estimate is over 2% less."""
    for name, lengths in workloads:
        table = Table(
            title=f"BOUNDS by the schedule on an H200, not results: {name}, {sum(lengths)} tokens",
            box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        table.add_column("op")
        for column in (
            "configuration",
            "us",
            "of ceiling",
            "waves",
            "limited by",
            "off the measured",
            "a better one",
        ):
            table.add_column(column, justify="left" if column in ("configuration", "limited by") else "right")
        for model in LARGE:
            for case in cases(model, lengths, PLACE):
                known = choices(case)
                if known and case.op != "embed_layer_norm":
                    table.add_row(f"{case.op}, {case.model}", *_cells(case, known, measured))
        yield table


def _cells(case: Case, known: list[Choice], measured: Measured) -> list[str]:
    chosen, best = known[0], min(known, key=lambda choice: choice.seconds)
    moved = case.bytes / CEILINGS["bytes"]
    least = max(case.flops / CEILINGS["flops"], moved)
    seconds = max(chosen.seconds, moved)
    limit = "memory" if seconds == moved else chosen.estimate.limit
    time = measured.get((problem_of(case), described(chosen.config)))
    error = "" if time is None else f"{100 * (1e6 * seconds / time - 1):+.0f}%"
    gain = seconds / max(best.seconds, moved)
    better = f"{described(best.config)}, {gain:.2f}x" if gain > 1.02 else ""
    return [
        described(chosen.config), f"{1e6 * seconds:.1f}", f"{100 * least / seconds:.0f}%",
        f"{chosen.estimate.waves:.1f}", limit, error, better,
    ]  # fmt: skip
