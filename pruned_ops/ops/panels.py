"""What `ops.encoder` takes: the code of a part, the layout of weights as panels, and the arithmetic of
bfloat16 and int8.

A panel holds 32 output channels, input by input, so that a kernel reads a weight from front to back;
csrc/panels.h draws it. In int8 a weight has a scale per output channel and an activation a scale per token,
both symmetric (the vector-wise quantisation of Dettmers et al. 2022, LLM.int8()).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PART_TENSORS = 6  # the tensors of one part: panels and bias of two linears, LayerNorm's weight and bias
PANEL = 32  # output channels that lie together
PAIR = 2  # inputs of a channel that lie together in bfloat16
GROUP = (
    4  # inputs of a channel that lie together in int8: as many as one VNNI instruction multiplies and adds
)
UNITS = (
    PANEL // 2
)  # gated units of a panel: each has two channels, one that is activated and one that multiplies
LEVELS = 127  # int8 values are -127 to 127: -128 would have no opposite


def attention_part(num_heads: int) -> int:
    """The integer that stands for an attention with this many heads among `ops.encoder`'s widths."""
    return num_heads


def ffn_part(width: int) -> int:
    """The integer that stands for an FFN of this width among `ops.encoder`'s widths: always negative."""
    return -1 - width


def is_attention(part: int) -> bool:
    """Whether this integer among `ops.encoder`'s widths stands for an attention; if not, for an FFN."""
    return part >= 0


def inner_width(part: int, head_dim: int) -> int:
    """The number of channels between the two linears of a part: num_heads * head_dim, or the FFN width."""
    return part * head_dim if is_attention(part) else -1 - part


def gated_out(width: int) -> int:
    """The rows of `gated_rows` for this many units: whole panels."""
    return -(-width // UNITS) * PANEL


def gated_rows(rows: Tensor) -> Tensor:
    """Order the rows (2 * width, ...) of a `linear_geglu` weight or bias as `encoder` takes them.

    16 rows of the gate and the 16 of the same units that multiply lie together, in the 32 of a panel, so that
    a kernel has both when it writes the units. Zeros fill the last panel up."""
    width, shape = rows.size(0) // 2, rows.shape[1:]
    filled = rows.new_zeros(2, gated_out(width) // 2, *shape)
    filled[:, :width] = rows.view(2, width, *shape)
    return (
        filled.view(2, gated_out(width) // PANEL, UNITS, *shape)
        .transpose(0, 1)
        .reshape(gated_out(width), *shape)
    )


def ungated_rows(rows: Tensor, width: int) -> Tensor:
    """The rows (2 * width, ...) that `gated_rows` ordered."""
    shape = rows.shape[1:]
    both = rows.view(rows.size(0) // PANEL, 2, UNITS, *shape).transpose(0, 1)
    return both.reshape(2, rows.size(0) // 2, *shape)[:, :width].reshape(2 * width, *shape)


def ungated(products: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The products (tokens, width) of gates and of what they multiply, where `gated_rows` ordered columns."""
    both = products.view(products.size(0), gated_out(width) // PANEL, 2, UNITS)
    return both[:, :, 0].flatten(1)[:, :width], both[:, :, 1].flatten(1)[:, :width]


def to_panels(weight: Tensor) -> Tensor:
    """Lay a weight (out, in) out as fp32 panels (ceil(out / 32), in, 32), the last filled up with zeros."""
    rows = F.pad(weight, (0, 0, 0, -weight.size(0) % PANEL))
    return rows.view(rows.size(0) // PANEL, PANEL, weight.size(1)).transpose(1, 2).contiguous()


def to_head_panels(rows: Tensor) -> Tensor:
    """Lay each head's rows (heads, rows, head_dim) out as panels (heads, ceil(rows / 32), head_dim, 32)."""
    rows = F.pad(rows, (0, 0, 0, -rows.size(1) % PANEL))
    return rows.unflatten(1, (rows.size(1) // PANEL, PANEL)).transpose(2, 3).contiguous()


def from_head_panels(panels: Tensor) -> Tensor:
    """The rows (heads, rows, head_dim) that these panels hold, with those that fill the last one up."""
    return panels.transpose(2, 3).flatten(1, 2)


def from_panels(panels: Tensor, out: int) -> Tensor:
    """A contiguous copy of the weight (out, in) that these fp32 panels hold."""
    rows = panels.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return rows.view(panels.size(0) * PANEL, panels.size(1))[:out]


def to_bf16_panels(weight: Tensor) -> Tensor:
    """Round a weight (out, in) to bfloat16 panels (ceil(out / 32), ceil(in / 2), 64).

    Each step of a panel holds 2 inputs of 32 channels, those of a channel together."""
    count, pairs = -(-weight.size(0) // PANEL), -(-weight.size(1) // PAIR)
    fill = (0, pairs * PAIR - weight.size(1), 0, count * PANEL - weight.size(0))
    rows = F.pad(weight.to(torch.bfloat16), fill).view(count, PANEL, pairs, PAIR)
    return rows.transpose(1, 2).reshape(count, pairs, PANEL * PAIR).contiguous()


def from_bf16_panels(panels: Tensor, out: int, inputs: int) -> Tensor:
    """A contiguous copy in fp32 of the weight (out, in) that these bfloat16 panels hold."""
    count, pairs = panels.size(0), panels.size(1)
    rows = panels.view(count, pairs, PANEL, PAIR).transpose(1, 2).reshape(count * PANEL, pairs * PAIR)
    return rows[:out, :inputs].float().contiguous()


def bf16_linear(x: Tensor, panels: Tensor, bias: Tensor) -> Tensor:
    """Multiply x (rows, in), rounded to bfloat16, by a weight in bfloat16 panels and add the bias.

    Returns (rows, out). Products and sums are in x's dtype: fp32 holds the product of two bfloat16 numbers
    exactly."""
    weight = from_bf16_panels(panels, bias.size(0), x.size(1))
    return F.linear(x.to(torch.bfloat16).to(x.dtype), weight.to(x.dtype), bias)


def to_int8_panels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight (out, in) to int8 panels (see `int8_panels`) and scales (out,)."""
    values, scales = quantize(weight.detach())
    return int8_panels(values.to(torch.int8)), scales[:, 0]


def int8_panels(values: Tensor) -> Tensor:
    """Lay an int8 weight (out, in) out as panels (ceil(out / 32), 1 + ceil(in / 4), 128).

    Each step of a panel holds 4 inputs of 32 channels, those of a channel together. Before the first step lie
    32 int32 at which the channels' sums start where a kernel adds 128 to the activations, as VNNI needs it:
    -128 times the sum of the channel's weights.
    """
    out, inputs = values.shape
    count, groups = -(-out // PANEL), -(-inputs // GROUP)
    filled = values.new_zeros(count * PANEL, groups * GROUP, dtype=torch.int8)
    filled[:out, :inputs] = values
    panels = filled.view(count, PANEL, groups, GROUP).transpose(1, 2)
    start = -128 * filled.sum(1, dtype=torch.int32)
    steps = [
        start.view(torch.int8).view(count, 1, PANEL * GROUP),
        panels.reshape(count, groups, PANEL * GROUP),
    ]
    return torch.cat(steps, 1).contiguous()


def from_int8_panels(panels: Tensor, out: int, inputs: int) -> Tensor:
    """The quantised weight (out, in) that these panels hold, in int8."""
    count, groups = panels.size(0), panels.size(1) - 1
    steps = panels[:, 1:].reshape(count, groups, PANEL, GROUP).transpose(1, 2)
    return steps.reshape(count * PANEL, groups * GROUP)[:out, :inputs]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows (rows, columns) to whole numbers from -127 to 127, in x's dtype, and scales (rows, 1)."""
    top = x.abs().amax(1, keepdim=True) if x.size(1) else x.new_zeros(x.size(0), 1)
    # The least numbers have no such factor, and get the largest that there is.
    inverse = torch.where(top > 0, (LEVELS / top).clamp(max=torch.finfo(x.dtype).max), torch.zeros_like(top))
    return torch.round(x * inverse), top / LEVELS


def int8_linear(x: Tensor, panels: Tensor, bias_and_scales: Tensor) -> Tensor:
    """Multiply x (rows, in) by a weight in int8 panels and add the bias: (rows, out) in x's dtype.

    bias_and_scales (2, out): the bias, and the weight's scales. The products are summed exactly.
    """
    bias, scales = bias_and_scales
    values, x_scales = quantize(x)
    weight = from_int8_panels(panels, bias.size(0), x.size(1))
    sums = values.double() @ weight.double().t()
    return sums.to(x.dtype) * (x_scales * scales) + bias
