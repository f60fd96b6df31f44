"""The loss that draws a student's hidden states towards its teacher's, layer by layer; what their outputs say
is compared by `tasks.output_kinds.divergences`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruned_trainer.pruning.attach import holder_of
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.encoder_states import sizes_of

_NAME = "distillation_projection"


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
        student_config, teacher_config = sizes_of(model), sizes_of(teacher)
        pairs = distillation.layer_pairs(student_config.num_hidden_layers, teacher_config.num_hidden_layers)
        sizes = student_config.hidden_size, teacher_config.hidden_size
        needs_matrix = distillation.projection or sizes[0] != sizes[1]
        projection = cls(pairs, sizes if needs_matrix else None)
        if projection.matrix is not None:
            if kept_hidden is not None:
                projection.matrix.data = torch.eye(sizes[1])[:, list(kept_hidden)]
            holder_of(model).add_module(_NAME, projection.to(next(model.parameters()).device))
        return projection

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`."""
        for holder in (model, holder_of(model)):
            holder._modules.pop(_NAME, None)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.matrix is None else F.linear(x, self.matrix)


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
