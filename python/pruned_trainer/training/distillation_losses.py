"""Losses that draw a student towards its teacher: answer distributions, and hidden states layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_trainer.training.distillation import Distillation

_NAME = "distillation_projection"


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch: logits (batch, seqlen), hidden states (batch, seqlen, hidden), and
    answer type logits (batch, types) where the task has them."""

    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    answer_type_logits: Tensor | None = None


class HiddenProjection(nn.Module):
    """The pairs of layers whose hidden states are compared, and the matrix (if any) that the student's hidden
    states pass through first.

    `attach` makes it a submodule of the student, so that it trains and is saved with it; `detach` removes it.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], sizes: tuple[int, int] | None) -> None:
        """sizes: (student's, teacher's) hidden size; None for a comparison without a matrix."""
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
    ) -> HiddenProjection:
        """Make the projection from `model` to `teacher`, and put it on the model if it has a matrix.

        kept_hidden: the teacher's dimensions that the student's dimensions stand for; the first ones by
        default. Errors: ValueError as for `Distillation.layer_pairs`.
        """
        student_config: Any = model.config
        teacher_config: Any = teacher.config
        pairs = distillation.layer_pairs(student_config.num_hidden_layers, teacher_config.num_hidden_layers)
        sizes = student_config.hidden_size, teacher_config.hidden_size
        needs_matrix = distillation.projection or sizes[0] != sizes[1]
        projection = cls(pairs, sizes if needs_matrix else None)
        if projection.matrix is not None:
            if kept_hidden is not None:
                projection.matrix.data = torch.eye(sizes[1])[:, list(kept_hidden)]
            model.add_module(_NAME, projection.to(next(model.parameters()).device))
        return projection

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`."""
        if _NAME in model._modules:
            del model._modules[_NAME]

    def forward(self, x: Tensor) -> Tensor:
        return x if self.matrix is None else F.linear(x, self.matrix)


def logits_loss(student: Any, teacher: Any, real: Tensor, temperature: float) -> Tensor:
    """The KL divergence of the student from the teacher, KL(teacher || student), times temperature^2,
    averaged over start and end (and answer type, where the teacher has one).

    student, teacher: outputs with start and end logits (batch, seqlen). real: (batch, seqlen), True at tokens
    that are not padding.
    """
    pairs = [(student.start_logits, teacher.start_logits), (student.end_logits, teacher.end_logits)]
    divergences = [_divergence(s, t, real, temperature) for s, t in pairs]
    types = getattr(teacher, "answer_type_logits", None)  # a stock model's output does not know the name
    if types is not None:
        everything = torch.ones_like(types, dtype=torch.bool)
        divergences.append(_divergence(student.answer_type_logits, types, everything, temperature))
    return torch.stack(divergences).mean() * temperature**2


def _divergence(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the KL divergence of two softened distributions over the `real` classes."""
    lowest = torch.finfo(student.dtype).min
    student_log = F.log_softmax((student / temperature).masked_fill(~real, lowest), -1)
    teacher_log = F.log_softmax((teacher / temperature).masked_fill(~real, lowest), -1)
    divergence = (teacher_log.exp() * (teacher_log - student_log)).masked_fill(~real, 0.0)
    return divergence.sum(-1).mean()


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor, projection: HiddenProjection
) -> Tensor:
    """Mean squared difference over the real tokens of each sequence, then over sequences and pairs of layers.

    student, teacher: hidden states (batch, seqlen, hidden), the embeddings' first. Each sequence is averaged
    by itself, so that the mean over a batch is the mean over its halves, on however many processes.
    """
    weight = real.to(student[0].dtype)
    weight = weight / (weight.sum(1, keepdim=True).clamp(min=1) * real.size(0))
    total = torch.zeros((), device=real.device)
    for student_layer, teacher_layer in projection.pairs:
        difference = (projection(student[student_layer]) - teacher[teacher_layer]).square().mean(-1)
        total = total + (difference * weight).sum()
    return total / len(projection.pairs)
