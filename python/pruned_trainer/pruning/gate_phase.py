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

from pruned_trainer.pruning.budget import Expected
from pruned_trainer.pruning.gates import Gates
from pruned_trainer.pruning.options import MAX_PACE, PENALTIES

# The fraction that is held falls from what the gates cost at the start (or the target before) to the target
# over this part of the target's steps; it stays there for the rest.
RAMP = 0.6
# An open gate's price is MULTIPLIER_RATE times the sum of the gaps of all steps, plus STIFFNESS times the gap
# of now. It must outweigh what gates add to the loss, which takes 1 to 50 here.
MULTIPLIER_RATE, STIFFNESS = 20.0, 1000.0
# The steps that gates at the paper's learning rate (0.1) take from open to closed, with time to settle. A
# shorter run gets proportionally larger rates, but at most MAX_PACE times as large.
SETTLING_STEPS = 300
# Even at MAX_PACE, the gates of fewer steps do not settle.
FEW_STEPS = 100
# The paper's prices: 5e-3 a head and 2e-5 an FFN unit of a base model (144 heads, 36,864 units), 1.875e-3 and
# 7.5e-6 of a large one (384, 98,304). Each is a constant over the number of gates. The paper states no price
# of a hidden dimension.
PRICES = {"heads": 0.72, "ffn": 0.737, "hidden": 0.72}


class Lagrangian(nn.Module):
    """The term multiplier * gap + STIFFNESS / 2 * gap^2, which holds the expected budget at a target.

    gap = expected fraction - target fraction. It is an augmented Lagrangian: the multiplier, a buffer, rises
    by the gap times a rate in every step (`follow`), also at the end of a training, so that a budget that is
    late catches up; the quadratic term keeps it from swinging (Nocedal and Wright, chapter 17).
    """

    multiplier: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("multiplier", torch.zeros(()))

    def forward(self, gap: Tensor) -> Tensor:
        return self.multiplier * gap + STIFFNESS / 2 * gap.square()

    def follow(self, gap: Tensor, rate: float) -> None:
        """Raise the multiplier by the gap, or lower it where the gap is negative."""
        self.multiplier += rate * gap.detach()


class GatePhase(ABC):
    """Gates that train, and their term of the loss. penalty: one of PENALTIES."""

    def __init__(self, gates: Gates, gate_learning_rate: float, penalty: str = "one") -> None:
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

    def stage_ends(self, steps: int) -> list[int]:
        """The number of steps after which each target's share of a training of `steps` steps is over. Where
        that is no whole number it is the next: the step in between is the target's, too."""
        return [-(-steps * (k + 1) // self.stages) for k in range(self.stages)]

    def group(self, steps: int) -> dict[str, Any]:
        """The optimiser's parameter group of the gates, for a training of `steps` steps."""
        rate = self.gate_learning_rate * self.pace(steps)
        return {"params": self.gates.locations(), "lr": rate, "weight_decay": 0.0}

    def pace(self, steps: int) -> float:
        """The factor by which the gates of a training of `steps` steps move faster, because it is short."""
        return min(max(1.0, SETTLING_STEPS / max(steps // self.stages, 1)), MAX_PACE)

    def remarks(self, steps: int) -> list[str]:
        """Sentences for the user where a training of `steps` steps is too short for the gates."""
        steps_each, pace, remarks = steps // self.stages, self.pace(steps), []
        if pace > 1:
            remarks.append(
                f"{steps_each} steps a target are fewer than the {SETTLING_STEPS} that gates need: their "
                f"rate is {self.gate_learning_rate * pace:.3g}, {pace:.3g} times {self.gate_learning_rate:g}"
            )
        if steps_each < FEW_STEPS:
            remarks.append(
                f"warning: gates do not settle in {steps_each} steps, and the choice will be partly noise; "
                f"{FEW_STEPS} or more are needed"
            )
        return remarks


class HoldTarget(GatePhase):
    """A Lagrangian that holds the expected cost at `fractions` of the dense cost, one after another, each for
    an equal share of the steps.

    budget: a `Budget`, or `ShareOfGates` to hold a share of the gates themselves.
    """

    def __init__(
        self,
        gates: Gates,
        budget: Expected,
        fractions: Sequence[float],
        gate_learning_rate: float = 0.1,
        penalty: str = "one",
    ) -> None:
        super().__init__(gates, gate_learning_rate, penalty)
        self.budget, self.fractions = budget, list(fractions)
        if not self.fractions or self.fractions != sorted(self.fractions, reverse=True):
            raise ValueError(f"fractions are {self.fractions}: one or more that fall are needed")
        self.followed: float | None = None  # the progress at which the multiplier last followed the gap
        with torch.no_grad():
            self.start = float(budget.expected(gates.probabilities(penalty)))
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
        before = self.fractions[stage - 1] if stage else self.start
        return before + (self.fractions[stage] - before) * min((place - stage) / RAMP, 1.0)

    def loss(self, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The term for one step of training; the multiplier follows the gap, once for all minibatches of a
        step, which have the same progress."""
        target_fraction = self.target_at(progress)
        expected = self.budget.expected(self.gates.probabilities(self.penalty))
        gap = expected - target_fraction
        if progress != self.followed:
            self.lagrangian.follow(gap, MULTIPLIER_RATE)
            self.followed = progress
        facts = {"expected": float(expected.detach()), "wanted": target_fraction}
        return self.lagrangian(gap), facts | {"multiplier": float(self.lagrangian.multiplier)}


class PayPerGate(GatePhase):
    """The paper's term: lambda times the expected number of open gates.

    multiples: for each part, the multiple of the paper's own lambda.
    """

    def __init__(
        self,
        gates: Gates,
        multiples: Mapping[str, float],
        gate_learning_rate: float = 0.1,
        penalty: str = "one",
    ) -> None:
        super().__init__(gates, gate_learning_rate, penalty)
        self.multiples = {part: multiples[part] for part in gates.parts}

    def loss(self, progress: float) -> tuple[Tensor, dict[str, float]]:
        counts = self.gates.probabilities(self.penalty)
        total = torch.zeros((), device=self.gates.draws.device)
        shares = {}
        for part, multiple in self.multiples.items():
            probabilities = torch.cat(counts.of(part))
            share = probabilities.sum() / max(probabilities.numel(), 1)
            total = total + multiple * PRICES[part] * share
            shares[f"open_{part}"] = float(share.detach())
        return total, shares
