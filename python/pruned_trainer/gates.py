"""Hard-concrete gates (Louizos et al. 2018) on attention heads and FFN activations, and the Lagrangian that
holds a budget.

A gate is a multiplier in [0, 1] with a trainable location, log_alpha. While training it is sampled anew for
each minibatch; in evaluation it is deterministic. Both are exactly 0 or 1 with positive probability, so gates
close for real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pruned_ops import ModelShape

# The method's own defaults; the paper states no others.
BETA = 2 / 3
LOW, HIGH = -0.1, 1.1
# P(gate > 0) = 0.98 and a deterministic gate of exactly 1: training starts at the model as it is, and not so
# far out that the price of an open gate has no gradient.
INITIAL_LOG_ALPHA = 2.5


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(gate > 0), elementwise: sigmoid(log_alpha - beta * log(-low / high))."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def deterministic_gate(log_alpha: Tensor) -> Tensor:
    """The gate without noise, in [0, 1], elementwise."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def sampled_gate(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A sample of the gate, in [0, 1], elementwise; `uniform` holds draws from (0, 1)."""
    noise = uniform.log() - (1 - uniform).log()
    return (torch.sigmoid((noise + log_alpha) / BETA) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


class Gates(nn.Module):
    """One gate for each head and each FFN unit of every layer.

    heads[i] (num_heads,) and ffn[i] (ffn_width,) hold log_alpha of layer i; `draw` refreshes `head_values`
    and `ffn_values`, which multiply the contexts and the activations. The noise depends on `seed` and on how
    many draws were made (a saved buffer) alone: equal on every process, and the same after a resumed run.
    """

    draws: Tensor

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.seed = seed
        self.heads = nn.ParameterList(torch.full((s.num_heads,), INITIAL_LOG_ALPHA) for s in shape.layers)
        self.ffn = nn.ParameterList(torch.full((s.ffn_width,), INITIAL_LOG_ALPHA) for s in shape.layers)
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.fixed: tuple[list[Tensor], list[Tensor]] | None = None
        self.head_values: list[Tensor] = []
        self.ffn_values: list[Tensor] = []

    def draw(self) -> None:
        """Set the values for the next forward: fixed ones if set, samples while training, else deterministic
        ones."""
        if self.fixed is not None:
            self.head_values, self.ffn_values = self.fixed
        elif self.training:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            self.draws += 1
            self.head_values = [_sample(log_alpha, generator) for log_alpha in self.heads]
            self.ffn_values = [_sample(log_alpha, generator) for log_alpha in self.ffn]
        else:
            self.head_values = [deterministic_gate(log_alpha) for log_alpha in self.heads]
            self.ffn_values = [deterministic_gate(log_alpha) for log_alpha in self.ffn]

    def fix(self, heads: Sequence[Tensor], ffn: Sequence[Tensor]) -> None:
        """Use these values from now on, in training and evaluation: a hard decision, or all ones."""
        like = self.heads[0] if len(self.heads) else torch.zeros(())
        self.fixed = ([v.to(like) for v in heads], [v.to(like) for v in ffn])

    def fix_open(self) -> None:
        """All gates open: exactly the model without gates."""
        self.fix([torch.ones_like(h) for h in self.heads], [torch.ones_like(f) for f in self.ffn])

    def open_probabilities(self) -> tuple[list[Tensor], list[Tensor]]:
        """P(gate > 0) of each head and FFN unit, layer by layer; differentiable."""
        return [open_probability(h) for h in self.heads], [open_probability(f) for f in self.ffn]


def _sample(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU whatever the device, so that the noise is the same everywhere; kept off 0 and 1 for
    # the logs.
    uniform = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return sampled_gate(log_alpha, uniform.to(log_alpha))


class Lagrangian(nn.Module):
    """Holds the expected budget at a target: linear * gap + quadratic * gap^2, with both multipliers trained
    upwards.

    gap = expected fraction - target fraction (Wang et al. 2020, as used by CoFi). The multipliers are
    parameters for gradient ascent: give them to an optimiser with maximize=True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, expected: Tensor, target: float) -> Tensor:
        gap = expected - target
        return self.linear * gap + self.quadratic * gap.square()
