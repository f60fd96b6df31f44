"""Which configuration runs which shape: what was timed on this GPU (`choices`), else the best of those that
fit the chip by a small model of their time. Nothing is timed here, where requests come by.

The model counts what decides for GEMMs of this size: full waves of tiles over the multiprocessors, the share
of a tile that is useful, and how well a tile of that size feeds the tensor cores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruned_ops.ops.backends.gpu import capability
from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import (
    ATTENTION,
    FUSED_NORM,
    LINEAR_GELU,
    MAX_FUSED_HIDDEN,
    SHORT,
    AttentionConfig,
    GemmConfig,
    attention_config,
    next_power_of_2,
)
from pruned_ops.version import __version__

Config = GemmConfig | AttentionConfig


@dataclass(frozen=True)
class Problem:
    """A shape to choose for. tokens, longest: rounded up to their buckets (`tuning`).

    linear_gelu: outputs = FFN width, inner = hidden_size. linear_add_layer_norm: outputs = hidden_size,
    inner = the context's or FFN's width. attention: outputs = heads, inner = head_dim, longest = of the
    sequences.
    """

    op: str
    dtype: str
    tokens: int
    outputs: int
    inner: int
    longest: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself; its name is what a file holds."""
        found = getattr(torch, self.dtype.removeprefix("torch."))
        assert isinstance(found, torch.dtype)
        return found


@functools.lru_cache
def known(device: torch.device) -> dict[Problem, Config | None]:
    """The choices of this GPU, read once a process; None as a choice: torch's own. Empty where none was
    timed."""
    path = file_of(device)
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {Problem(**one["problem"]): _config(one["config"]) for one in saved["choices"]}
    except (ValueError, TypeError, KeyError, OSError) as error:
        warnings.warn(
            f"{path} cannot be read ({type(error).__name__}: {error}); a model chooses the kernels. "
            "Delete the file, and pruned_ops.tune makes it anew.", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        return {}


def add(device: torch.device, found: Mapping[Problem, Config | None]) -> Path:
    """Know these choices from now on, here and on disk. What another process saved meanwhile stays."""
    known.cache_clear()
    choices = known(device)
    choices.update(found)
    path = file_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"problem": asdict(problem), "config": config and {type(config).__name__: asdict(config)}}
        for problem, config in choices.items()
    ]
    # Written beside, then renamed: a reader never sees half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({"made_with": made_with(device), "choices": rows}, file, indent=1)
    os.replace(file.name, path)
    return path


def made_with(device: torch.device) -> dict[str, Any]:
    """What the choices depend on besides the shape."""
    import triton

    gpu = "interpreter" if launch.INTERPRETING else torch.cuda.get_device_name(device)
    return {
        "gpu": gpu,
        "multiprocessors": launch.multiprocessors(device),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "pruned_ops": __version__,
    }


def file_of(device: torch.device) -> Path:
    """Where this GPU's choices are: in PRUNED_OPS_CACHE, else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PRUNED_OPS_CACHE") or Path(base) / "pruned_ops")
    key = made_with(device)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", key["gpu"].lower()).strip("-")
    return folder / f"triton-{name}-{digest}.json"


def _config(saved: Mapping[str, Mapping[str, Any]] | None) -> Config | None:
    if saved is None:
        return None
    (kind, fields), *more = saved.items()
    kinds: dict[str, type[Config]] = {"GemmConfig": GemmConfig, "AttentionConfig": AttentionConfig}
    if more or kind not in kinds:
        raise ValueError(f"{list(saved)} is no kind of configuration")
    return kinds[kind](**fields)


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
        tma = launch.INTERPRETING or capability(device) >= (9, 0)
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
def _chosen(problem: Problem, tma: bool, device: torch.device) -> Config | None:
    """What was timed, where it can run these tensors; else the model's choice. None: torch's own."""
    timed = known(device)
    if problem in timed:
        config = timed[problem]
        if config is None or config in candidates(problem, tma, Chip.of(device)):
            return config
    return modelled(problem, tma, Chip.of(device))


def forget() -> None:
    """Choose anew from now on, because other choices are known."""
    _chosen.cache_clear()


def candidates(problem: Problem, tma: bool, chip: Chip) -> list[Config]:
    """The configurations that can run this, the most promising first."""
    dtype = problem.torch_dtype
    tokens, outputs, inner, size = problem.tokens, problem.outputs, problem.inner, dtype.itemsize
    if problem.op == "attention":
        segment = max(next_power_of_2(problem.longest), 16)
        short = [SHORT[size][segment]] if segment in SHORT[size] and (size == 2 or inner <= 32) else []
        best = attention_config(problem.longest, inner, dtype)
        return [best, *(one for one in (*short, *ATTENTION[size][inner]) if one != best)]
    if problem.op == "linear_gelu":
        return [*fitting(LINEAR_GELU[size], tokens, outputs, inner, size, tma, chip)]
    split = [config for config in LINEAR_GELU[size] if config.split_k > 1]
    both = [*fused_configs(outputs, dtype), *split]
    return [*fitting(both, tokens, outputs, inner, size, False, chip)]


def modelled(problem: Problem, tma: bool, chip: Chip) -> Config | None:
    """The model's choice; None: torch's own."""
    fit = candidates(problem, tma, chip)
    if problem.op != "linear_add_layer_norm":
        if not fit:
            raise RuntimeError(f"no configuration of {problem.op} fits {chip.shared_memory} bytes of memory")
        return fit[0]
    # Few rows a program read the whole weight again and again: only where that is small does it pay to save
    # the sums' way through memory.
    fused = [one for one in fit if isinstance(one, GemmConfig) and one.split_k == 1]
    if fused and problem.inner <= MAX_FUSED_INNER:
        if problem.tokens >= chip.multiprocessors * fused[0].block_m:
            return fused[0]
    few = math.ceil(problem.tokens / 64) * math.ceil(problem.outputs / 64) * 2 <= chip.multiprocessors
    return next((one for one in fit if few and one not in fused), None)


def linear_gelu_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """For x (tokens, hidden) and weight (width, hidden); None: torch's GEMM and GELU. Shapes of one bucket of
    tokens share a choice."""
    if x.dtype == torch.float32 and launch.precision(x.dtype) == "ieee":
        return None
    problem = Problem("linear_gelu", str(x.dtype), bucket(x.size(0)), weight.size(0), x.size(1))
    found = _chosen(problem, launch.tma_takes(x, weight), x.device)
    return found if isinstance(found, GemmConfig) else None


def linear_add_layer_norm_config(x: Tensor, weight: Tensor) -> GemmConfig | None:
    """For x (tokens, inner) and weight (hidden, inner); None: cuBLAS's GEMM, then `add_layer_norm`."""
    if x.size(1) == 0 or x.size(0) == 0 or x.dtype == torch.float32:
        return None
    problem = Problem("linear_add_layer_norm", str(x.dtype), bucket(x.size(0)), weight.size(0), x.size(1))
    found = _chosen(problem, False, x.device)
    return found if isinstance(found, GemmConfig) else None


def best_attention_config(qkv: Tensor, max_seqlen: int, head_dim: int) -> AttentionConfig:
    """For qkv (tokens, 3 * heads * head_dim) of sequences of at most max_seqlen tokens."""
    tokens, heads, longest = bucket(qkv.size(0)), qkv.size(1) // (3 * head_dim), length_bucket(max_seqlen)
    found = _chosen(Problem("attention", str(qkv.dtype), tokens, heads, head_dim, longest), False, qkv.device)
    assert isinstance(found, AttentionConfig)  # torch's own is no candidate
    return found


def bucket(tokens: int) -> int:
    """Tokens as the choice sees them: a power of 2 below BUCKET, else a multiple of it."""
    return next_power_of_2(tokens) if tokens < BUCKET else -(-tokens // BUCKET) * BUCKET


def length_bucket(longest: int) -> int:
    """The longest sequence as the choice sees it: a power of 2 below 64, else a multiple of 64."""
    return next_power_of_2(longest) if longest < 64 else -(-longest // 64) * 64


def fused_configs(hidden: int, dtype: torch.dtype) -> list[GemmConfig]:
    """Configurations whose tile holds a whole row of this size."""
    if hidden > MAX_FUSED_HIDDEN:
        return []
    block = max(next_power_of_2(hidden), 16)
    known = FUSED_NORM[dtype.itemsize]
    return [replace(config, block_n=block) for config in known[min(size for size in known if size >= block)]]
