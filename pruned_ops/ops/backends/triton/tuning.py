"""Which configuration runs which shape: one that was timed on this GPU and saved, else the best by a model.

Nothing is timed here, because this is where requests come by; timing.py does that, and saves its choices with
`remember`. The model of a GEMM's time counts what decides at these sizes: full waves of tiles over the
multiprocessors, the share of a tile that is useful, how well a tile of its size feeds the tensor cores, and
whether a tile is activated while another is multiplied.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruned_ops.files import read_json, shown, write_json
from pruned_ops.ops.backends.gpu import capability
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import (
    ATTENTION,
    FUSED_NORM,
    LINEAR_GEGLU,
    LINEAR_GELU,
    MAX_FUSED_HIDDEN,
    AttentionConfig,
    GemmConfig,
    RowConfig,
    attention_config,
    next_power_of_2,
    row_configs,
)
from pruned_ops.version import __version__

Config = GemmConfig | AttentionConfig | RowConfig

# Columns that a program takes at least: below that, starting it costs more than it does.
LEAST_SHARE = 128
# The form that holds whole output rows is used up to this many columns of the inner dimension.
MAX_FUSED_INNER = 256
# Multiply-accumulates in fp16 that a multiprocessor of an H200 does while it moves a byte, and while a second
# kernel starts (about 3 us): what partial results cost. From its ceilings, 790 TFLOP/s and 4.3 TB/s.
MACS_A_BYTE, MACS_A_LAUNCH = 92, 9_000_000
# And while it activates an output: 20 instructions (test_triton_compiled.py), of which 128 lanes get one in
# a cycle, in which 2,048 multiply-accumulates are made.
MACS_AN_OUTPUT = 320
# Tokens are rounded up to this for the choice, so that batches of about one size share it.
BUCKET = 128


@dataclass(frozen=True)
class Problem:
    """An op at a shape, for which a configuration is chosen.

    tokens and longest are rounded up to their buckets (`bucket`, `length_bucket`). What the others mean:
    linear_gelu, linear_geglu: outputs is the FFN width, inner is hidden_size.
    linear_add_layer_norm: outputs is hidden_size, inner is the width of the context or of the FFN.
    attention: outputs is the number of heads, inner is head_dim, longest is the longest sequence's length.
    add_layer_norm, embed_layer_norm: outputs is hidden_size, inner is 0.
    """

    op: str
    dtype: str
    tokens: int
    outputs: int
    inner: int
    longest: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself; the field holds its name, as the file of choices does."""
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that the choice depends on."""

    multiprocessors: int
    shared_memory: int
    has_tma: bool

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        tma = launch.INTERPRETING or capability(device) >= (9, 0)
        return cls(launch.multiprocessors(device), launch.shared_memory(device), tma)


def linear_gelu_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """The configuration for x (tokens, hidden) and weight (width, hidden); None stands for torch's GEMM and
    GELU. Batches whose tokens lie in one bucket share a choice."""
    return _activated_config("linear_gelu", x, weight, weight.size(0), launch.tma_takes(x, weight))


def linear_geglu_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """The configuration for x (tokens, hidden) and weight (2 * width, hidden); None stands for torch's GEMM
    and GEGLU."""
    return _activated_config("linear_geglu", x, weight, weight.size(0) // 2, False)


def _activated_config(op: str, x: Tensor, weight: Tensor, width: int, tma: bool) -> GemmConfig | None:
    if x.dtype == torch.float32 and launch.precision(x.dtype) == "ieee":
        return None
    problem = Problem(op, str(x.dtype), bucket(x.size(0)), width, x.size(1))
    config = _chosen(problem, tma, x.device, launch.in_16_bytes(width, x, weight))
    return config if isinstance(config, GemmConfig) else None


def linear_add_layer_norm_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """The configuration for x (tokens, inner) and weight (hidden, inner); None stands for cuBLAS's GEMM,
    followed by `add_layer_norm`."""
    if x.size(1) == 0 or x.size(0) == 0 or x.dtype == torch.float32:
        return None
    problem = Problem("linear_add_layer_norm", str(x.dtype), bucket(x.size(0)), weight.size(0), x.size(1))
    config = _chosen(problem, False, x.device, launch.in_16_bytes(weight.size(0), x, weight))
    return config if isinstance(config, GemmConfig) else None


def best_attention_config(qkv: Tensor, max_seqlen: int, head_dim: int) -> AttentionConfig:
    """The configuration for qkv (tokens, 3 * heads * head_dim) of sequences of at most max_seqlen tokens."""
    tokens, heads, longest = bucket(qkv.size(0)), qkv.size(1) // (3 * head_dim), length_bucket(max_seqlen)
    problem = Problem("attention", str(qkv.dtype), tokens, heads, head_dim, longest)
    config = _chosen(problem, False, qkv.device)
    assert isinstance(config, AttentionConfig)  # torch's own kernels are no candidate
    return config


def best_row_config(op: str, rows: Tensor, tokens: int) -> RowConfig:
    """The configuration of add_layer_norm or embed_layer_norm, for as many tokens and rows like these."""
    problem = Problem(op, str(rows.dtype), bucket(tokens), rows.size(1), 0)
    config = _chosen(problem, False, rows.device)
    assert isinstance(config, RowConfig)  # torch's own kernels are no candidate
    return config


def bucket(tokens: int) -> int:
    """Round the number of tokens up to a power of 2 below BUCKET, else to a multiple of BUCKET."""
    return next_power_of_2(tokens) if tokens < BUCKET else -(-tokens // BUCKET) * BUCKET


def length_bucket(longest: int) -> int:
    """Round the length of the longest sequence up to a power of 2 below 64, else to a multiple of 64."""
    return next_power_of_2(longest) if longest < 64 else -(-longest // 64) * 64


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, tma: bool, device: torch.device, aligned: bool = True) -> Config | None:
    """The timed choice if it can run these tensors, else the model's. None stands for torch's own kernels.
    aligned: as of `modelled`."""
    timed = known(device)
    if problem in timed:
        config = timed[problem]
        if config is None or config in candidates(problem, tma, Chip.of(device)):
            return config
    return modelled(problem, tma, Chip.of(device), aligned)


def forget() -> None:
    """Choose again for every shape from now on, because other choices have become known."""
    _chosen.cache_clear()


def modelled(problem: Problem, tma: bool, chip: Chip, aligned: bool = True) -> Config | None:
    """The choice by the model; None stands for torch's own kernels. aligned: whether a GEMM's matrices move
    16 bytes at a time; where they do not, TMA loads them, or the product is torch's."""
    fit = candidates(problem, tma, chip)
    if not aligned:
        return next((config for config in fit if isinstance(config, GemmConfig) and config.tma), None)
    if problem.op != "linear_add_layer_norm":
        if not fit:
            raise RuntimeError(f"no configuration of {problem.op} fits {chip.shared_memory} bytes of memory")
        return fit[0]
    # A fused program has few rows and reads the whole weight for them. Only where the weight is small does
    # this cost less than the way of the sums through memory that it saves.
    fused = [config for config in fit if isinstance(config, GemmConfig) and config.split_k == 1]
    if fused and problem.inner <= MAX_FUSED_INNER:
        if problem.tokens >= chip.multiprocessors * fused[0].block_m:
            return fused[0]
    few = math.ceil(problem.tokens / 64) * math.ceil(problem.outputs / 64) * 2 <= chip.multiprocessors
    return next((config for config in fit if few and config not in fused), None)


def candidates(problem: Problem, tma: bool, chip: Chip) -> list[Config]:
    """The configurations that can run this problem, the most promising first."""
    dtype = problem.torch_dtype
    tokens, outputs, inner, size = problem.tokens, problem.outputs, problem.inner, dtype.itemsize
    if problem.op == "attention":
        best = attention_config(problem.longest, inner, dtype)
        return [best, *(config for config in ATTENTION[size][inner] if config != best)]
    if problem.op in ("add_layer_norm", "embed_layer_norm"):
        return [*row_configs(outputs)]
    if problem.op == "linear_gelu":
        return [*fitting(LINEAR_GELU[size], tokens, outputs, inner, size, tma, chip)]
    if problem.op == "linear_geglu":  # of a unit's two products one is activated: counted as if both were
        return [*fitting(LINEAR_GEGLU[size], tokens, 2 * outputs, inner, size, False, chip)]
    split = [config for config in LINEAR_GELU[size] if config.split_k > 1]
    both = [*fused_configs(outputs, dtype), *split]
    return [*fitting(both, tokens, outputs, inner, size, False, chip)]


def fused_configs(hidden: int, dtype: torch.dtype) -> list[GemmConfig]:
    """The configurations whose tile holds a whole output row of this size."""
    if hidden > MAX_FUSED_HIDDEN:
        return []
    block = max(next_power_of_2(hidden), 16)
    by_size = FUSED_NORM[dtype.itemsize]
    smallest = min(size for size in by_size if size >= block)
    return [replace(config, block_n=block) for config in by_size[smallest]]


def fitting(
    configs: Iterable[GemmConfig], tokens: int, width: int, hidden: int, itemsize: int, tma: bool, chip: Chip
) -> list[GemmConfig]:
    """The configurations that fit the chip's shared memory and the operands, fastest by the model first."""
    fit = [
        config
        for config in configs
        if config.shared_bytes(itemsize) <= chip.shared_memory
        and (not config.tma or (tma and chip.has_tma))
        and (config.split_k == 1 or hidden // config.split_k >= LEAST_SHARE)
    ]
    return sorted(fit, key=lambda config: modelled_time(config, tokens, width, hidden, chip))


def modelled_time(config: GemmConfig, tokens: int, width: int, hidden: int, chip: Chip) -> float:
    """Relative time of a GEMM (tokens, hidden) x (hidden, width), to compare configurations of one shape."""
    tiles = math.ceil(tokens / config.block_m) * math.ceil(width / config.block_n) * config.split_k
    waves = math.ceil(tiles / chip.multiprocessors)
    # Small tiles read more operands for each product.
    reading = 1 + 64 / config.block_m + 64 / config.block_n
    work = (
        config.block_m * config.block_n * math.ceil(hidden / config.split_k / config.block_k) * config.block_k
    )
    exposed = waves if config.programs == 1 else 1  # the last tile's always
    time = waves * work * reading * (0.9 if config.tma else 1.0)
    time += exposed * MACS_AN_OUTPUT * config.block_m * config.block_n
    if config.split_k > 1:  # fp32 sums are written and read again, by a second kernel
        time += MACS_A_BYTE * 8 * config.split_k * tokens * width / chip.multiprocessors + MACS_A_LAUNCH
    return time


@functools.lru_cache
def known(device: torch.device) -> dict[Problem, Config | None]:
    """The choices that were timed on this GPU, read once per process. A choice of None stands for torch's
    own kernels."""
    try:
        path = file_of(device)
        if not path.is_file():
            return {}
    except (RuntimeError, OSError) as error:  # there is no home folder, or it may not be read
        warnings.warn(
            f"what pruned_ops.tune timed is not looked up ({error}); a model chooses the kernels. "
            "PRUNED_OPS_CACHE names another folder for it.", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return {}
    try:
        saved = read_json(path, "record of timed choices")
        return {Problem(**row["problem"]): _config(row["config"]) for row in saved["choices"]}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = (
            error if isinstance(error, (ValueError, OSError)) else f"{path} is no record of timed choices"
        )
        warnings.warn(
            f"{path} cannot be read ({reason}); a model chooses the kernels. "
            "Delete the file, and pruned_ops.tune makes it anew.", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return {}


def remember(device: torch.device, timed: Mapping[Problem, Config | None]) -> Path:
    """Add these choices to the known ones, in this process and on disk. Choices that another process saved
    in the meantime are kept."""
    known.cache_clear()
    choices = known(device)
    choices.update(timed)
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"problem": asdict(problem), "config": config and {type(config).__name__: asdict(config)}}
        for problem, config in choices.items()
    ]
    write_json(path, {"made_with": made_with(device), "choices": rows})
    return path


def file_of(device: torch.device) -> Path:
    """The file of this GPU's choices, in PRUNED_OPS_CACHE or else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PRUNED_OPS_CACHE") or Path(base) / "pruned_ops")
    key = made_with(device)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", key["gpu"].lower()).strip("-")
    return folder / f"triton-{name}-{digest}.json"


def made_with(device: torch.device) -> dict[str, Any]:
    """What the choices depend on besides the shape: the GPU and the versions of the software."""
    import triton

    gpu = "interpreter" if launch.INTERPRETING else torch.cuda.get_device_name(device)
    return {
        "gpu": gpu,
        "multiprocessors": launch.multiprocessors(device),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "pruned_ops": __version__,
    }


def _config(saved: Mapping[str, Mapping[str, Any]] | None) -> Config | None:
    if saved is None:
        return None
    (kind, fields), *more = saved.items()
    for known_kind in (GemmConfig, AttentionConfig, RowConfig):
        is_known = not more and known_kind.__name__ == kind
        if is_known and all(isinstance(value, int) for value in fields.values()):
            return known_kind(**fields)
    raise ValueError(
        f"{shown(list(saved))} is no kind of configuration, or one with other values than integers"
    )
