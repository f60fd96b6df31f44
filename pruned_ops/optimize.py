"""optimize(model): swap the packed encoder into an existing Hugging Face model; restore(model) undoes it.

The model keeps its call signature and its outputs. Inside, padding is removed before the embedding and put
back after the last layer, so no padded token is computed; q|k|v are one matrix. No weight is copied: the
fused matrix takes the place of the three, which become views of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertModel, RobertaForQuestionAnswering, RobertaModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from pruned_ops import ops
from pruned_ops.inputs import check_inputs, default_position_ids
from pruned_ops.layers import ACTIVATIONS, Projection, PrunedEncoder, fuse_rows, split_rows
from pruned_ops.modeling import PrunedBertForQuestionAnswering, PrunedBertModel, PrunedRobertaModel
from pruned_ops.packing import PackedBatch
from pruned_ops.shape import LayerShape, ModelShape

ENCODERS = (BertModel, RobertaModel, PrunedBertModel, PrunedRobertaModel)
ANSWERERS = (BertForQuestionAnswering, RobertaForQuestionAnswering, PrunedBertForQuestionAnswering)
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_HOOKS = "_pruned_ops_hooks"
_CAPTURING = "transformers.utils.output_capturing"


class PackedEncoder(nn.Module):
    """Takes the place of a BERT or RoBERTa encoder: padded in, padded out, packed between. Inference only."""

    config: Any
    embeddings: Any
    pooler: Any

    def __init__(self, original: Any) -> None:
        super().__init__()
        refusal = refuse(original)
        if refusal is not None:
            raise ValueError(f"optimize cannot take this {type(original).__name__}: {refusal}")
        self._keep = [original]  # in a list, so that its parameters are not registered a second time
        config = original.config
        self.config = config
        self.roberta = config.model_type in ("roberta", "pruned_roberta")
        self.embeddings = original.embeddings
        self.pooler = getattr(original, "pooler", None)
        with torch.device("meta"):
            self.encoder = PrunedEncoder(model_shape(original), config.layer_norm_eps, config.hidden_act)
        for packed, stock in zip(self.encoder.layers, original.encoder.layer, strict=True):
            _take_weights(packed, stock)
        # The parameters are shared with the original, so what is switched off here is remembered for restore.
        self._required_grad = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.requires_grad_(False)
        super().train(False)
        self.register_state_dict_pre_hook(_refuse_state_dict)

    @property
    def original(self) -> Any:
        """The encoder that this one replaced."""
        return self._keep[0]

    def train(self, mode: bool = True) -> PackedEncoder:
        """Evaluation mode only: RuntimeError for `train(True)`."""
        if mode:
            raise RuntimeError(
                "an optimised model is inference-only: call pruned_ops.restore(model) before training"
            )
        return super().train(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.word_embeddings.weight.device

    def undo(self) -> Any:
        """The original encoder with its own q, k, v weights again, on the device and in the dtype used
        last."""
        for packed, stock in zip(self.encoder.layers, self.original.encoder.layer, strict=True):
            for fused, parts in _fused_parts(packed, stock):
                split_rows(fused, parts)
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
        return self.original

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """As the encoder it replaces. Hidden states are 0 at padded positions. Refused by name: see the
        errors."""
        named = {name for name, value in unsupported.items() if value is not None and value is not False}
        if output_attentions or (
            output_attentions is None and getattr(self.config, "output_attentions", False)
        ):
            named.add("output_attentions")
        if named:
            raise ValueError(f"an optimised encoder does not take {', '.join(sorted(named))}")
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, token_type_ids)
        if input_ids is None:
            raise ValueError("an optimised encoder does not take inputs_embeds: it looks up real tokens only")
        with torch.no_grad():
            batch_size, seqlen = input_ids.shape
            batch = PackedBatch.from_mask(attention_mask, batch_size, seqlen, self.device)
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            x = self._embed(batch, input_ids, token_type_ids, position_ids)
            collect = [x] if output_hidden_states else None
            last = batch.unpack(self.encoder(x, batch, collect))
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.pooler is not None else None,
            hidden_states=tuple(batch.unpack(state) for state in collect) if collect else None,
        )
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )

    def _embed(
        self,
        batch: PackedBatch,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        tables = self.embeddings
        if position_ids is None:
            padding_idx = self.config.pad_token_id if self.roberta else None
            position_ids = default_position_ids(
                input_ids, batch.batch_size, batch.seqlen, self.device, padding_idx
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return ops.embed_layer_norm(
            batch.pack(input_ids),
            batch.pack(position_ids.expand(input_ids.shape)),
            batch.pack(token_type_ids.expand(input_ids.shape)),
            tables.word_embeddings.weight,
            tables.position_embeddings.weight,
            tables.token_type_embeddings.weight,
            tables.LayerNorm.weight,
            tables.LayerNorm.bias,
            tables.LayerNorm.eps,
        )


def model_shape(encoder: Any) -> ModelShape:
    """The shape of a stock or pruned encoder, from its config."""
    config = encoder.config
    if isinstance(encoder, PrunedBertModel):
        return config.shape
    dense = LayerShape(config.num_attention_heads, config.intermediate_size)
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelShape((dense,) * config.num_hidden_layers, config.hidden_size, head_dim)


def refuse(encoder: Any) -> str | None:
    """Why the packed encoder cannot take this one's place; None if it can."""
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder, or has cross-attention"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return (
            f"position_embedding_type is {config.position_embedding_type!r}, only absolute "
            f"positions are computed"
        )
    if config.hidden_act != "gelu" and config.hidden_act not in ACTIVATIONS:
        return f"hidden_act is {config.hidden_act!r}; gelu, {', '.join(ACTIVATIONS)} are computed"
    for name, module in encoder.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own hooks collect hidden states for its own forward, which does not run here.
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return f"its {name or 'encoder'} has forward hooks, which would not run (gates still attached?)"
    for i, layer in enumerate(encoder.encoder.layer):
        parts = _parts(layer)
        for name in (*_QKV, "attention.output.dense", "intermediate.dense", "output.dense"):
            if type(parts[name]) not in (nn.Linear, Projection) or parts[name].bias is None:
                return (
                    f"layer {i}'s {name} is a {type(parts[name]).__name__}; a plain Linear with "
                    f"bias is needed"
                )
    return None


def _parts(stock: nn.Module) -> dict[str, Any]:
    """A stock or pruned layer's modules by name (the pruned ones keep theirs in ModuleDicts)."""
    return {name: module for name, module in stock.named_modules() if name}


def _fused_parts(packed: Any, stock: nn.Module) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    parts = _parts(stock)
    qkv = [parts[name] for name in _QKV]
    fused = packed.attention.qkv
    return [(fused.weight, [part.weight for part in qkv]), (fused.bias, [part.bias for part in qkv])]


def _take_weights(packed: Any, stock: nn.Module) -> None:
    parts = _parts(stock)
    (_, weights), (_, biases) = _fused_parts(packed, stock)
    packed.attention.qkv.weight = fuse_rows(weights)
    packed.attention.qkv.bias = fuse_rows(biases)
    for target, name in (
        (packed.attention.output, "attention.output.dense"),
        (packed.attention.norm, "attention.output.LayerNorm"),
        (packed.ffn.up, "intermediate.dense"),
        (packed.ffn.down, "output.dense"),
        (packed.ffn.norm, "output.LayerNorm"),
    ):
        target.weight, target.bias = parts[name].weight, parts[name].bias


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        "an optimised model holds fused weights: call pruned_ops.restore(model) before saving it"
    )


def optimize(model: nn.Module) -> Any:
    """Put the packed encoder into `model`, a stock or pruned BERT or RoBERTa, or any module that contains
    one.

    Returns the model itself (the packed encoder, where `model` is a bare encoder), in evaluation mode, with
    the same call signature. At padded positions hidden states are 0 and question-answering logits the
    dtype's minimum.
    Errors: ValueError for a model without such an encoder, or with one that would not be computed as it is.
    """
    if isinstance(model, PackedEncoder):
        return model
    if type(model) in ENCODERS:
        return PackedEncoder(model)
    if any(isinstance(module, PackedEncoder) for module in model.modules()):
        return model
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    found = [(parent, name, child) for parent, name, child in found if type(child) in ENCODERS]
    if not found:
        raise ValueError(
            f"no BERT or RoBERTa encoder found in {type(model).__name__}; optimize takes models "
            f"that contain one of "
            f"{', '.join(encoder.__name__ for encoder in ENCODERS)}"
        )
    packed = {
        id(child): PackedEncoder(child) for child in {id(child): child for _, _, child in found}.values()
    }
    for parent, name, child in found:
        setattr(parent, name, packed[id(child)])
    for module in model.modules():
        if isinstance(module, ANSWERERS):
            hooks = (
                module.register_forward_pre_hook(_refuse_labels, with_kwargs=True),
                module.register_forward_hook(_mask_logits, with_kwargs=True),
            )
            setattr(module, _HOOKS, hooks)
    return model.eval()


def restore(model: nn.Module) -> Any:
    """Undo `optimize`: the original encoders are back, with their own parameters. Returns the model."""
    if isinstance(model, PackedEncoder):
        return model.undo()
    originals: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedEncoder):
                if id(child) not in originals:
                    originals[id(child)] = child.undo()
                setattr(parent, name, originals[id(child)])
        for hook in parent.__dict__.pop(_HOOKS, ()):
            hook.remove()
    return model


@contextmanager
def optimized(model: nn.Module) -> Iterator[Any]:
    """`with optimized(model) as fast:` runs packed inside the block; the model is as before after it."""
    if any(isinstance(module, PackedEncoder) for module in model.modules()):
        yield model  # whoever optimised it restores it
        return
    training = model.training
    fast = optimize(model)
    try:
        yield fast
    finally:
        restore(fast).train(training)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def _refuse_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = _arguments(module, args, kwargs)
    for name in ("start_positions", "end_positions"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"an optimised model does not take {name}: pruned_ops.restore(model) before computing losses"
            )


def _mask_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Logits at padded positions become the dtype's minimum, so that no answer is ever found there."""
    attention_mask = _arguments(module, args, kwargs).get("attention_mask")
    if attention_mask is None:
        return output
    start, end = (
        (output[0], output[1]) if isinstance(output, tuple) else (output.start_logits, output.end_logits)
    )
    padded = (attention_mask == 0).to(start.device)
    start, end = (logits.masked_fill(padded, torch.finfo(logits.dtype).min) for logits in (start, end))
    if isinstance(output, tuple):
        return (start, end, *output[2:])
    output.start_logits, output.end_logits = start, end
    return output
