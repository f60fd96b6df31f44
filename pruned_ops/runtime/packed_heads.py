"""The known heads, computed on packed rows: they see no padding, and can be in a CUDA graph with the encoder.

A Hugging Face model's forward calls its encoder, and then its own head on padded hidden states. The head is
moved to the packed rows inside that call, in four steps:

1. Before the model's forward, a hook adds `head_run=HeadRun(head)` to its keyword arguments. The forward
   hands what it does not know on to its encoder.
2. `PackedEncoder.forward` computes this head on its packed rows and writes the outputs, and where the rows
   belong, into the `HeadRun`. The hidden states that it returns have no rows: (0, 1, hidden_size).
3. The model's own head runs on those, which costs next to nothing.
4. After the model's forward, a hook replaces these empty logits by those in the `HeadRun`, padded again.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CamembertForMaskedLM,
    CamembertForQuestionAnswering,
    CamembertForSequenceClassification,
    CamembertForTokenClassification,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    XLMRobertaForMaskedLM,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)
from transformers.models.bert.modeling_bert import BertOnlyMLMHead, BertPooler
from transformers.models.camembert.modeling_camembert import CamembertClassificationHead, CamembertLMHead
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead, RobertaLMHead
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaClassificationHead,
    XLMRobertaLMHead,
)

from pruned_ops.layers.packing import PackedBatch
from pruned_ops.models.encoder import PrunedPooler
from pruned_ops.models.heads import (
    PrunedBertForNaturalQuestions,
    PrunedBertForQuestionAnswering,
    PrunedBertForSequenceClassification,
    PrunedBertForTokenClassification,
    PrunedRobertaForSequenceClassification,
)


class Outputs(NamedTuple):
    """The outputs of a packed batch; None where there is no such output.

    rows: (tokens, ...), one for each token. firsts: (batch, ...), one for each sequence."""

    rows: Tensor | None
    firsts: Tensor | None


class PackedHead:
    """A model's head that takes packed hidden states and gives logits.

    classes: the models whose forward it computes. A subclass counts unless it changed that forward."""

    classes: tuple[type[Any], ...] = ()
    in_graph = True  # whether a CUDA graph holds it beside the encoder

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def linears(self) -> tuple[Any, ...]:
        """The modules that it computes with. Each has to be a plain Linear."""
        raise NotImplementedError

    def computes(self) -> bool:
        """Whether this computes what the model would. It is asked at every call, because a part may be
        replaced, hooked, or put into training mode at any time."""
        if "forward" in self.module.__dict__:
            return False
        for owner in (self.module, getattr(self.module, "classifier", None)):
            dropout = getattr(owner, "dropout", None)
            if dropout is not None and dropout.training:
                return False
        return all(type(linear) is nn.Linear and not _is_hooked(linear) for linear in self.linears)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        """(tokens, hidden_size) -> logits. It works on the device alone, so that it can be recorded."""
        raise NotImplementedError

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        """The fields of the model's output, padded again, in the order of its tuple."""
        raise NotImplementedError


@dataclass
class HeadRun:
    """One call's request to compute `head` on packed rows.

    outputs, batch: the head's outputs and where they belong; None until the encoder has run."""

    head: PackedHead
    outputs: Outputs | None = None
    batch: PackedBatch | None = None

    def fields(self) -> dict[str, Tensor]:
        """The fields of the model's output."""
        assert self.outputs is not None and self.batch is not None, "the encoder was not called"
        return self.head.padded_fields(self.outputs, self.batch)


class SpanHead(PackedHead):
    """Start and end logits of each token. Padding gets the dtype's minimum, so that no answer is there."""

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

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.rows is not None
        lowest = torch.finfo(outputs.rows.dtype).min
        start, end = (batch.unpack(part.contiguous(), lowest) for part in outputs.rows.unbind(-1))
        return {"start_logits": start, "end_logits": end}


class SpanAndTypeHead(SpanHead):
    """Start and end logits, and answer types that are read from the first token."""

    classes = (PrunedBertForNaturalQuestions,)

    @property
    def linears(self) -> tuple[Any, ...]:
        return self.module.qa_outputs, self.module.answer_type_outputs

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        types = self.module.answer_type_outputs(first_rows(states, cu_seqlens))
        return Outputs(self.module.qa_outputs(states), types)

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {**super().padded_fields(outputs, batch), "answer_type_logits": outputs.firsts}


class TokenHead(PackedHead):
    """A label for each token. Padding gets the bias alone, as from the model's own head on states of 0."""

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

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
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
        """The two linears, or nothing where the modules are not those that the class makes. BERT's first is
        its pooler's; RoBERTa's are both the classifier's."""
        head, pooler = self.module.classifier, self.module.base_model.pooler
        if pooler is not None:
            return (pooler.dense, head) if _is_plain(pooler) else ()
        if isinstance(self.module, PrunedRobertaForSequenceClassification):
            return head["dense"], head["out_proj"]
        known = (RobertaClassificationHead, XLMRobertaClassificationHead, CamembertClassificationHead)
        is_plain = type(head) in known and not _is_hooked(head)
        return (head.dense, head.out_proj) if is_plain else ()

    def computes(self) -> bool:
        return len(self.linears) == 2 and super().computes()

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        first, second = self.linears
        return Outputs(None, second(torch.tanh(first(first_rows(states, cu_seqlens)))))

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {"logits": outputs.firsts}


class VocabularyHead(PackedHead):
    """A score of each word of the vocabulary at each token, as a SparseEncoder reads it; 0 at padding.

    The head is called as it is: it takes rows of any shape. A graph would keep its outputs, which are many
    times the size of the model's other buffers."""

    classes = (BertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM, CamembertForMaskedLM)
    in_graph = False

    @property
    def _part(self) -> Any:
        return self.module.cls if isinstance(self.module, BertForMaskedLM) else self.module.lm_head

    @property
    def linears(self) -> tuple[Any, ...]:
        part = self._part
        if isinstance(part, BertOnlyMLMHead):
            return part.predictions.transform.dense, part.predictions.decoder
        return part.dense, part.decoder

    def computes(self) -> bool:
        known = (BertOnlyMLMHead, RobertaLMHead, XLMRobertaLMHead, CamembertLMHead)
        if type(self._part) not in known or any(map(_is_hooked, self._part.modules())):
            return False
        return super().computes()

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        return Outputs(self._part(states), None)

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.rows is not None
        return {"logits": batch.unpack(outputs.rows)}


HEADS: tuple[type[PackedHead], ...] = (SpanHead, SpanAndTypeHead, TokenHead, TextHead)
ANSWERERS: tuple[type[Any], ...] = (*SpanHead.classes, *SpanAndTypeHead.classes)
CLASSIFIERS: tuple[type[Any], ...] = (*TokenHead.classes, *TextHead.classes)


def packed_head(module: nn.Module) -> PackedHead | None:
    """The packed head of a model whose forward is that of one of HEADS' classes; None for another model."""
    return _head_among(HEADS, module)


def _head_among(heads: tuple[type[PackedHead], ...], module: nn.Module) -> PackedHead | None:
    for head in heads:
        for known in head.classes:
            # The pruned classifiers share one forward, and differ in the `classified` that it calls.
            if isinstance(module, known) and all(
                getattr(type(module), name, None) is getattr(known, name, None)
                for name in ("forward", "classified")
            ):
                return head(module)
    return None


def first_rows(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(tokens, hidden) -> (batch, hidden): the first token of each sequence; zeros where it has none."""
    first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if torch.compiler.is_compiling() or not len(states):  # traced code cannot ask for the number of rows
        rows = F.pad(states, (0, 0, 0, 1))[first]
    else:
        rows = states[first.clamp(max=len(states) - 1)]
    return rows.masked_fill((first == end)[:, None], 0.0)


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_plain(pooler: nn.Module) -> bool:
    """Whether this is BERT's pooler as its class makes it: a linear and tanh."""
    known = type(pooler) in (BertPooler, PrunedPooler) and not _is_hooked(pooler)
    return known and type(getattr(pooler, "activation", nn.Tanh())) is nn.Tanh


# The hooks. Each gets the names of the forward's arguments, read once: reading them took 3% of a small batch.
ArgumentNames = tuple[str, ...]
Arguments = dict[str, Any]
_LABELS = ("labels", "start_positions", "end_positions", "answer_types")


def hook_head(module: nn.Module) -> tuple[PackedHead | None, bool]:
    """Register the hooks that a model of a known class needs around its packed encoder. They do nothing while
    its encoder is not packed.

    Returns the head that is computed on packed rows, or None where it cannot be, and whether the model is of
    a known class."""
    if not isinstance(module, (*ANSWERERS, *CLASSIFIERS, *VocabularyHead.classes)):
        return None, False
    parameters = inspect.signature(type(module).forward).parameters
    names = tuple(parameters)[1:]
    # transformers 4's forwards do not hand keyword arguments on to the encoder.
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    head = _head_among((*HEADS, VocabularyHead), module) if hands_on else None
    after = _after_answering if isinstance(module, ANSWERERS) else _after_classifying
    module.register_forward_pre_hook(partial(_before, names, head), with_kwargs=True)
    module.register_forward_hook(partial(after, names), with_kwargs=True)
    return head, True


def _before(
    names: ArgumentNames,
    head: PackedHead | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Arguments | None = None,
) -> tuple[tuple[Any, ...], Arguments] | None:
    """Step 1: check the arguments, and add the `HeadRun` where the head can be computed on packed rows."""
    if kwargs is None or not _is_packed(module):
        return None
    arguments = _by_name(names, args, kwargs)
    _check_labels(arguments)
    if isinstance(module, TextHead.stock_classes):
        _check_padding(module, arguments)
    # A hook of the encoder sees, and may change, padded states.
    if head is not None and head.computes() and not _is_hooked(module.base_model):
        kwargs = {**kwargs, "head_run": HeadRun(head)}
    return args, kwargs


def _by_name(names: ArgumentNames, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    return dict(zip(names, args, strict=False)) | kwargs


def _check_labels(arguments: Arguments) -> None:
    for name in _LABELS:
        if arguments.get(name) is not None:
            raise ValueError(
                f"an optimised model does not take {name}: pruned_ops.restore(model) before computing losses"
            )


def _check_padding(module: nn.Module, arguments: Arguments) -> None:
    """Refuse padding at position 0, where a stock model reads a text's label: there is no hidden state."""
    mask = arguments.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask.size(1):
        return
    if arguments.get("packed_batch") is not None:
        return  # `BatchRunner` made it, and pads on the right. Looking at the mask would wait for the GPU.
    message = (
        f"{type(module).__name__} reads position 0, where attention_mask says there is padding: an optimised "
        "model computes nothing there; pad on the right"
    )
    is_wrong = ((mask[:, 0] == 0) & (mask != 0).any(1)).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~is_wrong, message)
    elif bool(is_wrong):
        raise ValueError(message)


def _is_packed(module: Any) -> bool:
    """Whether the encoder of a model runs packed: hooks outlive `restore`, for forwards under way."""
    return "packed" in module.base_model.__dict__


def _after_answering(names: ArgumentNames, module: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
    """Step 4 for answers. Where the model's own head ran on padded states, its logits at padded positions
    become the dtype's minimum, so that no answer is found there."""
    kwargs, output = _kwargs_and_output(others)
    head_run = kwargs.get("head_run")
    if head_run is not None:
        return _with_fields(output, head_run)
    if not _is_packed(module):
        return output
    attention_mask = _by_name(names, args, kwargs).get("attention_mask")
    if attention_mask is None:
        return output
    start, end = output[:2] if isinstance(output, tuple) else (output.start_logits, output.end_logits)
    is_padding = (attention_mask == 0).to(start.device)
    start, end = (logits.masked_fill(is_padding, torch.finfo(start.dtype).min) for logits in (start, end))
    if isinstance(output, tuple):
        return (start, end, *output[2:])
    output.start_logits, output.end_logits = start, end
    return output


def _after_classifying(names: ArgumentNames, module: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
    """Step 4 for labels and words."""
    kwargs, output = _kwargs_and_output(others)
    head_run = kwargs.get("head_run")
    return output if head_run is None else _with_fields(output, head_run)


def _kwargs_and_output(others: tuple[Any, ...]) -> tuple[Arguments, Any]:
    """What torch gives a forward hook after its positional arguments. There are no keyword arguments where
    another thread is just registering the hook."""
    return (others[0], others[1]) if len(others) == 2 else ({}, others[0])


def _with_fields(output: Any, head_run: HeadRun) -> Any:
    """The model's output with the logits from packed rows in place of its empty ones."""
    if head_run.outputs is None:  # another thread restored the encoder before it ran
        return output
    fields = head_run.fields()
    if isinstance(output, tuple):
        return (*fields.values(), *output[len(fields) :])
    for name, logits in fields.items():
        output[name] = logits
    return output
