"""What a student learns from its teacher: the weights of the losses, and the layers that are compared.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Distillation:
    """The weights of a training's losses, and how the student is compared with its teacher.

    task: weight of the task's own loss, where a batch has labels.
    logits: weight of the divergence between the outputs of student and teacher, which depends on their kind:
    the KL divergence of distributions (answers, classes, token labels) times temperature^2, the squared
    difference of scores, cosine and distance of embeddings; see `tasks.output_kinds.divergences`.
    hidden: weight of the mean squared difference of the hidden states after the layers.
    temperature: softens the distributions (Hinton et al. 2015).
    projection: whether the student's hidden states pass through a learned matrix before they are compared.
    The matrix starts as the identity and is thrown away after the training. Models of different hidden sizes
    always get one.
    layers: pairs (student layer, teacher layer), counted from 1, whose outputs are compared; None compares
    every layer with the teacher's layer of the same number.
    pooling: how the last hidden states of a bare encoder become the embedding that is compared: "mean" over
    the real tokens, or the first token's ("cls").
    """

    task: float = 0.3
    logits: float = 1.0
    hidden: float = 10.0
    temperature: float = 2.0
    projection: bool = False
    layers: tuple[tuple[int, int], ...] | None = None
    pooling: str = "mean"

    def __post_init__(self) -> None:
        for name in ("task", "logits", "hidden", "temperature"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}: a finite number is needed")
        if min(self.task, self.logits, self.hidden) < 0 or self.task + self.logits + self.hidden == 0:
            raise ValueError("the weights of the losses must not be negative, nor all zero")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be positive")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {self.pooling!r}; mean or cls is needed")
        if self.layers is not None and not self.layers:
            raise ValueError("no pair of layers is left to compare; hidden weight 0 switches that loss off")

    @classmethod
    def none(cls) -> Distillation:
        """The task's own loss, without a teacher."""
        return cls(task=1.0, logits=0.0, hidden=0.0)

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the losses compares the student with a teacher."""
        return self.logits > 0 or self.hidden > 0

    def layer_pairs(self, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
        """The pairs of layers that are compared in models with so many layers.

        Errors: ValueError where `layers` names a layer that one of the models lacks, and where the models
        have different numbers of layers and `layers` is None.
        """
        if self.layers is None and student_layers != teacher_layers:
            raise ValueError(
                f"the student has {student_layers} layers, the teacher {teacher_layers}: say which are "
                "compared (--distil-layers 1:2 2:4 ...), or give the hidden states no weight "
                "(--distil-hidden 0)"
            )
        pairs = self.layers or tuple((i + 1, i + 1) for i in range(student_layers))
        for student, teacher in pairs:
            if not (0 < student <= student_layers and 0 < teacher <= teacher_layers):
                raise ValueError(
                    f"layers {student}:{teacher} cannot be compared: the student has {student_layers}, "
                    f"the teacher {teacher_layers}"
                )
        return list(pairs)
