"""Decisions: which heads, FFN units and hidden dimensions stay, with their gate values, after alignment; how
they are made of scores, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruned_ops import LayerShape, ModelShape
from pruned_ops.files import read_json, shown, write_json
from pruned_ops.shape import MAX_LAYERS, MAX_WIDTH, checked_int
from pruned_trainer.pruning.budget import Budget
from pruned_trainer.pruning.gates import PerGate, Scores
from pruned_trainer.pruning.options import COMPENSATIONS, PARTS, Target

FORMAT = 1
# A hidden dimension that stays counts in every LayerNorm's statistics, and a gate of 0 would take it out of
# them. So a dimension that stays although its gate was closed (to fill an alignment, or a target) is opened
# this far.
LEAST_HIDDEN_VALUE = 0.01


@dataclass(frozen=True)
class Kept:
    """The gates of one kind that stay in one layer: rising indices into the source model, and the value of
    each gate."""

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
    """The recorded choice for a whole model.

    hidden: the hidden dimensions that stay; None where there were no gates on them, so that all stay as they
    are. target: {unit: value} of the target, empty where a threshold decided. reached: {unit: value} of this
    choice, by the budget that decided. compensation: how the narrow model was compensated for each part;
    empty where it was not asked for.
    """

    layers: tuple[LayerDecision, ...]
    align: int
    target: dict[str, float]
    reached: dict[str, float]
    hidden: Kept | None = None
    compensation: dict[str, str] = field(default_factory=dict)

    def shape(self, source: ModelShape) -> ModelShape:
        """The shape that is left of a model of shape `source`."""
        hidden = source.hidden_size if self.hidden is None else len(self.hidden.indices)
        return replace(source, layers=tuple(layer.shape for layer in self.layers), hidden_size=hidden)

    def save(self, path: Path | str) -> None:
        """Write the decision as JSON; the file is there whole, or as it was before."""
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> Decision:
        """Read a file that `save` wrote; ValueError that names the file and the place for any other, and
        FileNotFoundError where there is none."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; the decision.json of a pruning run is needed")
        data = read_json(path, "decision file")
        try:
            return _parse(data)
        except ValueError as error:
            raise ValueError(f"{path} is no decision file: {error}") from None

    def within(self, earlier: Decision) -> Decision:
        """The same choice about the model that `earlier` left, by indices into what stayed there; both are on
        heads and FFN units of one source model. Errors: ValueError where `earlier` removed what this keeps.
        """
        layers = tuple(
            LayerDecision(_within(now.heads, before.heads), _within(now.ffn, before.ffn))
            for now, before in zip(self.layers, earlier.layers, strict=True)
        )
        return replace(self, layers=layers)

    def spread(self, numbers: PerGate, shape: ModelShape, missing: float) -> PerGate:
        """Numbers for the heads and FFN units that stay, at their places among those of the source model,
        whose shape this is; `missing` for the others. The numbers of the hidden size are left as they are."""
        spread = PerGate.full(shape, missing).replace("hidden", numbers)
        for part in ("heads", "ffn"):
            for place, layer, kept in zip(spread.of(part), self.layers, numbers.of(part), strict=True):
                place[list(getattr(layer, part).indices)] = kept
        return spread

    def values(self, shape: ModelShape) -> PerGate:
        """The gate values for `Gates.fix` on the source model, whose shape this is; gates that do not stay
        are 0."""
        return PerGate(
            [_spread(d.heads, s.num_heads) for d, s in zip(self.layers, shape.layers, strict=True)],
            [_spread(d.ffn, s.ffn_width) for d, s in zip(self.layers, shape.layers, strict=True)],
            torch.ones(shape.hidden_size) if self.hidden is None else _spread(self.hidden, shape.hidden_size),
        )


def _parse(data: object) -> Decision:
    """The decision of a parsed file; ValueError that names the place for anything else."""
    if not isinstance(data, Mapping):
        raise ValueError(f"an object is needed, not {type(data).__name__}")
    if data.get("format") != FORMAT:
        raise ValueError(f"format is {shown(data.get('format'))}, {FORMAT} is needed")
    listed = data.get("layers")
    if not isinstance(listed, list) or len(listed) > MAX_LAYERS:
        raise ValueError(f"layers is {shown(listed)}: a list of at most {MAX_LAYERS} layers is needed")
    layers = tuple(
        LayerDecision(_kept(layer, "heads", f"layer {i}"), _kept(layer, "ffn", f"layer {i}"))
        for i, layer in enumerate(listed)
    )
    hidden = _kept(data, "hidden", "model") if data.get("hidden") is not None else None
    align = checked_int("align", data.get("align"), 1, MAX_WIDTH)
    target, reached = _costs(data, "target"), _costs(data, "reached")
    return Decision(layers, align, target, reached, hidden, _compensation(data.get("compensation", {})))


def _kept(holder: object, kind: str, where: str) -> Kept:
    kept = holder.get(kind) if isinstance(holder, Mapping) else None
    indices, values = (
        kept.get(name) if isinstance(kept, Mapping) else None for name in ("indices", "values")
    )
    if not isinstance(indices, list) or not isinstance(values, list):
        raise ValueError(f"{where}, {kind}: an object with lists of indices and values is needed")
    try:
        for number, index in enumerate(indices):
            checked_int(f"index {number}", index, 0, MAX_WIDTH - 1)
        return Kept(tuple(indices), tuple(_number(f"value {i}", value) for i, value in enumerate(values)))
    except ValueError as error:
        raise ValueError(f"{where}, {kind}: {error}") from None


def _costs(data: Mapping[str, Any], name: str) -> dict[str, float]:
    """The numbers by unit under this name."""
    costs = data.get(name)
    if not isinstance(costs, dict):
        raise ValueError(f"{name} is {shown(costs)}: an object of numbers is needed")
    return {unit: _number(f"{name}, {unit}", value) for unit, value in costs.items()}


def _compensation(methods: object) -> dict[str, str]:
    """The methods by part; earlier versions wrote none."""
    if not isinstance(methods, dict) or not all(
        part in PARTS and method in COMPENSATIONS for part, method in methods.items()
    ):
        raise ValueError(f"compensation is {shown(methods)}: parts with one of {COMPENSATIONS} are needed")
    return dict(methods)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {shown(value)}: a number is needed")
    return float(value)


def _within(now: Kept, before: Kept) -> Kept:
    """The gates `now` by their places among those of `before`."""
    places = {index: place for place, index in enumerate(before.indices)}
    if not places.keys() >= set(now.indices):
        raise ValueError("what an earlier decision removed cannot be kept")
    return Kept(tuple(places[index] for index in now.indices), now.values)


def _spread(kept: Kept, size: int) -> Tensor:
    values = torch.zeros(size)
    values[list(kept.indices)] = torch.tensor(kept.values)
    return values


def round_up(width: int, align: int, limit: int) -> int:
    """The next multiple of `align` (0 stays 0), at most `limit`."""
    return min(-(-width // align) * align, limit)


def decide(
    scores: Scores, budget: Budget, target: Target, align: int = 8, fraction: float | None = None
) -> Decision:
    """The largest choice within the target: all gates that rank at one threshold or above, with FFN widths
    and the hidden size rounded up.

    Heads, FFN units and hidden dimensions compete on one scale, because the Lagrangian charged each gate for
    its own cost, and the other scores are divided by it. fraction: the fraction of the dense cost to keep
    within, instead of the target's own, where measured time has shown that the two differ. Errors: ValueError
    where not even the smallest choice fits.
    """
    limit = budget.allowed_fraction(target) if fraction is None else fraction
    finite = [t[torch.isfinite(t)] for part in (scores.rank.heads, scores.rank.ffn) for t in part]
    finite.append(scores.rank.hidden[torch.isfinite(scores.rank.hidden)])
    thresholds = torch.cat([*finite, torch.tensor([torch.inf])]).unique()
    # The cost falls as the threshold rises: the first threshold that fits keeps the most.
    low, high = 0, len(thresholds) - 1
    if budget.fraction(_shape(scores, budget, float("inf"), align)) > limit:
        raise ValueError(f"not even the smallest choice meets {limit:.4f} of the dense cost")
    while low < high:
        middle = (low + high) // 2
        fits = budget.fraction(_shape(scores, budget, float(thresholds[middle]), align)) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    return decide_at(scores, budget, float(thresholds[low]), align, target)


def decide_at(
    scores: Scores, budget: Budget, threshold: float, align: int = 8, target: Target | None = None
) -> Decision:
    """The choice of all gates that rank at `threshold` or above, with FFN widths and the hidden size rounded
    up."""
    shape = _shape(scores, budget, threshold, align)
    layers = tuple(
        LayerDecision(
            _best(scores.rank.heads[i], scores.values.heads[i], layer.num_heads),
            _best(scores.rank.ffn[i], scores.values.ffn[i], layer.ffn_width),
        )
        for i, layer in enumerate(shape.layers)
    )
    hidden = None
    if bool(torch.isfinite(scores.rank.hidden).any()):
        values = scores.values.hidden.clamp(min=LEAST_HIDDEN_VALUE)
        hidden = _best(scores.rank.hidden, values, shape.hidden_size)
    asked = {target.unit: target.value} if target is not None else {}
    return Decision(layers, align, asked, budget.reached(shape, target), hidden)


def _shape(scores: Scores, budget: Budget, threshold: float, align: int) -> ModelShape:
    """The shape that is left by the gates that rank at `threshold` or above, rounded up."""

    def count(rank: Tensor) -> int:
        return int((rank >= threshold).sum())

    layers = tuple(
        LayerShape(count(h), round_up(count(f), align, f.numel()))
        for h, f in zip(scores.rank.heads, scores.rank.ffn, strict=True)
    )
    hidden = scores.rank.hidden
    # A model needs at least one hidden dimension.
    size = round_up(max(count(hidden), 1), align, hidden.numel())
    if size == budget.unmade_hidden:
        size = size - align if size > align else min(size + align, hidden.numel())
    return replace(budget.dense, layers=layers, hidden_size=size)


def _best(rank: Tensor, values: Tensor, count: int) -> Kept:
    """The `count` gates that rank highest; the first of equal ones, so that the choice is always the same."""
    order = torch.sort(rank, descending=True, stable=True).indices[:count]
    indices = order.sort().values
    return Kept(tuple(indices.tolist()), tuple(values[indices].tolist()))
