"""Losses that draw a student towards its teacher: answer distributions, and hidden states layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAME = "distillation_projection"


@dataclass(frozen=True)
class Distillation:
    """Weights of the loss parts. `temperature` softens the answer distributions (Hinton et al. 2015).

    task: cross-entropy on the gold answer. logits: KL divergence of start and end distributions, times
    temperature^2. hidden: mean squared difference of hidden states after the layers.
    projection: the student's hidden states pass through a learned matrix (the identity at first, thrown away
    afterwards) before they are compared. Where the hidden sizes differ there is one always.
    layers: pairs (student layer, teacher layer), counted from 1, whose outputs are compared; None: every
    layer with the teacher's of the same number.
    """

    task: float = 0.3
    logits: float = 1.0
    hidden: float = 10.0
    temperature: float = 2.0
    projection: bool = False
    layers: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if min(self.task, self.logits, self.hidden) < 0 or self.task + self.logits + self.hidden == 0:
            raise ValueError("the weights of the losses must not be negative, nor all zero")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be positive")
        if self.layers is not None and not self.layers:
            raise ValueError("no pair of layers is left to compare; hidden weight 0 switches that loss off")

    @property
    def needs_teacher(self) -> bool:
        return self.logits > 0 or self.hidden > 0

    @classmethod
    def none(cls) -> Distillation:
        """The task's own loss, without a teacher."""
        return cls(task=1.0, logits=0.0, hidden=0.0)


class Taught(NamedTuple):
    """What a teacher says of a batch: logits (batch, seqlen), hidden states (batch, seqlen, hidden), answer
    type logits (batch, types) where the task has them."""

    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    answer_type_logits: Tensor | None = None


class Projection(nn.Module):
    """Which layers are compared, and the matrix that a student's hidden states pass through before: `attach`
    makes it the student's submodule, so that it trains and is saved with it; `detach` takes it away."""

    def __init__(self, pairs: Sequence[tuple[int, int]], sizes: tuple[int, int] | None) -> None:
        super().__init__()
        self.pairs = list(pairs)
        self.matrix = nn.Parameter(torch.eye(sizes[1], sizes[0])) if sizes is not None else None

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        teacher: nn.Module,
        distillation: Distillation,
        kept_hidden: Sequence[int] | None = None,
    ) -> Projection:
        """ValueError as `pairs_of`. kept_hidden: the teacher's dimensions that the student's stand for; the
        first ones by default."""
        student: Any = model.config
        taught: Any = teacher.config
        pairs = cls.pairs_of(student, taught, distillation)
        sizes = student.hidden_size, taught.hidden_size
        needed = distillation.projection or sizes[0] != sizes[1]
        made = cls(pairs, sizes if needed else None)
        if needed:
            if kept_hidden is not None and made.matrix is not None:
                made.matrix.data = torch.eye(sizes[1])[:, list(kept_hidden)]
            model.add_module(_NAME, made.to(next(model.parameters()).device))
        return made

    @staticmethod
    def pairs_of(student: Any, teacher: Any, distillation: Distillation) -> list[tuple[int, int]]:
        """The pairs of layers that are compared, by the models' configs; ValueError for a layer map that
        names a layer which is not there, and where one is needed."""
        depths = student.num_hidden_layers, teacher.num_hidden_layers
        if distillation.layers is None and depths[0] != depths[1]:
            raise ValueError(
                f"the student has {depths[0]} layers, the teacher {depths[1]}: say which are compared "
                "(--distil-layers 1:2 2:4 ...), or give the hidden states no weight (--distil-hidden 0)"
            )
        pairs = distillation.layers or tuple((i + 1, i + 1) for i in range(depths[0]))
        for pair in pairs:
            if not (0 < pair[0] <= depths[0] and 0 < pair[1] <= depths[1]):
                raise ValueError(
                    f"layers {pair[0]}:{pair[1]} cannot be compared: the student has {depths[0]}, "
                    f"the teacher {depths[1]}"
                )
        return list(pairs)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`."""
        if _NAME in model._modules:
            del model._modules[_NAME]

    def forward(self, x: Tensor) -> Tensor:
        return x if self.matrix is None else F.linear(x, self.matrix)


def logits_loss(student: Any, teacher: Any, real: Tensor, temperature: float) -> Tensor:
    """Mean over start and end (and answer type, where there is one) of KL(teacher || student), times
    temperature^2. Start and end logits and `real` (batch, seqlen)."""
    pairs = [(student.start_logits, teacher.start_logits), (student.end_logits, teacher.end_logits)]
    parts = [_divergence(s, t, real, temperature) for s, t in pairs]
    types = getattr(teacher, "answer_type_logits", None)  # a stock model's output does not know the name
    if types is not None:
        everything = torch.ones_like(types, dtype=torch.bool)
        parts.append(_divergence(student.answer_type_logits, types, everything, temperature))
    return torch.stack(parts).mean() * temperature**2


def _divergence(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the KL divergence of two softened distributions over the `real` classes."""
    lowest = torch.finfo(student.dtype).min
    student_log = F.log_softmax((student / temperature).masked_fill(~real, lowest), -1)
    teacher_log = F.log_softmax((teacher / temperature).masked_fill(~real, lowest), -1)
    divergence = (teacher_log.exp() * (teacher_log - student_log)).masked_fill(~real, 0.0)
    return divergence.sum(-1).mean()


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor, projection: Projection
) -> Tensor:
    """Mean squared difference over the real tokens of each sequence, then over sequences and pairs of layers.

    student, teacher: hidden states (batch, seqlen, hidden), the embeddings' first. Sequence by sequence, so
    that the mean over a batch is the mean over its halves, on however many processes.
    """
    weight = real.to(student[0].dtype)
    weight = weight / (weight.sum(1, keepdim=True).clamp(min=1) * real.size(0))
    total = torch.zeros((), device=real.device)
    for mine, others in projection.pairs:
        difference = (projection(student[mine]) - teacher[others]).square().mean(-1)
        total = total + (difference * weight).sum()
    return total / len(projection.pairs)
