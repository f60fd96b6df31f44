"""The heads that we know, computed on packed rows: with no padding, and in a CUDA graph with the encoder.

A hook (`head_hooks`) asks the packed encoder for its head's logits with a `HeadRun`. The module's own forward
then sees no rows, and what it made of them is replaced.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
from transformers.models.bert.modeling_bert import BertPooler
from transformers.models.camembert.modeling_camembert import CamembertClassificationHead
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaClassificationHead

from pruned_ops.layers.packing import PackedBatch, lengths_of
from pruned_ops.models.encoder import PrunedPooler
from pruned_ops.models.heads import (
    PrunedBertForNaturalQuestions,
    PrunedBertForQuestionAnswering,
    PrunedBertForSequenceClassification,
    PrunedBertForTokenClassification,
    PrunedRobertaForSequenceClassification,
)


class Outputs(NamedTuple):
    """What a packed batch gave. rows: (tokens, ...), of each token; firsts: (batch, ...), of each sequence.
    None: there is no such output."""

    rows: Tensor | None
    firsts: Tensor | None


class PackedHead:
    """A head of a model: packed hidden states in, logits out. classes: whose forward it computes, and of
    their subclasses those that did not change it."""

    classes: tuple[type[Any], ...] = ()

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @property
    def linears(self) -> tuple[Any, ...]:
        """What it computes with, each to be a plain Linear."""
        raise NotImplementedError

    def computes(self) -> bool:
        """Whether this computes what the module would. Asked at every call: a part may be replaced at any
        time, or hooked, or put into training mode."""
        if "forward" in self.module.__dict__:
            return False
        for one in (self.module, getattr(self.module, "classifier", None)):
            dropout = getattr(one, "dropout", None)
            if dropout is not None and dropout.training:
                return False
        return all(type(linear) is nn.Linear and not _hooked(linear) for linear in self.linears)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        """(tokens, hidden_size), on the device alone, so that it can be recorded."""
        raise NotImplementedError

    def finished(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        """The fields of the module's output, padded, in the order of its tuple."""
        raise NotImplementedError


@dataclass
class HeadRun:
    """One call's wish for a head's logits, and what came of it. outputs: of the head, with batch, which tells
    where they belong; None until the encoder has run."""

    head: PackedHead
    outputs: Outputs | None = None
    batch: PackedBatch | None = None

    def fields(self) -> dict[str, Tensor]:
        assert self.outputs is not None and self.batch is not None, "the encoder was not called"
        return self.head.finished(self.outputs, self.batch)


class SpanHead(PackedHead):
    """Start and end logits of each token; the dtype's minimum at padding, where no answer may be found."""

    classes: tuple[type[Any], ...] = (
        BertForQuestionAnswering,
        RobertaForQuestionAnswering,
        XLMRobertaForQuestionAnswering,
        CamembertForQuestionAnswering,
        PrunedBertForQuestionAnswering,
    )

    @property
    def linears(self) -> tuple[Any, ...]:
        return (self.module.qa_outputs,)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        return Outputs(self.module.qa_outputs(states), None)

    def finished(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.rows is not None
        lowest = torch.finfo(outputs.rows.dtype).min
        start, end = (batch.unpack(part.contiguous(), lowest) for part in outputs.rows.unbind(-1))
        return {"start_logits": start, "end_logits": end}


class SpanAndTypeHead(SpanHead):
    """With answer types, read from the first token."""

    classes = (PrunedBertForNaturalQuestions,)

    @property
    def linears(self) -> tuple[Any, ...]:
        return self.module.qa_outputs, self.module.answer_type_outputs

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        types = self.module.answer_type_outputs(first_rows(states, cu_seqlens))
        return Outputs(self.module.qa_outputs(states), types)

    def finished(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {**super().finished(outputs, batch), "answer_type_logits": outputs.firsts}


class TokenHead(PackedHead):
    """A label for each token. At padding, where hidden states are 0, the bias, as the module's own."""

    classes = (
        BertForTokenClassification,
        RobertaForTokenClassification,
        XLMRobertaForTokenClassification,
        CamembertForTokenClassification,
        PrunedBertForTokenClassification,
    )

    @property
    def linears(self) -> tuple[Any, ...]:
        return (self.module.classifier,)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        return Outputs(self.module.classifier(states), None)

    def finished(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        rows, bias = outputs.rows, self.module.classifier.bias
        assert rows is not None
        if batch.index is None or bias is None:
            return {"logits": batch.unpack(rows)}
        padded = bias.detach().to(rows.dtype).repeat(batch.batch_size * batch.seqlen, 1)
        padded.index_copy_(0, batch.index, rows)
        return {"logits": padded.view(batch.batch_size, batch.seqlen, -1)}


class TextHead(PackedHead):
    """A label for a text, read from its first token through a linear, tanh and a second linear."""

    stock_classes = (
        BertForSequenceClassification,
        RobertaForSequenceClassification,
        XLMRobertaForSequenceClassification,
        CamembertForSequenceClassification,
    )
    classes = (
        *stock_classes,
        PrunedBertForSequenceClassification,
        PrunedRobertaForSequenceClassification,
    )

    @property
    def linears(self) -> tuple[Any, ...]:
        """BERT's first is its pooler's; RoBERTa's are both the classifier's. None where they are others."""
        head, pooler = self.module.classifier, self.module.base_model.pooler
        if pooler is not None:
            return (pooler.dense, head) if _is_plain(pooler) else ()
        if isinstance(self.module, PrunedRobertaForSequenceClassification):
            return head["dense"], head["out_proj"]
        known = (RobertaClassificationHead, XLMRobertaClassificationHead, CamembertClassificationHead)
        plain = type(head) in known and not _hooked(head)
        return (head.dense, head.out_proj) if plain else ()

    def computes(self) -> bool:
        return len(self.linears) == 2 and super().computes()

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        first, second = self.linears
        return Outputs(None, second(torch.tanh(first(first_rows(states, cu_seqlens)))))

    def finished(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {"logits": outputs.firsts}


HEADS: tuple[type[PackedHead], ...] = (SpanHead, SpanAndTypeHead, TokenHead, TextHead)


def packed_head(module: nn.Module) -> PackedHead | None:
    """The head of a model whose forward is that of one of HEADS' classes; None for another."""
    for head in HEADS:
        for known in head.classes:
            # The pruned classifiers have one forward, and differ in what it calls.
            if isinstance(module, known) and all(
                getattr(type(module), name, None) is getattr(known, name, None)
                for name in ("forward", "classified")
            ):
                return head(module)
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_plain(pooler: nn.Module) -> bool:
    """Whether this is BERT's pooler as its class makes it: a linear and tanh."""
    known = type(pooler) in (BertPooler, PrunedPooler) and not _hooked(pooler)
    return known and type(getattr(pooler, "activation", nn.Tanh())) is nn.Tanh


def first_rows(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(tokens, hidden) -> (batch, hidden): each sequence's first token; zeros where it has none."""
    first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if not len(states):
        return states.new_zeros(len(first), states.size(1))
    return states[first.clamp(max=len(states) - 1)].masked_fill((first == end)[:, None], 0.0)


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
