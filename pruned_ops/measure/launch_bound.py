"""LaunchBound: whether a batch's time goes into starting work rather than into the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pruned_ops.measure.layer_times import empty_config
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.heads import head_name, pruned_class
from pruned_ops.models.stock import model_shape
from pruned_ops.shape import LayerShape

HALF, TWIN = "half of each batch", "tiny twin"
# Hidden size, head and FFN width of the twin: arithmetic that takes next to no time.
_TINY = 16
# A size is called launch-bound where more than this share of its time does not depend on the work.
_BOUND = 0.5


@dataclass(frozen=True)
class LaunchBound:
    """Two tests of one optimised model on one workload, each as a share of the whole batch's MACs and of its
    time (median over rounds).

    half: half of each batch's sequences (of its tokens, where there is one sequence). twin: the whole batch
    through a model of as many layers and ops, with one head and a width of 16 in each.
    """

    half_macs: float
    half_time: float
    twin_macs: float
    twin_time: float

    @classmethod
    def of(cls, model: Any, workload: Workload, whole: Timing, half: Timing, twin: Timing) -> LaunchBound:
        """The two tests, out of the times of the whole batch, of `half_of` it and of the `tiny_twin`."""
        shape, tiny = model_shape(model), tiny_twin(model).config.shape
        batches = [list(batch) for batch in workload.batches]
        macs = max(1, sum(map(shape.macs, batches)))
        return cls(
            sum(shape.macs(half_lengths(batch)) for batch in batches) / macs,
            whole.speedup_over(half),
            sum(map(tiny.macs, batches)) / macs,
            whole.speedup_over(twin),
        )

    @property
    def fixed_share(self) -> float:
        """The share of the time that would be left without any work, on the line through half and whole."""
        return (self.half_time - self.half_macs) / (1 - self.half_macs) if self.half_macs < 1 else 1.0

    @property
    def holds(self) -> bool:
        """Whether both tests say so: one alone may have another cause (idle threads; weights to be read)."""
        return self.fixed_share > _BOUND and self.twin_time > _BOUND

    @property
    def sentence(self) -> str:
        """Both tests, in words."""
        return (
            f"{'' if self.holds else 'not '}launch-bound at this size: half of each batch "
            f"({100 * self.half_macs:.0f}% of the MACs) takes {100 * self.half_time:.0f}% of the time, and "
            f"as many layers with one head and a width of {_TINY} ({100 * self.twin_macs:.1f}% of the MACs) "
            f"take {100 * self.twin_time:.0f}%"
        )


def half_lengths(lengths: list[int]) -> list[int]:
    """The lengths that `half_of` leaves of a batch of these lengths."""
    if len(lengths) > 1:
        return lengths[: len(lengths) // 2]
    return [max(1, lengths[0] // 2)]


def half_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first half of a batch's sequences; the first half of its tokens where there is one sequence."""
    rows = len(batch["input_ids"])
    if rows > 1:
        return {name: tensor[: rows // 2] for name, tensor in batch.items()}
    tokens = max(1, int(batch["attention_mask"].sum()) // 2)
    return {name: tensor[:, :tokens] for name, tensor in batch.items()}


def tiny_twin(model: Any) -> Any:
    """A random model that launches what `model` launches, on matrices so small that only launching takes
    time."""
    config, _ = empty_config(model.config)
    shapes = [
        LayerShape(min(1, layer.num_heads), min(_TINY, layer.ffn_width))
        for layer in model_shape(model).layers
    ]
    sizes = {"hidden_size": _TINY, "head_dim": _TINY, "num_attention_heads": 1, "intermediate_size": _TINY,
             "pooler_size": None, "head_indices": None}  # fmt: skip
    twin = type(config)(**{**config.to_dict(), **sizes, "layer_shapes": shapes})
    return pruned_class(head_name(type(model).__name__), config.model_type)(twin).to(model.device).eval()
