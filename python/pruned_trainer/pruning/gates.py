"""Hard-concrete gates (Louizos et al. 2018) on attention heads, FFN activations and hidden dimensions.

A gate is a multiplier in [0, 1] with a trainable location, log_alpha. While training it is sampled anew for
each minibatch; in evaluation it is deterministic. Both are exactly 0 or 1 with positive probability, so gates
close for real.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pruned_ops import ModelShape
from pruned_ops.files import write_whole
from pruned_trainer.pruning.options import DEFAULT_PARTS, PARTS, check_parts

# The method's own defaults; the paper states no others.
BETA = 2 / 3
LOW, HIGH = -0.1, 1.1
# Here the deterministic gate is exactly 1, so that training starts at the model as it is, and P(gate = 1) is
# 0.71, so that the price of such a gate has a gradient (P(gate > 0) is 0.98, with a 13th of it). A start at 1
# with P(gate > 0) was tried: on real data it held a budget later, and chose worse.
INITIAL_LOG_ALPHA = 2.5


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(gate > 0), elementwise: sigmoid(log_alpha - beta * log(-low / high))."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def one_probability(log_alpha: Tensor) -> Tensor:
    """P(gate = 1), elementwise: sigmoid(log_alpha - beta * log((1 - low) / (high - 1)))."""
    return torch.sigmoid(log_alpha - BETA * math.log((1 - LOW) / (HIGH - 1)))


# The probability with which a gate counts in the budget, by the name of the penalty (`options.PENALTIES`).
COUNTED: dict[str, Callable[[Tensor], Tensor]] = {"open": open_probability, "one": one_probability}


def deterministic_gate(log_alpha: Tensor) -> Tensor:
    """The gate without noise, in [0, 1], elementwise."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def sampled_gate(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A sample of the gate, in [0, 1], elementwise; `uniform` holds draws from (0, 1)."""
    noise = uniform.log() - (1 - uniform).log()
    return (torch.sigmoid((noise + log_alpha) / BETA) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


@dataclass
class PerGate:
    """One number for each gate of a model.

    heads[i] (num_heads,) and ffn[i] (ffn_width,) are layer i's, hidden (hidden_size,) is the whole model's.
    """

    heads: list[Tensor]
    ffn: list[Tensor]
    hidden: Tensor

    @classmethod
    def full(cls, shape: ModelShape, value: float) -> PerGate:
        """The same number for every gate of a model of this shape."""
        return cls(
            [torch.full((layer.num_heads,), value) for layer in shape.layers],
            [torch.full((layer.ffn_width,), value) for layer in shape.layers],
            torch.full((shape.hidden_size,), value),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> PerGate:
        """The numbers after `function` was applied to each tensor."""
        return PerGate(
            [function(h) for h in self.heads], [function(f) for f in self.ffn], function(self.hidden)
        )

    def of(self, part: str) -> list[Tensor]:
        """The tensors of one of PARTS."""
        return {"heads": self.heads, "ffn": self.ffn, "hidden": [self.hidden]}[part]

    def replace(self, part: str, other: PerGate) -> PerGate:
        """These numbers, with those of `other` in one of PARTS."""
        source = {name: other if name == part else self for name in PARTS}
        return PerGate(list(source["heads"].heads), list(source["ffn"].ffn), source["hidden"].hidden)

    def places(self) -> PerGate:
        """Each number's place among all those of its part, from 0 (the lowest) to below 1; of equal ones the
        first is the lowest. The numbers of several parts, which mean different things, thus compare by the
        share of their own part that lies below them."""
        return PerGate(_places(self.heads), _places(self.ffn), _places([self.hidden])[0])


@dataclass(frozen=True)
class Scores:
    """The numbers that a choice is made from.

    rank: gates with a larger number stay longer, and one with +inf always stays. values: what an open gate
    multiplies its part by.
    """

    rank: PerGate
    values: PerGate

    def save(self, path: Path | str) -> None:
        """Write the scores; the file is there whole, or as it was before."""
        content = io.BytesIO()
        torch.save({"rank": vars(self.rank), "values": vars(self.values)}, content)
        write_whole(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read a file that `save` wrote."""
        loaded = torch.load(path, weights_only=True)
        return cls(PerGate(**loaded["rank"]), PerGate(**loaded["values"]))


class Gates(nn.Module):
    """One gate for each head and each FFN unit of every layer, and one for each hidden dimension.

    parts: those of PARTS that have gates; the others stay open. heads[i] (num_heads,), ffn[i] (ffn_width,)
    and hidden[0] (hidden_size,) hold log_alpha; `draw` refreshes `values`, by which the hooks multiply. The
    noise depends on `seed` and on how many draws were made (a saved buffer) alone: equal on every process,
    and the same after a resumed run.
    """

    draws: Tensor

    def __init__(self, shape: ModelShape, seed: int = 0, parts: Sequence[str] = DEFAULT_PARTS) -> None:
        super().__init__()
        check_parts(parts)
        self.shape, self.seed, self.parts = shape, seed, tuple(part for part in PARTS if part in parts)
        start = PerGate.full(shape, INITIAL_LOG_ALPHA)
        self.heads, self.ffn, self.hidden = (
            nn.ParameterList(start.of(part) if part in self.parts else []) for part in PARTS
        )
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.fixed: PerGate | None = None
        self.values = PerGate.full(shape, 1.0)

    def log_alphas(self, part: str) -> list[nn.Parameter]:
        """The trained locations of one of PARTS; empty where it has no gates."""
        return list({"heads": self.heads, "ffn": self.ffn, "hidden": self.hidden}[part])

    def locations(self) -> list[nn.Parameter]:
        """All log_alpha parameters."""
        return [parameter for part in self.parts for parameter in self.log_alphas(part)]

    def per_gate(self, function: Callable[[Tensor], Tensor], without: float) -> PerGate:
        """`function` of each log_alpha, and the number `without` for the parts that have no gates."""
        device = self.draws.device
        numbers = PerGate.full(self.shape, without).map(lambda tensor: tensor.to(device))
        for part in self.parts:
            mapped = [function(log_alpha) for log_alpha in self.log_alphas(part)]
            if part == "hidden":
                numbers.hidden = mapped[0]
            else:
                setattr(numbers, part, mapped)
        return numbers

    def draw(self) -> None:
        """Set the values for the next forward pass: the fixed ones, if `fix` was called; else samples in
        training mode, and deterministic values in evaluation mode."""
        if self.fixed is not None:
            self.values = self.fixed
        elif self.training:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            self.draws += 1
            self.values = self.per_gate(lambda log_alpha: _sample(log_alpha, generator), 1.0)
        else:
            self.values = self.per_gate(deterministic_gate, 1.0)

    def fix(self, values: PerGate) -> None:
        """Use these values from now on, in training and evaluation: a hard decision, or all ones.

        Errors: ValueError where values of a part without gates are not all 1, because nothing would apply
        them.
        """
        for part in PARTS:
            if part not in self.parts and any(bool((value != 1).any()) for value in values.of(part)):
                raise ValueError(f"there are no gates on {part}: attach them with parts including {part!r}")
        self.fixed = values.map(lambda value: value.to(self.draws.device))

    def fix_open(self) -> None:
        """Open all gates, so that the model computes what it does without gates."""
        self.fix(PerGate.full(self.shape, 1.0))

    def probabilities(self, penalty: str = "open") -> PerGate:
        """The probability with which each gate counts: P(gate > 0), or for the penalty "one" P(gate = 1);
        differentiable."""
        return self.per_gate(COUNTED[penalty], 1.0)

    @torch.no_grad()
    def scores(self) -> Scores:
        """The scores with log_alpha as rank and the deterministic gates as values, on the CPU."""
        rank = self.per_gate(lambda log_alpha: log_alpha.detach().clone(), math.inf)
        values = self.per_gate(deterministic_gate, 1.0)
        return Scores(rank.map(lambda t: t.float().cpu()), values.map(lambda t: t.float().cpu()))


def _sample(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU whatever the device, so that the noise is the same everywhere; kept off 0 and 1 for
    # the logs.
    uniform = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return sampled_gate(log_alpha, uniform.to(log_alpha))


def _places(numbers: Sequence[Tensor]) -> list[Tensor]:
    every = torch.cat(list(numbers))
    places = torch.empty(every.numel())
    places[every.argsort(stable=True)] = torch.arange(every.numel()) / max(every.numel(), 1)
    return list(places.split([tensor.numel() for tensor in numbers]))
