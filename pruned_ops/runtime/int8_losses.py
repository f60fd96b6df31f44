"""What int8 takes from the outputs of a model's linears, measured beside the runs themselves.

A token's values share one scale, and so do a channel's weights. Where one value is a hundred times the rest,
the rest is rounded to a few levels or to zero, and the linear loses what it computes from it. Nothing in the
output tells. So `optimize` looks at every linear once, and `Int8Watch` at the beginning of a sequence of the
first, second, fourth, eighth ... batch that a model runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.layers.int8 import SCALE
from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.layers.parts import PrunedAttention
from pruned_ops.ops.panels import quantize
from pruned_ops.ops.reference import attention

# Of what a linear's output channel varies by. The linears of models without outliers lose 0.5% to 3%; a
# channel of 20 times the others' size costs 14% of what is computed from those.
LIMIT = 0.1
# A channel that varies by less than this part of its size is judged as if it varied by so much: where all
# tokens are nearly alike, as in the last layers of random models, next to nothing would be left to lose.
FLOOR = 0.25
# An output's variation over fewer tokens than this says little; over more than that it says little more, and
# a look would take as long as half a batch.
_LEAST_TOKENS, _MOST_TOKENS = 8, 64
_TOLD = 4  # linears that a warning names

ByDistance = tuple[Tensor | None, Tensor | None]  # see `PrunedEncoder.by_distance`


@torch.no_grad()
def int8_losses(
    stack: PrunedEncoder, x: Tensor, lengths: Sequence[int], names: Collection[str], weights: bool
) -> dict[str, float]:
    """The loss of each of these linears of a stack in int8, where all that comes before it is in float32.

    x (tokens, hidden_size): sequences of these lengths, back to back. names: from `stack.linear_names`.
    weights: whether the weights lose too, or the activations alone. A loss is the error of an output channel
    relative to how much it varies over the tokens, in the L2 norm; the median of the linear's channels. To
    the output of a part's second linear the part's input is added first, as the model adds it. Rounded
    weights of DeBERTa's queries and keys lose in those by distance, too, which are made of them, and by which
    alone a head may tell places apart: there a loss is the worst head's, and the larger one counts.
    """
    norm_first = stack.kind.norm_first
    by_linear = {id(stack.get_submodule(name)): name for name in stack.linear_names}
    losses: dict[str, float] = {}

    def run(i: int, j: int, x: Tensor, added: Tensor | None = None) -> Tensor:
        linear, weight = stack.parts[i].linears[j], _weight_of(stack, i, j)
        name = by_linear[id(linear)]
        output = F.linear(x, weight, linear.bias)
        if added is not None:
            output = output + added
        if name in names:
            losses[name] = _loss(x, weight, weights, output)
        return output

    bounds = torch.tensor([0, *lengths], device=x.device).cumsum(0, dtype=torch.int32)
    for i, part in enumerate(stack.parts):
        inner = run(i, 0, F.layer_norm(x, *_norm_of(part)) if norm_first and part.norm is not None else x)
        if isinstance(part, PrunedAttention):
            qkv, by_distance = by_linear[id(part.qkv)], None
            if weights:
                weight = _weight_of(stack, i, 0)
                by_distance = stack.by_distance(i // 2, weight)
                if qkv in names:
                    rounded = stack.by_distance(i // 2, _rounded(weight))
                    losses[qkv] = max(losses[qkv], _worst_head(rounded, by_distance))
            positions = part.given_positions(None, by_distance)
            inner = attention(inner, bounds, max(lengths), stack.head_dim, *positions)
        else:
            inner = part.activated(inner)
        x = run(i, 1, inner, added=x)
        x = x if norm_first else F.layer_norm(x, *_norm_of(part))
    return losses


def _weight_of(stack: PrunedEncoder, part: int, linear: int) -> Tensor:
    """The weight (out, in) of a linear as it is multiplied, stored in float32 or in int8 with scales."""
    weight = stack.plain(part, linear, "weight")
    if weight.is_floating_point():
        return weight
    return weight.float() * stack.plain(part, linear, SCALE)[:, None]


def _norm_of(part: Any) -> tuple[Any, ...]:
    norm = part.norm
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _loss(x: Tensor, weight: Tensor, weights: bool, output: Tensor) -> float:
    """See `int8_losses`; x (tokens, in), weight (out, in), output (tokens, out)."""
    if not x.numel() or not weight.numel():
        return 0.0
    rounded = _rounded(x)
    if weights:
        error = F.linear(rounded, _rounded(weight)) - F.linear(x, weight)
    else:
        error = F.linear(rounded - x, weight)
    return float(_of_channels(error, output).median())


def _worst_head(rounded: ByDistance, exact: ByDistance) -> float:
    """The largest loss of a head's keys, or queries, by distance; 0 where there are none."""
    losses = [
        float(_of_channels(of_head - right, right).median())
        for heads, right_heads in zip(rounded, exact, strict=True)
        if heads is not None and right_heads is not None
        for of_head, right in zip(heads, right_heads, strict=True)
    ]
    return max(losses, default=0.0)


def _of_channels(error: Tensor, output: Tensor) -> Tensor:
    """The error (rows, channels) of each channel, relative to how much the output varies over the rows."""
    varies, size = (output - output.mean(0)).norm(dim=0), output.norm(dim=0)
    least = (size * FLOOR).clamp_min(torch.finfo(output.dtype).tiny)
    return error.norm(dim=0) / torch.maximum(varies, least)


def _rounded(rows: Tensor) -> Tensor:
    values, scales = quantize(rows)
    return values * scales


class Int8Watch:
    """Compares int8 with float32 on the first tokens of the longest sequence of a model's first, second,
    fourth, eighth ... batch, so that a long run spends nothing on it; warns once, where a linear loses more
    than LIMIT.

    losses: the largest found so far of each linear, from the activations alone.
    """

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.warned = False
        self._batches = 0

    def look(self, stack: PrunedEncoder, x: Tensor, cu_seqlens: Tensor) -> None:
        """Take note of a batch that is run: x (tokens, hidden_size), as the first layer gets it."""
        if torch.compiler.is_compiling() or self.warned or not stack.int8_linears:
            return
        self._batches += 1
        if self._batches & (self._batches - 1):
            return
        lengths = cu_seqlens.diff().tolist()
        number = max(range(len(lengths)), key=lengths.__getitem__, default=-1)
        if number < 0 or lengths[number] < _LEAST_TOKENS:
            self._batches -= 1  # the next batch is looked at instead
            return
        first = int(cu_seqlens[number])
        rows = x[first : first + min(lengths[number], _MOST_TOKENS)]
        losses = int8_losses(stack, rows, [len(rows)], stack.int8_linears, weights=False)
        self.losses = {name: max(loss, self.losses.get(name, 0.0)) for name, loss in losses.items()}
        if high := above_limit(losses):
            self.warned = True
            warnings.warn(
                f"int8 loses {told(high)} on this text: some of their inputs are many times as large as the "
                "rest; optimize the float32 model with calibration=batches of such text, which leaves in "
                "float32 what hurts the outputs",
                RuntimeWarning,
                stacklevel=2,
            )


def above_limit(losses: dict[str, float]) -> dict[str, float]:
    """The linears that lose more than LIMIT, the worst first."""
    worst = sorted(losses, key=losses.__getitem__, reverse=True)
    return {name: losses[name] for name in worst if losses[name] > LIMIT}


def told(losses: dict[str, float]) -> str:
    """Linears and their losses in words, the first of them by name."""
    first = list(losses.items())[:_TOLD]
    named = ", ".join(f"{loss:.0%} of the output of {name}" for name, loss in first)
    more = len(losses) - _TOLD
    return f"{named} and more than {LIMIT:.0%} of {more} others" if more > 0 else named
