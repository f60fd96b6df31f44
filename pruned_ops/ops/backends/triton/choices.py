"""Choices that were timed on a GPU: which configuration runs which shape, kept on disk between processes.

A file holds the choices of one GPU model under one set of versions; any other does not read it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.backends.triton.configs import AttentionConfig, GemmConfig
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
