"""The names of problems and configurations in the files of bench_kernels.py, by which bounds find times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

# The measured microseconds of a problem and a configuration, by their names.
Measured = dict[tuple[str, str], float]


def attention_name(heads: int, head_dim: int, lengths: Sequence[int]) -> str:
    return f"attention {heads}x{head_dim}, {len(lengths)} of {min(lengths)} to {max(lengths)}"


def linear_gelu_name(tokens: int, hidden: int, width: int) -> str:
    return f"linear_gelu {tokens}x{hidden}->{width}"


def add_layer_norm_name(tokens: int, hidden: int) -> str:
    return f"add_layer_norm {tokens}x{hidden}"


def described(config: Any) -> str:
    """A configuration in words: its tile, and every other field that is not at its default."""
    values = asdict(config)
    tile = "x".join(str(values.pop(name)) for name in ("block_m", "block_n", "block_k") if name in values)
    values.pop("programs", None)  # what it has to fit, and not how it runs
    defaults = {field.name: field.default for field in fields(config)}
    words = [
        name if value is True else f"{name} {value}"
        for name, value in values.items()
        if value != defaults[name]
    ]
    return " ".join([*([tile] if tile else []), *words])


def measured_times(path: Path) -> Measured:
    """The times in a kernels.jsonl of bench_kernels.py."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {
        (row["problem"], row["name"].removeprefix("triton ")): row["us"]
        for row in rows
        if row["verdict"] == "timed" and row["name"].startswith("triton ")
    }
