"""PackedEncoder: what takes the place of a BERT or RoBERTa encoder, and of which ones it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.camembert.modeling_camembert import CamembertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEmbeddings

from pruned_ops import ops
from pruned_ops.layers.modules import ACTIVATIONS, PrunedEncoder, PrunedLinear
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import fuse_rows, split_rows
from pruned_ops.models.configuration import is_roberta
from pruned_ops.models.encoder import PrunedEmbeddings
from pruned_ops.models.inputs import check_inputs, default_position_ids
from pruned_ops.models.stock import QKV, model_shape, stock_parts
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_heads import HeadRun, Outputs, PackedHead

_EMBEDDINGS = (BertEmbeddings, RobertaEmbeddings, XLMRobertaEmbeddings, CamembertEmbeddings, PrunedEmbeddings)
_CAPTURING = "transformers.utils.output_capturing"


class PackedEncoder(nn.Module):
    """Takes the place of a BERT or RoBERTa encoder: padded in, padded out, packed between. Inference only."""

    config: Any
    embeddings: Any
    pooler: Any

    def __init__(self, original: Any, int8: bool = False) -> None:
        super().__init__()
        refusal = refuse(original, int8)
        if refusal is not None:
            raise ValueError(f"optimize cannot take this {type(original).__name__}: {refusal}")
        self.engine: Engine | None = None  # what runs batches on a GPU; `optimize` decides
        # The heads around it that it can compute, and the classes of all; `optimize` knows them.
        self.heads: list[PackedHead] = []
        self.around: list[str] = []
        self._keep = [original]  # in a list, so that its parameters are not registered a second time
        self._modes = [(module, module.training) for module in original.modules()]
        config = original.config
        self.config = config
        self.int8 = int8
        self.embeddings = original.embeddings
        self.pooler = getattr(original, "pooler", None)
        with torch.device("meta"):
            self.encoder = PrunedEncoder(model_shape(original), config.layer_norm_eps, config.hidden_act)
        for packed, stock in zip(self.encoder.layers, original.encoder.layer, strict=True):
            _take_weights(packed, stock)
        # The parameters are shared with the original, so what is switched off here is remembered for restore.
        self._required_grad = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.requires_grad_(False)
        self.encoder.pack(keep_weights=False, int8=self.encoder.linear_names if int8 else ())
        super().train(False)
        original.eval()
        self.register_state_dict_pre_hook(_refuse_state_dict)
        self.register_load_state_dict_pre_hook(_refuse_state_dict)

    @property
    def original(self) -> Any:
        """The encoder that this one replaced."""
        return self._keep[0]

    def _apply(self, *args: Any, **kwargs: Any) -> PackedEncoder:
        if self.engine is not None:
            self.engine.invalidate()  # the weights will be elsewhere, or others; no memory is held for graphs
        super()._apply(*args, **kwargs)
        return self

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
        if self.engine is not None:
            self.engine.invalidate()
        self.encoder.unpack()
        for packed, stock in zip(self.encoder.layers, self.original.encoder.layer, strict=True):
            for fused, parts in _fused_parts(packed, stock):
                split_rows(fused, parts)
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
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
        head_run: HeadRun | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """As the encoder it replaces. Hidden states are 0 at padded positions. Refused by name: see the
        errors.

        head_run: is given the head's outputs; last_hidden_state and pooler_output then have no rows."""
        named = {name for name, value in unsupported.items() if value is not None and value is not False}
        if output_attentions or (
            output_attentions is None and getattr(self.config, "output_attentions", False)
        ):
            named.add("output_attentions")
        if named:
            raise ValueError(f"an optimised encoder does not take {', '.join(sorted(named))}")
        self._refuse_autocast()
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, token_type_ids)
        if input_ids is None:
            raise ValueError("an optimised encoder does not take inputs_embeds: it looks up real tokens only")
        with torch.no_grad():
            batch_size, seqlen = input_ids.shape
            batch = PackedBatch.from_mask(attention_mask, batch_size, seqlen, self.device)
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            inputs = self._packed(batch, input_ids, token_type_ids, position_ids)
            collect: list[Tensor] | None = [] if output_hidden_states else None
            head = None if head_run is None else head_run.head
            run = self.computed if self.engine is None else self.engine.run
            outputs = run(inputs, batch, head, collect)
            if head_run is not None:
                head_run.outputs, head_run.batch = outputs, batch
                last = inputs[0].new_empty((0, 1, self.config.hidden_size), dtype=self.dtype)
            else:
                assert outputs.rows is not None
                last = batch.unpack(outputs.rows)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.pooler is not None else None,
            hidden_states=tuple(batch.unpack(state) for state in collect) if collect else None,
        )
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )

    def _refuse_autocast(self) -> None:
        """Weights are packed once, in their own dtype; autocast would be obeyed by the head alone."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.dtype:
            asked = torch.get_autocast_dtype(kind)
            raise ValueError(
                f"autocast asks for {asked}, and an optimised model computes in its weights' dtype, "
                f"{self.dtype}: call model.to({asked}) instead"
            )

    def _packed(
        self, batch: PackedBatch, input_ids: Tensor, types: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, positions and types of the real tokens, (tokens,) each."""
        if position_ids is None:
            padding_idx = self.config.pad_token_id if is_roberta(self.config) else None
            position_ids = default_position_ids(
                input_ids, batch.batch_size, batch.seqlen, self.device, padding_idx
            )
        types = torch.zeros_like(input_ids) if types is None else types
        positions, types = (batch.pack(one.expand(input_ids.shape)) for one in (position_ids, types))
        return batch.pack(input_ids), positions, types

    def computed(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs:
        """`compute` on a packed batch."""
        return self.compute(inputs, batch.cu_seqlens, batch.max_seqlen, head, collect)

    def compute(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs:
        """Packed ids, positions and types (tokens,) -> the head's outputs, without one hidden states (tokens,
        hidden_size): on the device alone, so that it can be recorded. collect: is given the embedding and
        each layer's output."""
        tables = self.embeddings
        x = ops.embed_layer_norm(
            *inputs,
            tables.word_embeddings.weight,
            tables.position_embeddings.weight,
            tables.token_type_embeddings.weight,
            tables.LayerNorm.weight,
            tables.LayerNorm.bias,
            tables.LayerNorm.eps,
        )
        if collect is not None:
            collect.append(x)
        x = self.encoder.run(x, cu_seqlens, max_seqlen, collect)
        return Outputs(x, None) if head is None else head(x, cu_seqlens)


def _fused_parts(packed: Any, stock: nn.Module) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    parts = stock_parts(stock)
    qkv = [parts[name] for name in QKV]
    fused = packed.attention.qkv
    return [(fused.weight, [part.weight for part in qkv]), (fused.bias, [part.bias for part in qkv])]


def _take_weights(packed: Any, stock: nn.Module) -> None:
    parts = stock_parts(stock)
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


def _refuse_state_dict(*_: Any) -> None:
    raise RuntimeError(
        "an optimised model holds fused weights: call pruned_ops.restore(model) before saving it, or loading "
        "weights into it"
    )


def refuse(encoder: Any, int8: bool = False) -> str | None:
    """Why the packed encoder cannot take this one's place; None if it can."""
    config = encoder.config
    if int8:
        reasons = [
            kernel.backend.missing or kernel.refuse(torch.empty(0, dtype=torch.int8))
            for kernel in ops.encoder.kernels.values()
        ]
        if all(reasons):
            return "; ".join(reason for reason in reasons if reason)
        if (encoder.dtype, encoder.device.type, config.hidden_act) != (torch.float32, "cpu", "gelu"):
            return (
                f"int8 takes a float32 model on the CPU whose activation is gelu; this is {encoder.dtype} on "
                f"{encoder.device} with {config.hidden_act}"
            )
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
        if "forward" in module.__dict__:
            return f"the forward of its {name or 'encoder'} was replaced, and would not run"
        # transformers' own hooks collect hidden states for its own forward, which does not run here.
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return f"its {name or 'encoder'} has forward hooks, which would not run (gates still attached?)"
    if type(encoder.embeddings) not in _EMBEDDINGS:
        return f"its embeddings are a {type(encoder.embeddings).__name__}, not the model's own"
    for i, layer in enumerate(encoder.encoder.layer):
        parts = stock_parts(layer)
        activation = parts.get("activation", parts.get("intermediate.intermediate_act_fn"))
        if type(activation) is not type(ACT2FN[config.hidden_act]):
            found = type(activation).__name__
            return f"layer {i}'s activation is a {found}, not the config's {config.hidden_act}"
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            if type(parts[name]) is not nn.LayerNorm or parts[name].eps != config.layer_norm_eps:
                return f"layer {i}'s {name} is not the nn.LayerNorm that the config describes"
        for name in (*QKV, "attention.output.dense", "intermediate.dense", "output.dense"):
            if type(parts[name]) not in (nn.Linear, PrunedLinear) or parts[name].bias is None:
                return (
                    f"layer {i}'s {name} is a {type(parts[name]).__name__}; a plain Linear with "
                    f"bias is needed"
                )
    return None
