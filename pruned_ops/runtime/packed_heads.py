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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pruned_ops.layers.packing import PackedBatch
from pruned_ops.models.encoder import PrunedPooler, PrunedPreTrainedModel
from pruned_ops.models.families.known import family_of
from pruned_ops.models.heads import text_linears


class Outputs(NamedTuple):
    """The outputs of a packed batch; None where there is no such output.

    rows: (tokens, ...), one for each token. firsts: (batch, ...), one for each sequence."""

    rows: Tensor | None
    firsts: Tensor | None


class PackedHead:
    """A model's head that takes packed hidden states and gives logits.

    module: the model. known: the class among its own whose forward is computed; see `known_head`."""

    in_graph = True  # whether a CUDA graph holds it beside the encoder

    def __init__(self, module: Any, known: type[Any]) -> None:
        self.module, self.known = module, known

    @property
    def linears(self) -> tuple[Any, ...]:
        """The modules that it computes with. Each has to be a plain Linear."""
        raise NotImplementedError

    @property
    def read(self) -> tuple[Any, ...]:
        """All modules whose weights it reads: the linears, and those of a prediction head before the last."""
        names = family_of(self.module.config).prediction_head
        before = () if names is None else self.module.get_submodule(names.module).modules()
        return tuple(dict.fromkeys((*before, *self.linears)))

    def computes(self) -> bool:
        """Whether this computes what the model would. It is asked at every call, because a part may be
        replaced, hooked, or put into training mode at any time."""
        if "forward" in self.module.__dict__ or self.is_hooked():
            return False
        for owner in (self.module, *(getattr(self.module, name, None) for name in ("classifier", "pooler"))):
            for name in ("dropout", "drop", "input_dropout"):
                dropout = getattr(owner, name, None)
                if not isinstance(dropout, (NoneType, nn.Identity)) and dropout.training:
                    return False
        return all(type(linear) is nn.Linear for linear in self.linears) and self.predicts()

    def is_hooked(self) -> bool:
        """Whether a module of the head, or the encoder's pooler, has hooks or another forward."""
        return any(map(_is_hooked, self._own_modules()))

    def _own_modules(self) -> Iterator[nn.Module]:
        """The modules of the model that are not its encoder's, and those of the encoder's pooler."""
        encoder = self.module.base_model
        for child in (*self.module.children(), getattr(encoder, "pooler", None)):
            if child is not None and child is not encoder:
                yield from child.modules()

    def predicts(self) -> bool:
        """Whether what comes before the last linear, where the family has that, is what the class makes."""
        names = family_of(self.module.config).prediction_head
        if names is None:
            return True
        head = self.module._modules.get(names.module)
        return head is not None and are_known(head.modules(), self.known)

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

    @property
    def linears(self) -> tuple[Any, ...]:
        return (self.module.get_submodule(family_of(self.module.config).answers_head),)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        family = family_of(self.module.config)
        last = self.module.get_submodule(family.answers_head)
        return Outputs(last(family.predicted(self.module, states)), None)

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.rows is not None
        lowest = torch.finfo(outputs.rows.dtype).min
        start, end = (batch.unpack(part.contiguous(), lowest) for part in outputs.rows.unbind(-1))
        return {"start_logits": start, "end_logits": end}


class SpanAndTypeHead(SpanHead):
    """Start and end logits, and answer types that are read from the first token."""

    @property
    def linears(self) -> tuple[Any, ...]:
        return *super().linears, self.module.answer_type_outputs

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        types = self.module.answer_type_outputs(first_rows(states, cu_seqlens))
        return Outputs(super().__call__(states, cu_seqlens).rows, types)

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {**super().padded_fields(outputs, batch), "answer_type_logits": outputs.firsts}


class TokenHead(PackedHead):
    """A label for each token. Padding gets the bias alone, as from the model's own head on states of 0; or 0
    where a prediction head comes before."""

    @property
    def linears(self) -> tuple[Any, ...]:
        return (self.module.classifier,)

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        return Outputs(
            self.module.classifier(family_of(self.module.config).predicted(self.module, states)), None
        )

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        rows, bias = outputs.rows, self.module.classifier.bias
        assert rows is not None
        if family_of(self.module.config).prediction_head is not None:
            return {"logits": batch.unpack(rows)}
        if batch.index is None or bias is None:
            return {"logits": batch.unpack(rows)}
        padded = bias.detach().to(rows.dtype).repeat(batch.batch_size * batch.seqlen, 1)
        padded.index_copy_(0, batch.index, rows)
        return {"logits": padded.view(batch.batch_size, batch.seqlen, -1)}


class TextHead(PackedHead):
    """A label for a text, read from its first token through a linear, an activation and a second linear."""

    def __init__(self, module: Any, known: type[Any]) -> None:
        super().__init__(module, known)
        self.names = family_of(module.config).text_head
        self.activation = ACT2FN[self.names.activation]

    @property
    def linears(self) -> tuple[Any, ...]:
        """The two linears, or nothing where the modules are not those that the class makes."""
        try:
            linears = text_linears(self.module, self.names)
        except AttributeError:
            return ()
        if family_of(self.module.config).prediction_head is not None:
            return linears
        first = self.names.first
        owner = self.module.base_model.pooler if first is None else self._owner(first)
        return linears if self._is_plain(owner) else ()

    def _owner(self, name: str) -> Any:
        return self.module.get_submodule(name.rpartition(".")[0])

    def _is_plain(self, owner: nn.Module) -> bool:
        """Whether the module around the first linear is one that its class makes, with its activation, which
        pruned models have themselves."""
        is_ours = owner is self.module or type(owner) in (PrunedPooler, nn.ModuleDict)
        activations = [getattr(module, "activation", self.activation) for module in (owner, self.module)]
        expected = type(self.activation)
        known = is_ours or type(owner).__module__ == self.known.__module__
        return known and all(type(activation) is expected for activation in activations)

    def computes(self) -> bool:
        family = family_of(self.module.config)
        if family.pools_mean(self.module.config) and not isinstance(self.module, PrunedPreTrainedModel):
            return False  # a stock head takes the mean by its mask, which would not fit states without rows
        return len(self.linears) == 2 and super().computes()

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        first, second = self.linears
        family = family_of(self.module.config)
        if family.prediction_head is not None:
            means = family.pools_mean(self.module.config)
            pooled = mean_rows(states, cu_seqlens) if means else first_rows(states, cu_seqlens)
            return Outputs(None, second(family.predicted(self.module, pooled)))
        return Outputs(None, second(self.activation(first(first_rows(states, cu_seqlens)))))

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.firsts is not None
        return {"logits": outputs.firsts}


class VocabularyHead(PackedHead):
    """A score of each word of the vocabulary at each token, as a SparseEncoder reads it; 0 at padding.

    The head is called as it is: it takes rows of any shape. A graph would keep its outputs, which are many
    times the size of the model's other buffers."""

    in_graph = False

    @property
    def parts(self) -> list[Any]:
        """The modules that score the words, one after the other."""
        return [self.module.get_submodule(name) for name in family_of(self.module.config).words_head]

    @property
    def linears(self) -> tuple[Any, ...]:
        inside = (module for part in self.parts for module in part.modules())
        return tuple(module for module in inside if isinstance(module, nn.Linear))

    def computes(self) -> bool:
        """Whether all modules are those of torch and of the file that the model's class is from."""
        inside = [module for part in self.parts for module in part.modules()]
        return are_known(inside, self.known) and super().computes()

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Outputs:
        for part in self.parts:
            states = part(states)
        return Outputs(states, None)

    def padded_fields(self, outputs: Outputs, batch: PackedBatch) -> dict[str, Tensor]:
        assert outputs.rows is not None
        return {"logits": batch.unpack(outputs.rows)}


def are_known(modules: Iterable[nn.Module], known: type[Any]) -> bool:
    """Whether all these modules are torch's, or of the file that a model's known class is from, and without
    hooks."""
    libraries = ("torch.nn.modules.", "transformers.activations", known.__module__)
    return all(type(module).__module__.startswith(libraries) and not _is_hooked(module) for module in modules)


def first_rows(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(tokens, hidden) -> (batch, hidden): the first token of each sequence; zeros where it has none."""
    first, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if torch.compiler.is_compiling() or not len(states):  # traced code cannot ask for the number of rows
        rows = F.pad(states, (0, 0, 0, 1))[first]
    else:
        rows = states[first.clamp(max=len(states) - 1)]
    return rows.masked_fill((first == end)[:, None], 0.0)


def mean_rows(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(tokens, hidden) -> (batch, hidden): the mean over the tokens of each sequence; zeros where it has
    none. Halves are added in fp32: in bf16 a sum stands still at some 256 times a number, and fp16 ends at
    65,504. The tokens of a sequence are added in their order, on every device."""
    lengths, bounds = cu_seqlens.diff().long(), cu_seqlens.long()
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    if states.device.type == "cpu":  # where segment_reduce takes 19 times as long
        sequence = torch.bucketize(torch.arange(states.size(0)), bounds[1:], right=True)
        sums = wide.new_zeros(lengths.size(0), states.size(1)).index_add_(0, sequence, wide)
    else:  # where index_add_ adds in any order
        sums = torch.segment_reduce(wide, "sum", offsets=bounds, axis=0, unsafe=True)
    return (sums / lengths.clamp(min=1)[:, None]).to(states.dtype)


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# The hooks. Each gets the names of the forward's arguments, read once: reading them took 3% of a small batch.
ArgumentNames = tuple[str, ...]
Arguments = dict[str, Any]
_LABELS = ("labels", "start_positions", "end_positions", "answer_types")


def before(
    names: ArgumentNames,
    head: PackedHead | None,
    at_place_0: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Arguments | None = None,
) -> tuple[tuple[Any, ...], Arguments] | None:
    """Step 1: check the arguments, and add the `HeadRun` where the head can be computed on packed rows."""
    if kwargs is None or not _is_packed(module):
        return None
    arguments = _by_name(names, args, kwargs)
    _check_labels(arguments)
    if at_place_0:
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


def after_answering(names: ArgumentNames, module: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
    """Step 4 for answers. Where the model's own head ran on padded states, its logits at padded positions
    become the dtype's minimum, so that no answer is found there."""
    kwargs, output = _kwargs_and_output(others)
    head_run = kwargs.get("head_run")
    if head_run is not None:
        return _with_fields(output, head_run)
    if not _is_packed(module):
        return output
    attention_mask = _by_name(names, args, kwargs).get("attention_mask")
    return output if attention_mask is None else _masked(output, attention_mask == 0)


def _masked(output: Any, is_padding: Tensor) -> Any:
    """An output with masked start and end logits. That of a subclass's own forward may be anything, and what
    is no logits (batch, seqlen) stays."""

    def masked(logits: Any) -> Any:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            return logits
        if logits.shape != is_padding.shape:
            return logits
        return logits.masked_fill(is_padding.to(logits.device), torch.finfo(logits.dtype).min)

    if type(output) is tuple:
        return (*map(masked, output[:2]), *output[2:])
    if isinstance(output, dict):
        for name in ("start_logits", "end_logits"):
            if name in output:
                output[name] = masked(output[name])
    return output


def after_classifying(names: ArgumentNames, module: nn.Module, args: tuple[Any, ...], *others: Any) -> Any:
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
