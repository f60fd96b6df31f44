"""Torch's own fastest ways to compute, for the benchmarks of ops and those of whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Sizes that one function is compiled for. A benchmark compiles a function for each of its sizes alone.
COMPILED_SIZES = 64


def compile_each_size(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """The function compiled by torch, anew for each size. Past the limit of sizes it raises an error, where
    torch by default would run eagerly, under the name of the compiled one."""
    torch._dynamo.config.recompile_limit = COMPILED_SIZES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, mode=mode, dynamic=False)


def packed_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int
) -> Tensor:
    """torch's flash attention over packed sequences, as `torch.nn.attention.varlen` calls it, but without the
    random state that this fills for every call: another kernel, which inference does not need.

    query, key, value (tokens, heads, head_dim) -> context of the same shape."""
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    dropout, causal, debug = 0.0, False, False
    context: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *lengths, dropout, causal, debug
    )[0]
    return context
