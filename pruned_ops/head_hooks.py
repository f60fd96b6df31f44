"""What `optimize` hangs on the heads of a model: labels refused, and no answer found at padding."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CamembertForQuestionAnswering,
    CamembertForSequenceClassification,
    CamembertForTokenClassification,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)

from pruned_ops.heads import PrunedBertForSequenceClassification, PrunedBertForTokenClassification
from pruned_ops.modeling import PrunedBertForQuestionAnswering
from pruned_ops.natural_questions import PrunedBertForNaturalQuestions

ANSWERERS = (
    BertForQuestionAnswering,
    RobertaForQuestionAnswering,
    XLMRobertaForQuestionAnswering,
    CamembertForQuestionAnswering,
    PrunedBertForQuestionAnswering,
    PrunedBertForNaturalQuestions,
)
# They read a text's label from position 0, whatever is there.
_READ_FIRST = (
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
    CamembertForSequenceClassification,
)
CLASSIFIERS = (
    *_READ_FIRST,
    BertForTokenClassification,
    RobertaForTokenClassification,
    XLMRobertaForTokenClassification,
    CamembertForTokenClassification,
    PrunedBertForSequenceClassification,
    PrunedBertForTokenClassification,
)
_LABELS = ("labels", "start_positions", "end_positions", "answer_types")

Names = tuple[str, ...]
Arguments = dict[str, Any]


def hook_head(module: nn.Module) -> tuple[RemovableHandle, ...]:
    """The hooks that this module needs once its encoder is packed; none for what is no head that we know."""
    # The names of its forward's arguments, asked for once: that took 3% of a small batch.
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if isinstance(module, ANSWERERS):
        answering = partial(_before_answering, names, _passes_on(module))
        return (
            module.register_forward_pre_hook(answering, with_kwargs=True),
            module.register_forward_hook(partial(_after_answering, names), with_kwargs=True),
        )
    if isinstance(module, CLASSIFIERS):
        classifying = partial(_before_classifying, names)
        return (module.register_forward_pre_hook(classifying, with_kwargs=True),)
    return ()


def _passes_on(module: nn.Module) -> bool:
    """Whether its forward takes `packed_batches`, by name or with whatever else it gives the encoder."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD or one.name == "packed_batches" for one in parameters)


def _head_takes_rows(module: Any) -> bool:
    """Whether what follows the encoder treats tokens one by one, so that it can do without the padding.
    A subclass's own forward may not."""
    head = module.qa_outputs
    return (
        any(type(module).forward is answerer.forward for answerer in ANSWERERS)
        and module.base_model.pooler is None
        and type(head) is nn.Linear
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def _before_answering(
    names: Names, passes_on: bool, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[tuple[Any, ...], Arguments]:
    """Refuse labels; ask the encoder for rows where the head takes them. passes_on: transformers 4's forwards
    give the encoder no argument of ours."""
    _refuse_labels(names, args, kwargs)
    takes_rows = passes_on and _head_takes_rows(module)
    return args, {**kwargs, "packed_batches": []} if takes_rows else kwargs


def _before_classifying(names: Names, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
    """Refuse labels, and padding where a stock model would read the label of a text: there is no state."""
    _refuse_labels(names, args, kwargs)
    mask = _given(names, args, kwargs).get("attention_mask")
    if isinstance(module, _READ_FIRST) and mask is not None and mask.dim() == 2 and mask.size(1):
        if bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                f"{type(module).__name__} reads position 0, where attention_mask says there is padding: an "
                "optimised model computes nothing there; pad on the right"
            )


def _given(names: Names, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    return dict(zip(names, args, strict=False)) | kwargs


def _refuse_labels(names: Names, args: tuple[Any, ...], kwargs: Arguments) -> None:
    given = _given(names, args, kwargs)
    for name in _LABELS:
        if given.get(name) is not None:
            raise ValueError(
                f"an optimised model does not take {name}: pruned_ops.restore(model) before computing losses"
            )


def _after_answering(
    names: Names, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any
) -> Any:
    """Logits at padded positions become the dtype's minimum, so that no answer is ever found there."""
    attention_mask = _given(names, args, kwargs).get("attention_mask")
    packed_batches = kwargs.get("packed_batches")
    start, end = (
        (output[0], output[1]) if isinstance(output, tuple) else (output.start_logits, output.end_logits)
    )
    lowest = torch.finfo(start.dtype).min
    if packed_batches:
        start, end = (packed_batches[0].unpack(logits[0], lowest) for logits in (start, end))
    elif attention_mask is not None:
        padded = (attention_mask == 0).to(start.device)
        start, end = (logits.masked_fill(padded, lowest) for logits in (start, end))
    if isinstance(output, tuple):
        return (start, end, *output[2:])
    output.start_logits, output.end_logits = start, end
    return output
