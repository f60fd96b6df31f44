"""The decision: which heads and FFN units stay, with their gate values, after alignment. Made once, written
down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruned_ops import LayerShape
from pruned_trainer.budget import Budget, Target
from pruned_trainer.gates import Gates, deterministic_gate

FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """What stays of one kind in one layer: rising indices into the source model, and the gate value of
    each."""

    indices: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.values):
            raise ValueError(f"{len(self.indices)} kept indices but {len(self.values)} gate values")
        if list(self.indices) != sorted(set(self.indices)) or (self.indices and self.indices[0] < 0):
            raise ValueError("kept indices must rise and not be negative")
        if any(not 0 <= value <= 1 for value in self.values):
            raise ValueError("gate values must lie in [0, 1]")


@dataclass(frozen=True)
class LayerDecision:
    """The heads and FFN units that stay in one layer."""

    heads: Kept
    ffn: Kept

    @property
    def shape(self) -> LayerShape:
        return LayerShape(len(self.heads.indices), len(self.ffn.indices))


@dataclass(frozen=True)
class Decision:
    """The recorded choice for a whole model. target and reached: unit -> fraction of the dense encoder."""

    layers: tuple[LayerDecision, ...]
    align: int
    target: dict[str, float]
    reached: dict[str, float]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Decision:
        """Read what `save` wrote; ValueError that names the file and the place if it is anything else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("format") != FORMAT:
                raise ValueError(f"format is {data.get('format')!r}, {FORMAT} is needed")
            layers = tuple(
                LayerDecision(_kept(layer, "heads", i), _kept(layer, "ffn", i)) for i, layer in _layers(data)
            )
            return cls(layers, int(data["align"]), dict(data["target"]), dict(data["reached"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no decision file: {error!r}") from error

    def values(self, gates: Gates) -> tuple[list[Tensor], list[Tensor]]:
        """Gate values of every head and FFN unit of the source model: what is not kept is 0. For
        `Gates.fix`."""
        heads = [_spread(d.heads, s.num_heads) for d, s in zip(self.layers, gates.shape.layers, strict=True)]
        ffn = [_spread(d.ffn, s.ffn_width) for d, s in zip(self.layers, gates.shape.layers, strict=True)]
        return heads, ffn


def _layers(data: dict[str, Any]) -> enumerate[dict[str, Any]]:
    return enumerate(data["layers"])


def _kept(layer: dict[str, Any], kind: str, number: int) -> Kept:
    try:
        return Kept(
            tuple(int(i) for i in layer[kind]["indices"]), tuple(float(v) for v in layer[kind]["values"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"layer {number}, {kind}: {error}") from error


def _spread(kept: Kept, size: int) -> Tensor:
    values = torch.zeros(size)
    values[list(kept.indices)] = torch.tensor(kept.values)
    return values


def round_up(width: int, align: int, limit: int) -> int:
    """The next multiple of `align` (0 stays 0), at most `limit`."""
    return min(-(-width // align) * align, limit)


def decide(gates: Gates, budget: Budget, target: Target, align: int = 8) -> Decision:
    """The largest choice within the target: all gates above one threshold on log_alpha, FFN widths rounded
    up.

    Heads and FFN units compete on one scale, because the Lagrangian charged each for its own cost.
    ValueError where not even the smallest choice meets the target.
    """
    budget.check_reachable(target)
    heads = [h.detach().float().cpu() for h in gates.heads]
    ffn = [f.detach().float().cpu() for f in gates.ffn]
    thresholds = torch.cat([*heads, *ffn, torch.tensor([torch.inf])]).unique()
    # The cost falls as the threshold rises: the first threshold that fits keeps the most.
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        fits = budget.fraction(_shapes(heads, ffn, float(thresholds[middle]), align)) <= target.fraction
        low, high = (low, middle) if fits else (middle + 1, high)
    shapes = _shapes(heads, ffn, float(thresholds[low]), align)
    layers = tuple(
        LayerDecision(_best(h, shape.num_heads), _best(f, shape.ffn_width))
        for h, f, shape in zip(heads, ffn, shapes, strict=True)
    )
    return Decision(layers, align, {budget.unit: target.fraction}, {budget.unit: budget.fraction(shapes)})


def _shapes(heads: Sequence[Tensor], ffn: Sequence[Tensor], threshold: float, align: int) -> list[LayerShape]:
    return [
        LayerShape(int((h >= threshold).sum()), round_up(int((f >= threshold).sum()), align, f.numel()))
        for h, f in zip(heads, ffn, strict=True)
    ]


def _best(log_alpha: Tensor, count: int) -> Kept:
    """The `count` gates with the largest log_alpha; of equals the first, so that the choice is always the
    same."""
    order = torch.sort(log_alpha, descending=True, stable=True).indices[:count]
    indices = order.sort().values
    values = deterministic_gate(log_alpha[indices])
    return Kept(tuple(indices.tolist()), tuple(values.tolist()))
