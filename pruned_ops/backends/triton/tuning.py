"""Which configuration runs which shape: candidates that fit the chip, ranked by a small model of their time.

The model counts what decides for GEMMs of this size: full waves of tiles over the multiprocessors, the share
of a tile that is useful, and how well a tile of that size feeds the tensor cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruned_ops.backends.triton import launch
from pruned_ops.backends.triton.configs import (
    FUSED_NORM,
    LINEAR_GELU,
    MAX_FUSED_HIDDEN,
    GemmConfig,
    next_power_of_2,
)

# Columns that a program takes at least: below that, starting it costs more than it does.
LEAST_SHARE = 128
# Rows of at most so many numbers are multiplied in the form that holds whole output rows.
MAX_FUSED_INNER = 256
# Multiply-accumulates in fp16 that a multiprocessor of an H200 does while it moves a byte, and while a second
# kernel starts (about 3 us): what partial results cost. From its ceilings, 790 TFLOP/s and 4.3 TB/s.
MACS_A_BYTE, MACS_A_LAUNCH = 92, 9_000_000
# Tokens are rounded up to this for the choice, so that batches of about one size share it.
BUCKET = 128


@dataclass(frozen=True)
class Chip:
    """What of a GPU the choice depends on."""

    multiprocessors: int
    shared_memory: int
    has_tma: bool

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        tma = launch.INTERPRETING or launch.capability(device) >= (9, 0)
        return cls(launch.multiprocessors(device), launch.shared_memory(device), tma)


def modelled_time(config: GemmConfig, tokens: int, width: int, hidden: int, chip: Chip) -> float:
    """Relative time of a GEMM (tokens, hidden) x (hidden, width): only its order among configurations means
    anything."""
    tiles = math.ceil(tokens / config.block_m) * math.ceil(width / config.block_n) * config.split_k
    waves = math.ceil(tiles / chip.multiprocessors)
    # Small tiles read more operands for each product.
    reading = 1 + 64 / config.block_m + 64 / config.block_n
    work = (
        config.block_m * config.block_n * math.ceil(hidden / config.split_k / config.block_k) * config.block_k
    )
    time = waves * work * reading * (0.9 if config.tma else 1.0)
    if config.split_k > 1:  # fp32 sums are written and read again, by a second kernel
        time += MACS_A_BYTE * 8 * config.split_k * tokens * width / chip.multiprocessors + MACS_A_LAUNCH
    return time


def fitting(
    configs: Iterable[GemmConfig], tokens: int, width: int, hidden: int, itemsize: int, tma: bool, chip: Chip
) -> list[GemmConfig]:
    """Those that fit the chip's shared memory and the operands, best first by the model."""
    fit = [
        config
        for config in configs
        if config.shared_bytes(itemsize) <= chip.shared_memory
        and (not config.tma or (tma and chip.has_tma))
        and (config.split_k == 1 or hidden // config.split_k >= LEAST_SHARE)
    ]
    return sorted(fit, key=lambda config: modelled_time(config, tokens, width, hidden, chip))


@functools.lru_cache(maxsize=4096)
def _best(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, tma: bool, device: torch.device
) -> GemmConfig:
    known = LINEAR_GELU[dtype.itemsize]
    fit = fitting(known, tokens, width, hidden, dtype.itemsize, tma, Chip.of(device))
    if not fit:
        raise RuntimeError(f"no configuration of linear_gelu fits the shared memory of {device}")
    return fit[0]


def linear_gelu_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """For x (tokens, hidden) and weight (width, hidden); None: torch's GEMM and GELU. Shapes of one bucket of
    tokens share a choice."""
    if x.dtype == torch.float32 and launch.precision(x.dtype) == "ieee":
        return None
    return _best(bucket(x.size(0)), weight.size(0), x.size(1), x.dtype, launch.tma_takes(x, weight), x.device)


def bucket(tokens: int) -> int:
    """Tokens as the choice sees them: a power of 2 below BUCKET, else a multiple of it."""
    return next_power_of_2(tokens) if tokens < BUCKET else -(-tokens // BUCKET) * BUCKET


def fused_configs(hidden: int, dtype: torch.dtype) -> list[GemmConfig]:
    """Configurations whose tile holds a whole row of this size."""
    if hidden > MAX_FUSED_HIDDEN:
        return []
    block = max(next_power_of_2(hidden), 16)
    known = FUSED_NORM[dtype.itemsize]
    return [replace(config, block_n=block) for config in known[min(size for size in known if size >= block)]]


@functools.lru_cache(maxsize=4096)
def _best_fused(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> GemmConfig | None:
    chip = Chip.of(device)
    fused = fitting(fused_configs(hidden, dtype), tokens, hidden, inner, dtype.itemsize, False, chip)
    # Few rows a program read the whole weight again and again: only where that is small does it pay to save
    # the sums' way through memory.
    if fused and inner <= MAX_FUSED_INNER and tokens >= chip.multiprocessors * fused[0].block_m:
        return fused[0]
    split = [config for config in LINEAR_GELU[dtype.itemsize] if config.split_k > 1]
    few = math.ceil(tokens / 64) * math.ceil(hidden / 64) * 2 <= chip.multiprocessors
    found = fitting(split, tokens, hidden, inner, dtype.itemsize, False, chip) if few else []
    return found[0] if found else None


def linear_add_layer_norm_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """For x (tokens, inner) and weight (hidden, inner); None: cuBLAS's GEMM, then `add_layer_norm`."""
    if x.size(1) == 0 or x.size(0) == 0:
        return None
    if x.dtype == torch.float32:
        return None
    return _best_fused(bucket(x.size(0)), weight.size(0), x.size(1), x.dtype, x.device)
