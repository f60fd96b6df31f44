"""A static model of a Triton kernel's time on an H200, out of its machine code. Nothing is run or measured.

The machine code says how many instructions, special functions and products a tile takes, inside and outside
of its loop. A multiprocessor issues four instructions of warps a cycle, does 16 special functions and 4,096
FLOP of fp16 products. One program does its steps in turn; those that a multiprocessor holds overlap, until
one of its units is busy all the time. What a kernel waits for besides (barriers, banks of shared memory,
misses) is left out: the time is the least that this schedule allows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

MULTIPROCESSORS = 132
# A multiprocessor of sm_90, a cycle: instructions of warps; special functions; FLOP of fp16 products; bytes
# from L2 (CUDA programming guide and the H100 white paper: 989 TFLOP/s at 1.83 GHz).
ISSUED, SPECIAL, PRODUCTS, FROM_L2 = 4, 16, 4096, 64
# An H200's ceilings, measured on one: dense fp16 products on random data, and copying.
CEILINGS = {"flops": 790e12, "bytes": 4.3e12}
# The clock at which products run at their ceiling: power limits it.
CLOCK = CEILINGS["flops"] / MULTIPROCESSORS / PRODUCTS
# Cycles of a program for which nothing overlaps, an assumption: its first operands come from memory, and its
# last results go there.
ENDS = 1200
# Instructions. A branch in the loop that skips more of them skips what is done once a tile.
ONCE = 64


@dataclass(frozen=True)
class Work:
    """What a program does: instructions of each warp, special functions of each thread, FLOP of products, and
    bytes that it reads from L2 or writes."""

    instructions: float = 0.0
    special: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.instructions + other.instructions,
            self.special + other.special,
            self.flops + other.flops,
            self.bytes + other.bytes,
        )

    def times(self, count: float) -> Work:
        return Work(self.instructions * count, self.special * count, self.flops * count, self.bytes * count)

    def cycles(self, warps: int) -> dict[str, float]:
        """The cycles that each unit of a multiprocessor is busy with it, by the name of what it limits."""
        return {
            "instructions": self.instructions * warps / ISSUED,
            "special functions": self.special * warps * 32 / SPECIAL,
            "products": self.flops / PRODUCTS,
            "operands": self.bytes / FROM_L2,
        }


@dataclass(frozen=True)
class Schedule:
    """A compiled kernel's work. step: one round of its loop, without bytes. tile: the rest of a tile's work.
    waits: whether a step waits for its own products, so that they overlap nothing else of the program.
    programs: how many a multiprocessor holds. persistent: whether a program takes tile after tile."""

    step: Work
    tile: Work
    waits: bool
    programs: int
    warps: int
    persistent: bool = False


@dataclass(frozen=True)
class Launched:
    """A launch: its tiles, the steps of a tile's loop, and the bytes that a tile reads and writes."""

    tiles: int
    steps: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """cycles: the least of the whole launch. limit: what takes them. waves: how often the multiprocessors are
    filled."""

    cycles: float
    limit: str
    waves: float

    @property
    def seconds(self) -> float:
        return self.cycles / CLOCK


def estimate(schedule: Schedule, launched: Launched) -> Estimate:
    """The least time that a schedule allows for a launch."""
    work = schedule.step.times(launched.steps) + schedule.tile + Work(bytes=launched.bytes)
    busy = work.cycles(schedule.warps)
    alone = _alone(schedule, launched)
    unit = max(busy, key=lambda name: busy[name])

    def wave(programs: int) -> float:
        """The cycles in which a multiprocessor finishes so many tiles at once."""
        return max(alone, programs * busy[unit])

    at_once = MULTIPROCESSORS * schedule.programs
    full, rest = divmod(launched.tiles, at_once)
    cycles = full * wave(schedule.programs) + (wave(math.ceil(rest / MULTIPROCESSORS)) if rest else 0.0)
    if schedule.persistent:
        cycles += ENDS
    limit = unit if full and schedule.programs * busy[unit] > alone else "one program's steps in turn"
    even = launched.tiles / MULTIPROCESSORS * max(alone / schedule.programs, busy[unit])
    if cycles > 1.25 * even:
        limit = "few tiles" if not full else "the last wave"
    return Estimate(cycles, limit, launched.tiles / at_once)


def _alone(schedule: Schedule, launched: Launched) -> float:
    """The cycles of a tile on a multiprocessor of its own."""
    step = (schedule.step + Work(bytes=launched.bytes / max(launched.steps, 1))).cycles(schedule.warps)
    products = step.pop("products")
    others = max(step.values())
    one_step = products + others if schedule.waits else max(products, others)
    tile = max(schedule.tile.cycles(schedule.warps).values())
    return launched.steps * one_step + tile + (0 if schedule.persistent else ENDS)


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?\w+\s+)?)([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_TO_LABEL = re.compile(r"\.(L_x_\d+)")


def parsed(code: str, warps: int, programs: int, persistent: bool) -> Schedule:
    """The schedule in a kernel's disassembly. Its loop is the shortest one that multiplies; without one all
    is done once a tile."""
    lines, labels = [], {}
    for text in code.splitlines():
        label, instruction = _LABEL.match(text), _INSTRUCTION.search(text)
        if label:
            labels[label[1]] = len(lines)
        elif instruction:
            lines.append((instruction[2], instruction[3]))
    jumps = [
        (place, labels[target[1]])
        for place, (kind, rest) in enumerate(lines)
        if kind.startswith("BRA") and (target := _TO_LABEL.search(rest)) and target[1] in labels
    ]
    loops = [
        (target, place + 1)
        for place, target in jumps
        if target < place and any(_flops(*line, warps) for line in lines[target:place])
    ]
    if not loops:
        return Schedule(Work(), _work(lines, warps), False, programs, warps, persistent)
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    last = max(place for place in range(begin, end) if _flops(*lines[place], warps))
    once = [
        (place + 1, target)
        for place, target in jumps
        if last < place < target <= end and target - place > ONCE
    ]
    skipped = once[0] if once else (end, end)
    inside = [*lines[begin : skipped[0]], *lines[skipped[1] : end]]
    outside = [] if once else [*lines[:begin], *lines[end:]]
    tile = [*lines[skipped[0] : skipped[1]], *outside]
    waits = any(kind == "WARPGROUP.DEPBAR.LE" and rest.strip(" ;").endswith("0x0") for kind, rest in inside)
    waits = waits or any(kind.startswith("HMMA") for kind, _ in inside)
    return Schedule(_work(inside, warps), _work(tile, warps), waits, programs, warps, persistent)


def _work(lines: Iterable[tuple[str, str]], warps: int) -> Work:
    lines = list(lines)
    special = sum(kind.startswith("MUFU") for kind, _ in lines)
    return Work(float(len(lines)), float(special), sum(_flops(*line, warps) for line in lines))


def _flops(kind: str, rest: str, warps: int) -> float:
    """The FLOP of an instruction of all the program's warps: HGMMA of groups of four, HMMA of each."""
    size = re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", kind)
    if size:
        m, n, k = map(int, size.groups())
        return 2.0 * m * n * k * warps / 4
    size = re.search(r"^HMMA\.(\d\d)(\d)(\d+)", kind)
    if size:
        m, n, k = map(int, size.groups())
        return 2.0 * m * n * k * warps
    return 0.0
