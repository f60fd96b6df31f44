"""What a student learns in a step: its task's loss, where there are labels, and what its teacher says of the
same batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.models.stock import choose_encoder, config_of, encoders_of
from pruned_trainer.tasks.output_kinds import (
    IGNORED,
    OutputKind,
    Outputs,
    check_comparable,
    comparable_outputs,
    divergences,
    margin_divergence,
)
from pruned_trainer.tasks.task import LABELS, accepted
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.distillation_losses import HiddenProjection, hidden_loss
from pruned_trainer.training.encoder_states import States, run_model
from pruned_trainer.training.teacher_cache import TeacherCache

# A loss of the caller's own: outputs and batch -> a scalar, or None where the batch has no labels.
TaskLoss = Callable[[Any, Mapping[str, Any]], Tensor | None]


class Teaching:
    """The losses of a student with a teacher, or without one.

    teacher: runs without gradients, in its own precision; None if the distillation needs none. kept_hidden:
    the teacher's hidden dimensions that the student still has, where it has fewer. cache: a teacher's start
    and end logits on disk. task_loss: takes the place of the `loss` in the student's outputs. labels: the
    entries of a batch that only the loss reads, beside LABELS. Errors: ValueError where the distillation
    needs a teacher and there is none, and as for `HiddenProjection.attach`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        distillation: Distillation,
        kept_hidden: Sequence[int] | None = None,
        cache: TeacherCache | None = None,
        task_loss: TaskLoss | None = None,
        labels: Collection[str] = (),
    ) -> None:
        if distillation.needs_teacher and teacher is None:
            raise ValueError("the distillation losses need a teacher")
        self.student, self.teacher, self.distillation = student, teacher, distillation
        self.cache, self.own_loss, self.labels = cache, task_loss, {*LABELS, *labels}
        self.projection: HiddenProjection | None = None
        if distillation.hidden > 0 and teacher is not None:
            self.projection = HiddenProjection.attach(student, teacher, distillation, kept_hidden)

    def without_labels(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch for a model that is not to compute a loss."""
        return {name: tensor for name, tensor in inputs.items() if name not in self.labels}

    def task_loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss on the labels times its weight; 0 where the batch has none."""
        loss = self.own_loss(outputs, inputs) if self.own_loss is not None else loss_of(outputs)
        if loss is None:
            return torch.zeros((), device=next(iter(inputs.values())).device)
        if self.own_loss is None and "labels" in inputs:
            # The mean over no token at all is NaN; 0 has a gradient of 0. The host does not wait for it.
            loss = torch.where(labels_nothing(inputs["labels"]), loss.nan_to_num(), loss)
        return loss * self.distillation.task

    def parts(
        self,
        outputs: Any,
        states: Sequence[States],
        inputs: Mapping[str, Tensor],
        numbers: Tensor | None = None,
        groups: Tensor | None = None,
        as_one: bool = False,
    ) -> dict[str, Tensor]:
        """What the teacher adds to the loss of a batch: scalars by the name of the weight.

        outputs, states: the student's for these inputs. numbers: (batch,), each example's in the cache.
        groups: (batch,), equal for the rows of one query. as_one: whether the models take their inputs as one
        dictionary.
        """
        weights = self.distillation
        if self.teacher is None or not weights.needs_teacher:
            return {}
        if "attention_mask" not in inputs:
            raise ValueError(
                f"the batch has no attention_mask (it has {', '.join(inputs)}): without it padding cannot be "
                "told from text"
            )
        mask, parts = inputs["attention_mask"], {}
        taught, teacher_states = self._taught(inputs, numbers, as_one)
        if weights.logits > 0:
            student_outputs = comparable_outputs(outputs, config_of(self.student), mask, weights.pooling)
            check_comparable(student_outputs, taught)
            loss = divergences(student_outputs, taught, mask, weights.temperature).mean()
            if groups is not None and student_outputs.kind is OutputKind.SCORES:
                loss = loss + margin_divergence(student_outputs, taught, groups)
            parts["logits"] = loss * weights.logits
        if weights.hidden > 0:
            parts["hidden"] = self.hidden_part(states, teacher_states)
        return parts

    def hidden_part(self, states: Sequence[States], teacher_states: Sequence[States]) -> Tensor:
        """The loss of the hidden states, the mean over the encoder's calls in this step, the last ones."""
        assert self.projection is not None
        states = states[len(states) - len(teacher_states) :]
        losses = [
            hidden_loss(student_call.hidden, teacher_call.hidden, student_call.mask.bool(), self.projection)
            for student_call, teacher_call in zip(states, teacher_states, strict=True)
        ]
        return torch.stack(losses).mean() * self.distillation.hidden

    def _taught(
        self, inputs: Mapping[str, Tensor], numbers: Tensor | None, as_one: bool
    ) -> tuple[Outputs, Sequence[States]]:
        """What the teacher says of this batch, from the cache where that has it and only logits are
        needed."""
        assert self.teacher is not None
        hidden, mask = self.distillation.hidden > 0, inputs["attention_mask"]
        if self.cache is not None and numbers is not None and not hidden:
            cached = self.cache.logits(numbers.cpu(), mask.size(1))
            if cached is not None:
                names = ("start_logits", "end_logits", "answer_type_logits")
                values = {name: logits.to(mask.device) for name, logits in zip(names, cached, strict=False)}
                return Outputs(OutputKind.SPANS, values), ()
        questions = self.without_labels(inputs)
        if not as_one:
            questions = accepted(self.teacher, questions)
        # The teacher runs as it was made, also where the student runs under autocast.
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
            outputs, states = run_model(self.teacher, questions, hidden, as_one=as_one)
        config = logits_config(self.teacher, self.student)
        taught = comparable_outputs(outputs, config, mask, self.distillation.pooling)
        if self.cache is not None and numbers is not None:
            start, end, *types = (logits.cpu() for logits in taught.values.values())
            self.cache.store(numbers.cpu(), start, end, mask.cpu(), *types)
        return taught, states


def choose_encoders(model: nn.Module, teacher: nn.Module | None, name: str) -> None:
    """Let the encoder of this name be the one that is meant in a model with several, and in a teacher with
    several. Errors: ValueError where there is none."""
    choose_encoder(model, name)
    if teacher is not None and len(encoders_of(teacher)) > 1:
        choose_encoder(teacher, name)


def other_meaning(teacher: nn.Module, student: nn.Module) -> str | None:
    """Why numbers of the teacher's mean something else than the student's at the same place, where their
    configs tell; None where they do not."""
    configs = [getattr(model, "config", None) for model in (teacher, student)]
    labels = [getattr(config, "id2label", None) or {} for config in configs]
    names = [[str(id2label[number]).casefold() for number in sorted(id2label)] for id2label in labels]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        return f"its labels are {', '.join(names[0])}, in another order than the student's"
    poolings = [getattr(config, "pooling", None) for config in configs]
    if None not in poolings and poolings[0] != poolings[1]:
        return f"its embeddings are pooled by {poolings[0]}, and the student's by {poolings[1]}"
    widths = [getattr(config, "hidden_size", None) for config in configs]
    if None not in poolings and widths[0] != widths[1]:
        return f"its embeddings have {widths[0]} numbers, and the student's {widths[1]}"
    return None


def logits_config(model: nn.Module, beside: nn.Module) -> Any:
    """The config that says what a model's logits are: its own, or where that does not say, that of the model
    `beside` it, which transformers may have told by the labels that it was given."""
    config = getattr(model, "config", None)
    return config_of(beside) if getattr(config, "problem_type", None) is None else config


def labels_nothing(labels: Tensor) -> Tensor:
    """Whether all labels of a batch are IGNORED, as a bool () where they are."""
    return (labels == IGNORED).all()


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs; None where they hold none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
        return outputs[0]
    return getattr(outputs, "loss", None)
