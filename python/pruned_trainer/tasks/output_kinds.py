"""What a model's outputs are: the kinds that can be compared with a teacher's and with labels, how they are
recognised, and how far two models' outputs of one kind are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.models.inputs import pool_tokens

# The label of a token that no loss counts, as transformers has it.
IGNORED = -100
# The fields that hold an embedding of each text, under the names that libraries give them.
_EMBEDDINGS = (
    "sentence_embedding", "sentence_embeddings", "embedding", "embeddings", "text_embeds", "sparse_embedding",
)  # fmt: skip
# A config's problem_type where each logit is a label of its own, in transformers' words.
MULTI_LABEL: Final = "multi_label_classification"


class OutputKind(StrEnum):
    """What a model says of a batch.

    spans: start and end logits (batch, seqlen), and answer types (batch, types) where the model has them.
    classes: logits (batch, classes), of which one is right. labels: logits (batch, labels), each on its own.
    scores: numbers (batch, n) of a regression or a ranking. tokens: logits (batch, seqlen, labels).
    embeddings: (batch, width). sparse: activations (batch, vocabulary), most of them 0.
    """

    SPANS = "spans"
    CLASSES = "classes"
    LABELS = "labels"
    SCORES = "scores"
    TOKENS = "tokens"
    EMBEDDINGS = "embeddings"
    SPARSE = "sparse"


# The kinds whose divergence is of distributions, which a temperature softens.
DISTRIBUTIONS = (OutputKind.SPANS, OutputKind.CLASSES, OutputKind.LABELS, OutputKind.TOKENS)


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch: its kind, and the tensors by the names that every model of the kind
    has."""

    kind: OutputKind
    values: Mapping[str, Tensor]

    @property
    def only(self) -> Tensor:
        """The one tensor of a kind that has one (all but spans)."""
        (value,) = self.values.values()
        return value

    def detached(self) -> Outputs:
        """The same, without gradients."""
        return Outputs(self.kind, {name: value.detach() for name, value in self.values.items()})


def comparable_outputs(outputs: Any, config: Any, mask: Tensor | None, pooling: str = "mean") -> Outputs:
    """What these outputs say, by the names in them and by the model's config.

    outputs: a mapping of names to tensors, such as transformers' ModelOutput, or the logits alone. mask:
    (batch, seqlen), not 0 at tokens that are no padding; a bare encoder's outputs need it. pooling: how a
    bare encoder's last hidden states become an embedding, see `pool_tokens`. Errors: ValueError where nothing
    is recognised.
    """
    fields = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"the model returns a {type(outputs).__name__}: outputs with names are needed to compare them "
            "with a teacher's (return_dict=True, or a dictionary)"
        )
    if "start_logits" in fields and "end_logits" in fields:
        names = ("start_logits", "end_logits", "answer_type_logits")
        tensors = {name: fields[name] for name in names if fields.get(name) is not None}
        return Outputs(OutputKind.SPANS, tensors)
    for name in _EMBEDDINGS:
        if isinstance(fields.get(name), Tensor):
            return _embedding(fields[name], config)
    for name in ("logits", "scores"):  # the second is sentence-transformers' of pairs
        if isinstance(fields.get(name), Tensor):
            return _logits(fields[name], config)
    if isinstance(fields.get("last_hidden_state"), Tensor):
        if mask is None and pooling == "mean":
            raise ValueError("the mean over the real tokens needs an attention_mask")
        return _embedding(pool_tokens(fields["last_hidden_state"], mask, pooling), config)
    raise ValueError(
        f"nothing in the model's outputs ({', '.join(fields) or 'none'}) can be compared with a teacher's: "
        f"logits, start_logits and end_logits, last_hidden_state or one of {', '.join(_EMBEDDINGS)} is needed"
    )


def _embedding(values: Tensor, config: Any) -> Outputs:
    values = values.to_dense() if values.is_sparse else values
    is_sparse = values.size(-1) == getattr(config, "vocab_size", None)
    return Outputs(OutputKind.SPARSE if is_sparse else OutputKind.EMBEDDINGS, {"embedding": values})


def _logits(logits: Tensor, config: Any) -> Outputs:
    if logits.dim() == 1:
        logits = logits[:, None]
    if logits.dim() == 3:
        return Outputs(OutputKind.TOKENS, {"logits": logits})
    if logits.dim() != 2:
        raise ValueError(f"the model's logits have shape {tuple(logits.shape)}: (batch, classes) is needed")
    problem = getattr(config, "problem_type", None)
    kind = OutputKind.CLASSES
    if logits.size(1) == 1 or problem == "regression":
        kind = OutputKind.SCORES
    elif problem == MULTI_LABEL:
        kind = OutputKind.LABELS
    return Outputs(kind, {"logits": logits})


def check_comparable(student: Outputs, teacher: Outputs) -> None:
    """ValueError where the teacher says something of another kind, or of other sizes, than the student."""
    if student.kind is not teacher.kind:
        raise ValueError(
            f"the teacher gives {teacher.kind.value}, and the student {student.kind.value}: a teacher with "
            "the student's head is needed"
        )
    for name, values in teacher.values.items():
        student_values = student.values.get(name)
        if student_values is None or student_values.shape[1:] != values.shape[1:]:
            size = "none" if student_values is None else student_values.size(-1)
            raise ValueError(
                f"the teacher's {name} have a width of {values.size(-1)}, and the student's of {size}: a "
                "teacher with the student's head is needed"
            )


# -- from a teacher ----------------------------------------------------------------------------------------


def divergences(student: Outputs, teacher: Outputs, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the student is from the teacher, for each example: (batch,), 0 for equals.

    spans, classes, labels, tokens: KL(teacher || student) of the distributions softened by the temperature,
    times temperature^2 (Hinton et al. 2015); of spans the mean of start, end and answer type; of labels the
    mean over the labels, each with its own two sides; of tokens the mean over the real ones. scores: the mean
    squared difference. embeddings: 1 - cosine, plus the squared distance over the teacher's squared norm.
    sparse: that distance alone. mask: (batch, seqlen), not 0 at tokens that are no padding.
    """
    return _DIVERGENCES[student.kind](student, teacher, mask.bool(), temperature)


def _of_spans(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    losses = []
    for name, target in teacher.values.items():
        everything = real if name != "answer_type_logits" else torch.ones_like(target, dtype=torch.bool)
        losses.append(_kl(student.values[name], target, everything, temperature))
    return torch.stack(losses).mean(0) * temperature**2


def _of_classes(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    everything = torch.ones_like(teacher.only, dtype=torch.bool)
    return _kl(student.only, teacher.only, everything, temperature) * temperature**2


def _of_labels(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    return _two_sided(student.only, teacher.only, temperature).mean(-1) * temperature**2


def _of_tokens(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    if teacher.only.size(-1) == 1:
        token_losses = _two_sided(student.only, teacher.only, temperature)[..., 0]
    else:
        everything = torch.ones_like(teacher.only, dtype=torch.bool)
        token_losses = _kl(student.only, teacher.only, everything, temperature)
    return token_losses.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1) * temperature**2


def _of_scores(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    return (student.only - teacher.only).square().mean(-1)


def _of_embeddings(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    away = 1 - F.cosine_similarity(student.only, teacher.only, dim=-1)
    return away + _relative(student.only, teacher.only)


def _of_activations(student: Outputs, teacher: Outputs, real: Tensor, temperature: float) -> Tensor:
    return _relative(student.only, teacher.only)


def _relative(values: Tensor, target: Tensor) -> Tensor:
    """The squared distance over the target's squared norm, so that neither width nor scale counts."""
    smallest = torch.finfo(target.dtype).tiny
    return (values - target).square().sum(-1) / target.square().sum(-1).clamp(min=smallest)


def _kl(student: Tensor, teacher: Tensor, real: Tensor, temperature: float) -> Tensor:
    """The KL divergence over the last dimension of two softened distributions over the `real` classes."""
    lowest = torch.finfo(student.dtype).min
    student_log = F.log_softmax((student / temperature).masked_fill(~real, lowest), -1)
    teacher_log = F.log_softmax((teacher / temperature).masked_fill(~real, lowest), -1)
    return (teacher_log.exp() * (teacher_log - student_log)).masked_fill(~real, 0.0).sum(-1)


def _two_sided(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The KL divergence of the yes and no that each logit stands for, elementwise."""
    student, teacher = student / temperature, teacher / temperature
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return yes + no


_DIVERGENCES: dict[OutputKind, Callable[[Outputs, Outputs, Tensor, float], Tensor]] = {
    OutputKind.SPANS: _of_spans,
    OutputKind.CLASSES: _of_classes,
    OutputKind.LABELS: _of_labels,
    OutputKind.SCORES: _of_scores,
    OutputKind.TOKENS: _of_tokens,
    OutputKind.EMBEDDINGS: _of_embeddings,
    OutputKind.SPARSE: _of_activations,
}


def margin_divergence(student: Outputs, teacher: Outputs, groups: Tensor) -> Tensor:
    """The mean squared difference of the margins between scores of one query (Hofstätter et al. 2020), a
    scalar; 0 where no two rows share a query.

    groups: (batch,), equal for the rows of one query.
    """
    same = (groups[:, None] == groups[None, :]).triu(1)
    if not bool(same.any()):
        return student.only.new_zeros(())
    student_margins, teacher_margins = (
        score[:, None, :] - score[None, :, :] for score in (student.only, teacher.only.to(student.only))
    )
    return (student_margins - teacher_margins).square().mean(-1)[same].mean()


def drawn_losses(outputs: Outputs, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each example a number whose gradient, squared and averaged over the draws, is the curvature of
    `divergences` from this model to itself: (batch,).

    Where outputs are distributions it is the cross-entropy of outcomes drawn from them, so that the curvature
    is Fisher's information; where they are numbers it is a product with drawn normal numbers. It needs no
    labels. mask: (batch, seqlen), not 0 at tokens that are no padding. generator: on the CPU.
    """

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    def drawn(logits: Tensor) -> Tensor:
        chances = logits.detach().float().softmax(-1).flatten(0, -2).cpu()
        outcomes = torch.multinomial(chances, 1, generator=generator).view(logits.shape[:-1])
        return F.cross_entropy(
            logits.flatten(0, -2), outcomes.flatten().to(logits.device), reduction="none"
        ).view(outcomes.shape)

    def sides(logits: Tensor) -> Tensor:
        chances = logits.detach().float().sigmoid().cpu()
        outcomes = torch.bernoulli(chances, generator=generator).to(logits)
        return F.binary_cross_entropy_with_logits(logits, outcomes, reduction="none")

    real = mask.bool()
    if outputs.kind is OutputKind.SPANS:
        lowest = torch.finfo(outputs.values["start_logits"].dtype).min
        losses = [
            drawn(logits if name == "answer_type_logits" else logits.masked_fill(~real, lowest))
            for name, logits in outputs.values.items()
        ]
        return torch.stack(losses).sum(0) / len(losses) ** 0.5
    values = outputs.only
    if outputs.kind is OutputKind.CLASSES:
        return drawn(values)
    if outputs.kind is OutputKind.LABELS:
        return sides(values).sum(-1) / values.size(-1) ** 0.5
    if outputs.kind is OutputKind.TOKENS:
        each_token = sides(values)[..., 0] if values.size(-1) == 1 else drawn(values)
        return each_token.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1).sqrt()
    if outputs.kind is OutputKind.SCORES:
        return (values * normal(values)).sum(-1) * (2 / values.size(-1)) ** 0.5
    fixed = values.detach()
    norm = fixed.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    direction = normal(values) * 2**0.5
    if outputs.kind is OutputKind.EMBEDDINGS:  # the cosine does not see what lies along the embedding
        across, unit = normal(values), fixed / norm
        direction = direction + across - (across * unit).sum(-1, keepdim=True) * unit
    return (values * direction / norm).sum(-1)


# -- from labels -------------------------------------------------------------------------------------------


def label_losses(student: Outputs, batch: Mapping[str, Tensor], config: Any = None) -> Tensor:
    """The loss of each example on its labels: (batch,).

    spans: cross-entropy, averaged over start, end and answer type. classes, tokens: cross-entropy, of tokens
    the mean over those that have a label. labels: binary cross-entropy. scores: squared difference, or binary
    cross-entropy where the model's config says that they are logits of labels, as a reranker's does. Errors:
    ValueError for embeddings, whose loss is between texts.
    """
    if student.kind is OutputKind.SPANS:
        names = {"start_logits": "start_positions", "end_logits": "end_positions"}
        if "answer_types" in batch:
            names["answer_type_logits"] = "answer_types"
        losses = [
            F.cross_entropy(student.values[logits], batch[label], reduction="none")
            for logits, label in names.items()
        ]
        return torch.stack(losses).mean(0)
    if student.kind in (OutputKind.EMBEDDINGS, OutputKind.SPARSE):
        raise ValueError("embeddings of single texts have no labels to be scored by")
    labels, logits = batch["labels"], student.only
    if student.kind is OutputKind.TOKENS:
        counted = labels != IGNORED
        token_losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return token_losses.sum(1) / counted.sum(1).clamp(min=1)
    if student.kind is OutputKind.CLASSES:
        return F.cross_entropy(logits, labels.flatten(), reduction="none")
    targets = labels.reshape(logits.shape).to(logits)
    is_of_labels = getattr(config, "problem_type", None) == MULTI_LABEL
    if student.kind is OutputKind.LABELS or is_of_labels:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    return (logits - targets).square().mean(-1)
