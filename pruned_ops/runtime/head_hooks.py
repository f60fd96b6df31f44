"""What `optimize` hangs on the heads of a model: labels refused, no answer found at padding, and logits
computed on packed rows where the head is one that we know (`packed_heads`)."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pruned_ops.layers.packing import lengths_of
from pruned_ops.runtime.packed_heads import (
    HeadRun,
    PackedHead,
    SpanAndTypeHead,
    SpanHead,
    TextHead,
    TokenHead,
    packed_head,
)

ANSWERERS: tuple[type[Any], ...] = (*SpanHead.classes, *SpanAndTypeHead.classes)
CLASSIFIERS: tuple[type[Any], ...] = (*TokenHead.classes, *TextHead.classes)
# They read a text's label from position 0, whatever is there.
_READ_FIRST = TextHead.stock_classes
_LABELS = ("labels", "start_positions", "end_positions", "answer_types")

Names = tuple[str, ...]
Arguments = dict[str, Any]


def hook_head(module: nn.Module) -> tuple[PackedHead | None, tuple[RemovableHandle, ...]]:
    """The head that is computed on packed rows for this module, if it is one that we know, and the hooks that
    it needs once its encoder is packed; none for what is no head that we know."""
    # The names of its forward's arguments, asked for once: that took 3% of a small batch.
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if not isinstance(module, (*ANSWERERS, *CLASSIFIERS)):
        return None, ()
    head = packed_head(module) if _passes_on(module) else None
    before = _before_answering if isinstance(module, ANSWERERS) else _before_classifying
    after = _after_answering if isinstance(module, ANSWERERS) else _after_classifying
    return head, (
        module.register_forward_pre_hook(partial(before, names, head), with_kwargs=True),
        module.register_forward_hook(partial(after, names), with_kwargs=True),
    )


def _passes_on(module: nn.Module) -> bool:
    """Whether its forward gives the encoder arguments of ours: transformers 4's do not."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def _asking(head: PackedHead | None, args: tuple[Any, ...], kwargs: Arguments) -> Any:
    """The arguments with what asks the encoder for the head's logits, where the head can be computed so."""
    return args, {**kwargs, "head_run": HeadRun(head)} if head is not None and head.computes() else kwargs


def _before_answering(
    names: Names, head: PackedHead | None, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[tuple[Any, ...], Arguments]:
    _refuse_labels(names, args, kwargs)
    return _asking(head, args, kwargs)


def _before_classifying(
    names: Names, head: PackedHead | None, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[tuple[Any, ...], Arguments]:
    """Refuse labels, and padding where a stock model would read the label of a text: there is no state."""
    _refuse_labels(names, args, kwargs)
    mask = _given(names, args, kwargs).get("attention_mask")
    if isinstance(module, _READ_FIRST) and mask is not None and mask.dim() == 2 and mask.size(1):
        # Where the lengths are known it is padded on the right, and a GPU need not be waited for.
        if lengths_of(mask) is None and bool(((mask[:, 0] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                f"{type(module).__name__} reads position 0, where attention_mask says there is padding: an "
                "optimised model computes nothing there; pad on the right"
            )
    return _asking(head, args, kwargs)


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
    head_run = kwargs.get("head_run")
    if head_run is not None:
        return _with_fields(output, head_run)
    attention_mask = _given(names, args, kwargs).get("attention_mask")
    if attention_mask is None:
        return output
    start, end = output[:2] if isinstance(output, tuple) else (output.start_logits, output.end_logits)
    padded = (attention_mask == 0).to(start.device)
    start, end = (logits.masked_fill(padded, torch.finfo(start.dtype).min) for logits in (start, end))
    if isinstance(output, tuple):
        return (start, end, *output[2:])
    output.start_logits, output.end_logits = start, end
    return output


def _after_classifying(
    names: Names, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any
) -> Any:
    head_run = kwargs.get("head_run")
    return output if head_run is None else _with_fields(output, head_run)


def _with_fields(output: Any, head_run: HeadRun) -> Any:
    """The module's output with the logits that were computed on packed rows in place of those of no row."""
    fields = head_run.fields()
    if isinstance(output, tuple):
        return (*fields.values(), *output[len(fields) :])
    for name, logits in fields.items():
        output[name] = logits
    return output
