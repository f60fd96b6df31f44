"""The gate phase: the term that it adds to the loss, by which open gates cost something.

`HoldTarget` (the joint recipe) pulls the expected cost to a target with a Lagrangian, or to several targets
one after another; `PayPerGate` (the paper's recipe) charges a fixed price for each open gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruned_trainer.pruning.budget import Budget
from pruned_trainer.pruning.gates import Gates
from pruned_trainer.pruning.options import PENALTIES

# The fraction that is held falls from the dense cost (or the target before) to the target over this part of
# the target's steps; it stays there for the rest.
RAMP = 0.6
# The multipliers must grow to where the price of an open gate outweighs what it adds to the loss, about 10
# to 30 here.
MULTIPLIER_RATE = 1.0
# The steps that gates at the paper's learning rate (0.1) take from open to closed, with time to settle. A
# shorter run gets proportionally larger rates.
SETTLING_STEPS = 300
# The paper's prices: 5e-3 a head and 2e-5 an FFN unit of a base model (1.875e-3 and 7.5e-6 of a large one),
# which is 0.72 over the number of gates for all four.
PRICE_OF_ALL = 0.72


class Lagrangian(nn.Module):
    """The term linear * gap + quadratic * gap^2, which holds the expected budget at a target.

    gap = expected fraction - target fraction (Wang et al. 2020, as used by CoFi). Both multipliers are
    trained by gradient ascent: give them to an optimiser with maximize=True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, expected: Tensor, target: float) -> Tensor:
        gap = expected - target
        return self.linear * gap + self.quadratic * gap.square()


class GatePhase(ABC):
    """Gates that train, and their term of the loss. penalty: one of PENALTIES."""

    def __init__(self, gates: Gates, gate_learning_rate: float, penalty: str = "open") -> None:
        if penalty not in PENALTIES:
            raise ValueError(f"penalty is {penalty!r}; one of {', '.join(PENALTIES)} is needed")
        self.gates, self.gate_learning_rate, self.penalty = gates, gate_learning_rate, penalty

    @abstractmethod
    def loss(self, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The term of the loss at this part of the training (0 to 1), and numbers for the log."""

    @property
    def stages(self) -> int:
        """The number of targets that are held one after another."""
        return 1

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """The optimiser's parameter groups for a training of `steps` steps."""
        rate = self.gate_learning_rate * self.pace(steps)
        return [{"params": self.gates.locations(), "lr": rate, "weight_decay": 0.0}]

    @staticmethod
    def pace(steps: int) -> float:
        """The factor by which the gates of a short training must move faster."""
        return max(1.0, SETTLING_STEPS / steps) if steps > 0 else 1.0


class HoldTarget(GatePhase):
    """A Lagrangian that holds the expected cost at `fractions` of the dense cost, one after another, each for
    an equal share of the steps."""

    def __init__(
        self,
        gates: Gates,
        budget: Budget,
        fractions: Sequence[float],
        gate_learning_rate: float = 0.1,
        penalty: str = "open",
    ) -> None:
        super().__init__(gates, gate_learning_rate, penalty)
        self.budget, self.fractions = budget, list(fractions)
        if not self.fractions or self.fractions != sorted(self.fractions, reverse=True):
            raise ValueError(f"fractions are {self.fractions}: one or more that fall are needed")
        gates.add_module("lagrangian", Lagrangian().to(gates.draws.device))

    @property
    def lagrangian(self) -> Lagrangian:
        return self.gates.get_submodule("lagrangian")  # type: ignore[return-value]

    @property
    def stages(self) -> int:
        return len(self.fractions)

    def target_at(self, progress: float) -> float:
        """The fraction that is held at this part of the training (0 to 1)."""
        place = min(max(progress, 0.0), 1.0) * len(self.fractions)
        stage = min(int(place), len(self.fractions) - 1)
        before = self.fractions[stage - 1] if stage else 1.0
        return before + (self.fractions[stage] - before) * min((place - stage) / RAMP, 1.0)

    def loss(self, progress: float) -> tuple[Tensor, dict[str, float]]:
        wanted = self.target_at(progress)
        expected = self.budget.expected(self.gates.probabilities(self.penalty))
        return self.lagrangian(expected, wanted), {"expected": float(expected.detach()), "wanted": wanted}

    def groups(self, steps: int) -> list[dict[str, Any]]:
        steps = steps // len(self.fractions)  # each target has its share to settle in
        rate, multipliers = MULTIPLIER_RATE * self.pace(steps), list(self.lagrangian.parameters())
        ascent = {"params": multipliers, "lr": rate, "weight_decay": 0.0, "maximize": True}
        return [*super().groups(steps), ascent]


class PayPerGate(GatePhase):
    """The paper's term: lambda times the expected number of open gates.

    multiples: for each part, the multiple of the paper's own lambda.
    """

    def __init__(
        self,
        gates: Gates,
        multiples: Mapping[str, float],
        gate_learning_rate: float = 0.1,
        penalty: str = "open",
    ) -> None:
        super().__init__(gates, gate_learning_rate, penalty)
        self.multiples = {part: multiples[part] for part in gates.parts}

    def loss(self, progress: float) -> tuple[Tensor, dict[str, float]]:
        counts = self.gates.probabilities(self.penalty)
        total = torch.zeros((), device=self.gates.draws.device)
        shares = {}
        for part, multiple in self.multiples.items():
            probabilities = torch.cat(counts.of(part))
            total = total + multiple * PRICE_OF_ALL * probabilities.mean()
            shares[f"open_{part}"] = float(probabilities.detach().mean())
        return total, shares
