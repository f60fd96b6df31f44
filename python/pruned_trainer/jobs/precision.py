"""The precision of a CPU's training: bf16 where a few steps show that it is faster, else fp32."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pruned_trainer.distributed import say
from pruned_trainer.tasks.windows import Features, lengths_of
from pruned_trainer.training.callbacks import StepClock
from pruned_trainer.training.trainer import PruningTrainer

# The steps that are run to learn how long a step takes: the first ones warm up, the others span the lengths
# of the windows.
WARMUP_STEPS, TIMED_STEPS = 2, 8
# Precisions are compared where at least so many steps are to come: the comparison takes up to 52.
STEPS_TO_COMPARE = 400
# bf16 is taken where its steps take at most this part of the time of fp32's.
BF16_PAYS = 0.95
COMPARED = ("fp32", "bf16")


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices (AVX512_BF16, or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_worth_comparing(steps: int | None, device: torch.device) -> bool:
    """Whether the steps in both precisions are to be timed. steps: those to come; None where the time of a
    step decides that."""
    if device.type != "cpu" or not has_bf16() or (steps is not None and steps < STEPS_TO_COMPARE):
        return False
    say("measuring how long a training step takes in fp32 and in bf16, which this processor computes")
    return True


def faster(ratio: float) -> str:
    """The precision to train in. ratio: the time of a step in bf16 as a part of that of one in fp32."""
    chosen = "bf16" if ratio <= BF16_PAYS else "fp32"
    say(f"a step in bf16 takes {ratio:.2f} of the time of one in fp32: training in {chosen} (--precision)")
    return chosen


def timing_steps(precision: str) -> int:
    """The steps of a timing, the warm-up included. In bf16 the first step of each length compiles kernels for
    it, which a whole run hardly notices: each length is warmed up there."""
    return TIMED_STEPS + (TIMED_STEPS if precision == "bf16" else WARMUP_STEPS)


def timing_batches(features: Features, batch_size: int, precision: str) -> list[dict[str, Any]]:
    """Features for the steps of a timing, in their order. Each batch is of like lengths, and the timed ones
    span all lengths in even steps."""
    lengths = lengths_of(features)
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    last = max(len(ordered) - batch_size, 0)
    places = [round(last * (i + 0.5) / TIMED_STEPS) for i in range(TIMED_STEPS)]
    warmup = places if precision == "bf16" else [places[TIMED_STEPS // 2]] * WARMUP_STEPS
    return [features[row] for place in warmup + places for row in ordered[place : place + batch_size]]


def step_seconds(precision: str, build: Callable[[Path, int], PruningTrainer]) -> float:
    """The mean seconds of a step, without the warm-up. build: makes a trainer for a folder, which is thrown
    away, and so many steps; it trains on `timing_batches` in their order."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(Path(folder), timing_steps(precision))
        trainer.add_callback(clock)
        trainer.train()
    return mean_seconds(clock)


def mean_seconds(clock: StepClock) -> float:
    return statistics.mean(clock.seconds[-TIMED_STEPS:])
