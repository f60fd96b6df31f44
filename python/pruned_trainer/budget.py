"""What a choice of gates costs, as a fraction of the dense encoder, and the target it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruned_ops import LayerShape, ModelShape

UNITS = ("params", "macs")


@dataclass(frozen=True)
class Target:
    """What was asked for: the fraction to keep of the dense encoder's parameters, or of its
    multiply-accumulates."""

    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one target of {', '.join(UNITS)} is needed; got {', '.join(given) or 'none'}"
            )
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"target {self.unit} is {self.fraction}: a fraction kept between 0 and 1 is needed"
            )

    @property
    def unit(self) -> str:
        return "params" if self.params is not None else "macs"

    @property
    def fraction(self) -> float:
        value = self.params if self.params is not None else self.macs
        assert value is not None
        return value


class Budget:
    """Cost of heads and FFN units, linear in their numbers: constant + sum of what is kept, over the dense
    cost.

    lengths: sequence lengths (tokens) of the workload; they weigh the attention's share of the MACs.
    """

    def __init__(self, dense: ModelShape, unit: str, lengths: Sequence[int]) -> None:
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}; one of {', '.join(UNITS)} is needed")
        if unit == "macs" and not lengths:
            raise ValueError("MACs depend on the sequence lengths, and none were given")
        if not any(layer.num_heads or layer.ffn_width for layer in dense.layers):
            raise ValueError("this encoder has no head and no FFN unit left to prune")
        self.dense, self.unit, self.lengths = dense, unit, list(lengths)
        self.total = self._cost(dense.layers)
        none = (LayerShape(0, 0),) * len(dense.layers)
        self.constant = self._cost(none) / self.total
        # Every layer costs alike, so one head and one unit of the first layer tell the prices.
        self.per_head = self._cost((LayerShape(1, 0), *none[1:])) / self.total - self.constant
        self.per_unit = self._cost((LayerShape(0, 1), *none[1:])) / self.total - self.constant

    def _cost(self, layers: tuple[LayerShape, ...]) -> int:
        shape = ModelShape(layers, self.dense.hidden_size, self.dense.head_dim)
        return shape.parameters() if self.unit == "params" else shape.macs(self.lengths)

    def fraction(self, layers: Sequence[LayerShape]) -> float:
        """Cost of these shapes over the dense cost."""
        return self._cost(tuple(layers)) / self.total

    def expected(self, heads: Sequence[Tensor], ffn: Sequence[Tensor]) -> Tensor:
        """Expected fraction under the gates' open probabilities; differentiable scalar."""
        kept_heads, kept_units = torch.cat(list(heads)).sum(), torch.cat(list(ffn)).sum()
        return self.constant + self.per_head * kept_heads + self.per_unit * kept_units

    def check_reachable(self, target: Target) -> None:
        """ValueError, naming the least that can be reached, where even an empty encoder costs more than the
        target."""
        if target.fraction < self.constant:
            raise ValueError(
                f"target {self.unit} {target.fraction:.4f} cannot be met: an encoder with no head "
                f"and no FFN unit left "
                f"still has {self.constant:.4f} of the dense {self.unit} (biases and LayerNorms); "
                f"the least is that"
            )
