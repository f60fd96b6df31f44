"""Losses that draw a student towards its teacher: answer distributions, and hidden states layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Distillation:
    """Weights of the loss parts. `temperature` softens the answer distributions (Hinton et al. 2015).

    task: cross-entropy on the gold answer. logits: KL divergence of start and end distributions, times
    temperature^2.
    hidden: mean squared difference of the hidden states after every layer (the paper's students keep
    hidden_size and depth, so layer i is matched with layer i and no projection is needed).
    """

    task: float = 0.3
    logits: float = 1.0
    hidden: float = 10.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if min(self.task, self.logits, self.hidden) < 0 or self.task + self.logits + self.hidden == 0:
            raise ValueError("the weights of the losses must not be negative, nor all zero")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be positive")

    @property
    def needs_teacher(self) -> bool:
        return self.logits > 0 or self.hidden > 0


def logits_loss(
    student: Any,
    teacher: Any,
    real: Tensor,
    temperature: float,
) -> Tensor:
    """Mean over start and end of KL(teacher || student), times temperature^2. Logits and `real` (batch,
    seqlen)."""
    total = torch.zeros((), device=real.device)
    for s, t in ((student.start_logits, teacher.start_logits), (student.end_logits, teacher.end_logits)):
        lowest = torch.finfo(s.dtype).min
        student_log = F.log_softmax((s / temperature).masked_fill(~real, lowest), -1)
        teacher_log = F.log_softmax((t / temperature).masked_fill(~real, lowest), -1)
        divergence = (teacher_log.exp() * (teacher_log - student_log)).masked_fill(~real, 0.0)
        total = total + divergence.sum(-1).mean()
    return total / 2 * temperature**2


def hidden_loss(student: Any, teacher: Any, real: Tensor) -> Tensor:
    """Mean squared difference of the layers' outputs over real tokens: hidden states (batch, seqlen,
    hidden)."""
    pairs = list(zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True))
    weight = real[..., None].to(pairs[0][0].dtype)
    total = sum(((s - t).square() * weight).sum() for s, t in pairs)
    return total / (len(pairs) * weight.sum() * pairs[0][0].size(-1))
