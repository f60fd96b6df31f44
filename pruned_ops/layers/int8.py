"""A linear whose weight is stored in int8: what a checkpoint of int8 weights is loaded into."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = "weight_scale"
# What to do where int8 weights cannot be taken, for errors to say.
DEQUANTIZE = "load it, and call model.dequantize() before pruned_ops.optimize"


class Int8Linear(nn.Module):
    """A linear with an int8 weight (out, in), row by row, and an fp32 scale for each output channel.

    The weight lies as on any machine, not as one machine's kernels want it: `optimize` lays it out. By itself
    this multiplies the input, as it is, by weight * scale, so that it runs anywhere; optimised, the input is
    quantised too. bias: whether there is one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), False)
        self.weight_scale = nn.Parameter(torch.ones(out_features), False)
        self.bias = nn.Parameter(torch.zeros(out_features), False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)[:, None]
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def to_linear(self) -> nn.Linear:
        """A plain linear in fp32, to be run or trained, with the weight that this one stands for: weight *
        scale."""
        linear = nn.Linear(1, 1, self.bias is not None)  # nothing large is initialised in vain
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = nn.Parameter(self.weight.float() * self.weight_scale[:, None])
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
