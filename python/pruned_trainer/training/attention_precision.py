"""Attention in fp32 where a CPU trains under bf16 autocast: torch's backward pass of it is slow in bf16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionInFp32(TorchFunctionMode):
    """Within this context `scaled_dot_product_attention` computes in fp32 under a CPU's autocast, forward and
    backward; everything else stays as it is.

    In torch 2.13 its backward pass takes three times as long in bf16 as in fp32 (16 sequences of 170 tokens,
    12 heads of 32, an Intel Xeon with AMX), which is more than the linears save.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_in_fp32, args), **{name: _in_fp32(value) for name, value in kwargs.items()})


def _in_fp32(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.device.type == "cpu" and value.is_floating_point()
    return value.float() if narrow else value
