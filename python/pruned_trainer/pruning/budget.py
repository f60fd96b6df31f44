"""Budgets: what a choice of gates costs, in parameters, multiply-accumulates, or milliseconds from a measured
table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pruned_ops import LayerShape, ModelShape
from pruned_ops.measure.latency import LatencyTable
from pruned_trainer.pruning.gates import PerGate
from pruned_trainer.pruning.options import Target


class Expected(Protocol):
    """Whatever a gate phase can hold: a number between 0 and 1 that falls as gates close."""

    def expected(self, counts: PerGate) -> Tensor:
        """The number, a differentiable scalar. counts: the probability with which each gate counts."""


class ShareOfGates:
    """The share of the gates on these parts that count, whatever each of them costs."""

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = tuple(parts)

    def expected(self, counts: PerGate) -> Tensor:
        every = torch.cat([tensor for part in self.parts for tensor in counts.of(part)])
        return every.sum() / max(every.numel(), 1)


class Budget(ABC):
    """The cost of an encoder, as a fraction of the dense encoder's: `fraction` for a shape that was chosen,
    `expected` for gates while they train.

    unmade_hidden: a hidden size that no narrow model can have (`compact.unmade_hidden`)."""

    unmade_hidden: int | None = None

    def __init__(self, dense: ModelShape) -> None:
        if not any(layer.num_heads or layer.ffn_width for layer in dense.layers):
            raise ValueError("this encoder has no head and no FFN unit left to prune")
        self.dense = dense
        self.total = self.cost(dense)

    @abstractmethod
    def cost(self, shape: ModelShape) -> float:
        """The cost of a shape, in the budget's own unit."""

    @abstractmethod
    def expected(self, counts: PerGate) -> Tensor:
        """The expected fraction, a differentiable scalar. counts: the probability with which each gate
        counts."""

    @abstractmethod
    def allowed_fraction(self, target: Target) -> float:
        """The fraction of the dense cost that the target allows; ValueError for a target in another unit."""

    def fraction(self, shape: ModelShape) -> float:
        """The cost of this shape over the dense cost."""
        return self.cost(shape) / self.total

    @abstractmethod
    def reached(self, shape: ModelShape, target: Target | None) -> dict[str, float]:
        """The cost of this shape by unit, as a target in that unit would state it."""

    def prices(self, parts: Sequence[str]) -> PerGate:
        """The price of each gate on these parts of the dense model, as a fraction of the dense cost: the cost
        of the gate's whole part, spread evenly."""
        prices = PerGate.full(self.dense, 0.0)
        if "hidden" in parts:
            saved = 1.0 - self.fraction(replace(self.dense, hidden_size=1))
            prices.hidden += saved / max(self.dense.hidden_size - 1, 1)
        for i, layer in enumerate(self.dense.layers):
            for without_part, gates in (
                (LayerShape(0, layer.ffn_width), prices.heads[i]),
                (LayerShape(layer.num_heads, 0), prices.ffn[i]),
            ):
                layers = (*self.dense.layers[:i], without_part, *self.dense.layers[i + 1 :])
                saved = 1.0 - self.fraction(replace(self.dense, layers=layers))
                gates += saved / max(gates.numel(), 1)
        return prices

    def even_share(self, parts: Sequence[str], fraction: float) -> float:
        """The share of the gates that can stay on each of these parts, the same on all of them, at this
        fraction of the dense cost."""
        low, high = 0.0, 1.0
        for _ in range(30):  # to far below one gate in a million
            middle = (low + high) / 2
            counts, shares = PerGate.full(self.dense, 1.0), PerGate.full(self.dense, middle)
            for part in parts:
                counts = counts.replace(part, shares)
            fits = float(self.expected(counts)) <= fraction
            low, high = (middle, high) if fits else (low, middle)
        return low

    def check_reachable(self, target: Target, parts: Sequence[str], align: int = 1) -> None:
        """ValueError for a target that the dense model meets already, or that is missed even with every gate
        on these parts closed; the error says what is within reach. align: the fewest hidden dimensions that
        stay."""
        allowed = self.allowed_fraction(target)
        if allowed >= 1:
            raise ValueError(f"target {target}: the dense model costs no more than that")
        layers = tuple(
            LayerShape(0 if "heads" in parts else layer.num_heads, 0 if "ffn" in parts else layer.ffn_width)
            for layer in self.dense.layers
        )
        hidden = min(align, self.dense.hidden_size) if "hidden" in parts else self.dense.hidden_size
        least = self.fraction(replace(self.dense, layers=layers, hidden_size=hidden))
        if allowed < least:
            within = f"{1 / least:.2f}x" if target.unit == "speedup" else f"{least * self._scale(target):.4g}"
            raise ValueError(
                f"target {target} cannot be met: with every gate on {', '.join(parts)} closed "
                f"{least:.4f} of the dense cost is left; {target.unit} {within} is the limit of what is "
                "within reach"
            )

    def _scale(self, target: Target) -> float:
        return self.total if target.unit == "latency_ms" else 1.0


class SizeBudget(Budget):
    """A budget of parameters, or of multiply-accumulates over sequences of these lengths (tokens)."""

    def __init__(self, dense: ModelShape, unit: str, lengths: Sequence[int] = ()) -> None:
        if unit not in ("params", "macs"):
            raise ValueError(f"unit is {unit!r}; params or macs is needed")
        self.unit, self.lengths = unit, list(lengths)
        if unit == "macs" and not self.lengths:
            raise ValueError("MACs depend on the sequence lengths, and none were given")
        super().__init__(dense)
        self._at_dense, self._at_one = self._counts(dense.hidden_size), self._counts(1)

    def cost(self, shape: ModelShape) -> float:
        return shape.parameters() if self.unit == "params" else shape.macs(self.lengths)

    def allowed_fraction(self, target: Target) -> float:
        if target.unit != self.unit:
            raise ValueError(f"target {target.unit} is not held by a budget of {self.unit}")
        return target.value

    def reached(self, shape: ModelShape, target: Target | None) -> dict[str, float]:
        return {self.unit: self.fraction(shape)}

    def _counts(self, hidden: int) -> Tensor:
        """The fractions that an empty encoder, one FFN unit, and one head of each layer cost at this hidden
        size: (2 + layers,)."""
        number = len(self.dense.layers)
        nothing = (LayerShape(0, 0),) * number

        def fraction(layer: int, shape: LayerShape) -> float:
            layers = (*nothing[:layer], shape, *nothing[layer + 1 :])
            return self.fraction(replace(self.dense, layers=layers, hidden_size=hidden))

        empty, unit = fraction(0, LayerShape(0, 0)), fraction(0, LayerShape(0, 1))
        heads = [fraction(layer, LayerShape(1, 0)) - empty for layer in range(number)]
        return torch.tensor([empty, unit - empty, *heads], dtype=torch.float64)

    def expected(self, counts: PerGate) -> Tensor:
        # Every cost is linear in the hidden size; `place` is 0 at hidden size 1, and 1 at the dense one.
        place = (counts.hidden.sum() - 1) / max(self.dense.hidden_size - 1, 1)
        least, most = self._at_one.to(place), self._at_dense.to(place)
        empty, unit, *heads = least + place * (most - least)
        open_heads = sum(open_.sum() * head for open_, head in zip(counts.heads, heads, strict=True))
        return empty + open_heads + torch.cat(counts.ffn).sum() * unit


class LatencyBudget(Budget):
    """A budget of milliseconds for a batch of the table's workload, on the machine that the table was
    measured on."""

    def __init__(self, dense: ModelShape, table: LatencyTable) -> None:
        self.table = table
        self._attention, self._ffn = _sloping(table.attention), _sloping(table.ffn)
        super().__init__(dense)

    def cost(self, shape: ModelShape) -> float:
        if shape.hidden_size != self.dense.hidden_size:
            raise ValueError("the table was measured at one hidden size: hidden gates go with params or macs")
        return self.table.predict(shape.layers)

    def allowed_fraction(self, target: Target) -> float:
        if target.unit == "speedup":
            return 1 / target.value
        if target.unit == "latency_ms":
            return target.value / self.total
        raise ValueError(f"target {target.unit} is not held by a budget of measured time")

    def reached(self, shape: ModelShape, target: Target | None) -> dict[str, float]:
        """The cost by the table; a measured time may differ from it."""
        if target is not None and target.unit == "latency_ms":
            return {"latency_ms": self.cost(shape)}
        return {"speedup": 1 / self.fraction(shape)}

    def expected(self, counts: PerGate) -> Tensor:
        total = torch.full((), self.table.base_ms, device=counts.hidden.device)
        for points, widths in ((self._attention, counts.heads), (self._ffn, counts.ffn)):
            total = total + sum(_interpolated(points.to(total), width.sum()) for width in widths)
        return total / self.total


def _sloping(points: Sequence[tuple[int, float]]) -> Tensor:
    """The points as (2, n), with a tenth of the straight line between the ends mixed in.

    Where the measured curve is flat, closing a gate would gain nothing, and too few gates would ever close to
    reach the curve's next step down.
    """
    widths, values = torch.tensor(points, dtype=torch.float32).T.contiguous()
    line = values[0] + (values[-1] - values[0]) * widths / widths[-1].clamp(min=1)
    return torch.stack([widths, 0.9 * values + 0.1 * line])


def _interpolated(points: Tensor, x: Tensor) -> Tensor:
    """The value at the scalar x, piecewise linear through points (2, n) that rise in the first row;
    differentiable in x."""
    known, values = points
    if known.numel() == 1:
        return values[0] + 0 * x
    right = int(torch.searchsorted(known, x.detach()).clamp(1, known.numel() - 1))
    slope = (values[right] - values[right - 1]) / (known[right] - known[right - 1])
    return values[right - 1] + slope * (x - known[right - 1])


def make_budget(
    target: Target, dense: ModelShape, lengths: Sequence[int], table: LatencyTable | None
) -> Budget:
    """The budget in the target's unit; ValueError where that needs a latency table and there is none."""
    if not target.is_time:
        return SizeBudget(dense, target.unit, lengths)
    if table is None:
        raise ValueError(f"target {target.unit} needs a latency table")
    return LatencyBudget(dense, table)
