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
    SHARED_MEMORY,
    GemmConfig,
    next_power_of_2,
)

# Columns that a program takes at least: below that, starting it costs more than it does.
LEAST_SHARE = 128
# Time of writing and summing partial results, in parts of a tile's own time, for each share.
SPLIT_COST = 0.15


@dataclass(frozen=True)
class Chip:
    """What of a GPU the choice depends on."""

    multiprocessors: int
    shared_memory: int
    has_tma: bool

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        if launch.INTERPRETING:
            return cls(launch.multiprocessors(device), SHARED_MEMORY[90], True)
        properties = torch.cuda.get_device_properties(device)
        generation = 90 if properties.major >= 9 else 80
        return cls(properties.multi_processor_count, SHARED_MEMORY[generation], properties.major >= 9)


def modelled_time(config: GemmConfig, tokens: int, width: int, hidden: int, chip: Chip) -> float:
    """Relative time of a GEMM (tokens, hidden) x (hidden, width): only its order among configurations means
    anything."""
    tiles = math.ceil(tokens / config.block_m) * math.ceil(width / config.block_n) * config.split_k
    # Small tiles share a multiprocessor, and read more operands for each product.
    together = max(1, min(4, (128 * 128) // (config.block_m * config.block_n)))
    waves = math.ceil(tiles / (chip.multiprocessors * together)) * together
    reading = 1 + 64 / config.block_m + 64 / config.block_n
    work = (
        config.block_m * config.block_n * math.ceil(hidden / config.split_k / config.block_k) * config.block_k
    )
    discount = 0.97 if config.persistent and tiles > chip.multiprocessors else 1.0
    discount *= 0.9 if config.tma else 1.0
    return waves * work * reading * discount * (1 + SPLIT_COST * (config.split_k - 1))


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
    return fitting(known, tokens, width, hidden, dtype.itemsize, tma, Chip.of(device))[0]


def linear_gelu_config(x: Tensor, weight: Tensor) -> GemmConfig:
    """For x (tokens, hidden) and weight (width, hidden). Shapes of one bucket of tokens share a choice."""
    tokens = next_power_of_2(x.size(0))
    return _best(tokens, weight.size(0), x.size(1), x.dtype, launch.tma_takes(x, weight), x.device)


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
    # A program for each few rows must at least fill the chip once; beyond it cuBLAS's larger tiles win.
    if fused and tokens >= chip.multiprocessors * fused[0].block_m and hidden <= 512:
        return fused[0]
    split = [config for config in LINEAR_GELU[dtype.itemsize] if config.split_k > 1]
    few = math.ceil(tokens / 64) * math.ceil(hidden / 64) * 2 <= chip.multiprocessors
    found = fitting(split, tokens, hidden, inner, dtype.itemsize, False, chip) if few else []
    return found[0] if found else None


def linear_add_layer_norm_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """For x (tokens, inner) and weight (hidden, inner); None: cuBLAS's GEMM, then `add_layer_norm`."""
    if x.size(1) == 0 or x.size(0) == 0:
        return None
    return _best_fused(next_power_of_2(x.size(0)), weight.size(0), x.size(1), x.dtype, x.device)
