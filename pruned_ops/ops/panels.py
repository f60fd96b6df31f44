"""The layouts of weights that `ops.encoder` reads, and the arithmetic of int8.

Panels of 32 output channels, input by input, so that a kernel reads a weight from front to back. int8: a
scale an output channel for weights, a scale a token for activations, both symmetric (the vector-wise
quantisation of Dettmers et al. 2022, LLM.int8()).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # output channels that lie together
GROUP = 4  # inputs of a channel that lie together: what one VNNI instruction multiplies and adds
LEVELS = 127  # values are -127 to 127: -128 would have no opposite


def pack_panels(weight: Tensor) -> Tensor:
    """A weight (out, in) as fp32 panels (ceil(out / 32), in, 32), filled up with zeros."""
    rows = F.pad(weight, (0, 0, 0, -weight.size(0) % PANEL))
    return rows.view(rows.size(0) // PANEL, PANEL, weight.size(1)).transpose(1, 2).contiguous()


def unpack_panels(panels: Tensor, out: int) -> Tensor:
    """The weight (out, in) that was packed: a copy, contiguous."""
    rows = panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return rows.view(panels.size(0) * PANEL, panels.size(1))[:out]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (rows, columns) -> whole numbers from -127 to 127 in x's dtype, and a scale a row (rows, 1)."""
    top = x.abs().amax(1, keepdim=True) if x.size(1) else x.new_zeros(x.size(0), 1)
    inverse = torch.where(top > 0, LEVELS / top, torch.zeros_like(top))
    return torch.round(x * inverse), top / LEVELS


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8 panels (ceil(out / 32), 1 + ceil(in / 4), 128), and its scales (out,).

    A panel's step holds 4 inputs of 32 channels, a channel's together. Its first one is 32 int32, where the
    sums start: -128 times each channel's weights, because the kernel adds 128 to the activations.
    """
    values, scales = quantize(weight.detach())
    out, inputs = values.shape
    count, groups = -(-out // PANEL), -(-inputs // GROUP)
    filled = torch.zeros(count * PANEL, groups * GROUP, dtype=torch.int8)
    filled[:out, :inputs] = values.to(torch.int8)
    panels = filled.view(count, PANEL, groups, GROUP).transpose(1, 2)
    start = -128 * filled.sum(1, dtype=torch.int32)
    steps = [
        start.view(torch.int8).view(count, 1, PANEL * GROUP),
        panels.reshape(count, groups, PANEL * GROUP),
    ]
    return torch.cat(steps, 1).contiguous(), scales[:, 0]


def unpack_int8(panels: Tensor, out: int, inputs: int) -> Tensor:
    """The whole numbers (out, in) that were packed, int8."""
    count, groups = panels.size(0), panels.size(1) - 1
    steps = panels[:, 1:].reshape(count, groups, PANEL, GROUP).transpose(1, 2)
    return steps.reshape(count * PANEL, groups * GROUP)[:out, :inputs]


def int8_linear(x: Tensor, panels: Tensor, bias_and_scales: Tensor) -> Tensor:
    """x (rows, in) times the packed weight, plus bias: (rows, out) in x's dtype.

    bias_and_scales (2, out). The whole numbers are summed exactly."""
    bias, scales = bias_and_scales
    values, x_scales = quantize(x)
    weight = unpack_int8(panels, bias.size(0), x.size(1))
    sums = values.double() @ weight.double().t()
    return sums.to(x.dtype) * (x_scales * scales) + bias
