"""PackedEncoder replaces a BERT or RoBERTa encoder; `refuse_encoder` tells which ones it cannot replace."""

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
from pruned_ops.layers.modules import PrunedEncoder, PrunedLinear, refuse_activation
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import fuse_rows, split_rows
from pruned_ops.models.encoder import PrunedEmbeddings
from pruned_ops.models.inputs import packed_inputs, returned
from pruned_ops.models.stock import QKV, model_shape, stock_parts
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.packed_heads import HeadRun, Outputs, PackedHead

_EMBEDDINGS = (BertEmbeddings, RobertaEmbeddings, XLMRobertaEmbeddings, CamembertEmbeddings, PrunedEmbeddings)
_CAPTURING = "transformers.utils.output_capturing"


class PackedEncoder(nn.Module):
    """Replaces a BERT or RoBERTa encoder inside its model: padded in, padded out, packed between.

    It is for inference only. (`layers.modules.PrunedEncoder` are its layers, on packed tokens;
    `models.encoder.PrunedEncoderModule` is the padded stack of a pruned model, which can be trained.)"""

    config: Any
    embeddings: Any
    pooler: Any

    def __init__(self, original: Any, int8: bool = False) -> None:
        super().__init__()
        refusal = refuse_encoder(original, int8)
        if refusal is not None:
            raise ValueError(f"optimize cannot take this {type(original).__name__}: {refusal}")
        # `optimize` sets these three: the engine, the heads around this encoder that can run on packed rows,
        # and the class names of all models around it.
        self.engine: Engine | None = None
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
        # The original shares these parameters: `undo` switches their gradients on again.
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
            self.engine.invalidate()  # its graphs read the weights at their old place, and hold memory
        super()._apply(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> PackedEncoder:
        """Stay in evaluation mode. Errors: RuntimeError for `train(True)`."""
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
        """Give the original encoder its own weights again, on the device and in the dtype used last; return
        it."""
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
        packed_batch: PackedBatch | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """The replaced encoder's forward, with 0 at padded positions. ValueError for unsupported arguments.

        head_run: receives the outputs of its head; last_hidden_state and pooler_output then have no rows.
        packed_batch: where the real tokens are, from a caller that knows it; the mask is then not looked at.
        """
        self._refuse_arguments(unsupported, output_attentions, inputs_embeds)
        self._refuse_autocast()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collect: list[Tensor] | None = [] if output_hidden_states else None
        batch, inputs = packed_inputs(
            self.config, self.device, input_ids, attention_mask, token_type_ids, position_ids, packed_batch
        )
        with torch.no_grad():
            last = self._last_states(inputs, batch, head_run, collect)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.pooler is not None else None,
            hidden_states=tuple(batch.unpack(state) for state in collect) if collect else None,
        )
        return returned(output, self.config, return_dict)

    def _last_states(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head_run: HeadRun | None,
        collect: list[Tensor] | None,
    ) -> Tensor:
        """Run a batch: the padded hidden states, (batch, seqlen, hidden_size). Where a head is to run on the
        rows, `head_run` receives its outputs, and the states have no rows."""
        outputs = self._run(inputs, batch, None if head_run is None else head_run.head, collect)
        if head_run is None:
            assert outputs.rows is not None
            return batch.unpack(outputs.rows)
        head_run.outputs, head_run.batch = outputs, batch
        return torch.empty((0, 1, self.config.hidden_size), dtype=self.dtype, device=self.device)

    def _refuse_arguments(
        self, unsupported: dict[str, Any], output_attentions: bool | None, inputs_embeds: Tensor | None
    ) -> None:
        """Refuse by name the arguments that are set and that an optimised encoder does not take."""
        names = {name for name, value in unsupported.items() if value is not None and value is not False}
        if output_attentions or (
            output_attentions is None and getattr(self.config, "output_attentions", False)
        ):
            names.add("output_attentions")
        if names:
            raise ValueError(f"an optimised encoder does not take {', '.join(sorted(names))}")
        if inputs_embeds is not None:
            raise ValueError("an optimised encoder does not take inputs_embeds: it looks up real tokens only")

    def _refuse_autocast(self) -> None:
        """Refuse autocast to another dtype: the weights were laid out in their own dtype, so that only the
        head would obey it."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.dtype:
            dtype = torch.get_autocast_dtype(kind)
            raise ValueError(
                f"autocast asks for {dtype}, and an optimised model computes in its weights' dtype, "
                f"{self.dtype}: call model.to({dtype}) instead"
            )

    def _run(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head: PackedHead | None,
        collect: list[Tensor] | None,
    ) -> Outputs:
        """`compute` by the engine's graphs, where there may be any: on a GPU."""
        if self.engine is not None and (self.device.type == "cuda" or self.engine.recorder is not None):
            return self.engine.run(inputs, batch, head, collect)
        return self.compute(inputs, batch.cu_seqlens, batch.max_seqlen, head, collect)

    def compute(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs:
        """Packed ids, positions and types, (tokens,) each -> the head's outputs, or without a head the hidden
        states (tokens, hidden_size). It works on the device alone, so that it can be recorded.

        collect: the embedding and each layer's output are appended to it."""
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


def refuse_encoder(encoder: Any, int8: bool = False) -> str | None:
    """Why the packed encoder cannot take the place of this one; None if it can."""
    return (
        (_refuse_int8(encoder) if int8 else None)
        or _refuse_config(encoder.config)
        or _refuse_changed_forward(encoder)
        or _refuse_parts(encoder)
    )


def _refuse_int8(encoder: Any) -> str | None:
    reasons = [
        kernel.backend.missing or kernel.refuse(torch.empty(0, dtype=torch.int8))
        for kernel in ops.encoder.kernels.values()
    ]
    if all(reasons):
        return "; ".join(reason for reason in reasons if reason)
    activation = encoder.config.hidden_act
    if (encoder.dtype, encoder.device.type, activation) != (torch.float32, "cpu", "gelu"):
        return (
            f"int8 takes a float32 model on the CPU whose activation is gelu; this is {encoder.dtype} on "
            f"{encoder.device} with {activation}"
        )
    return None


def _refuse_config(config: Any) -> str | None:
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder, or has cross-attention"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        kind = config.position_embedding_type
        return f"position_embedding_type is {kind!r}, only absolute positions are computed"
    return refuse_activation(config.hidden_act)


def _refuse_changed_forward(encoder: nn.Module) -> str | None:
    """Refuse replaced forwards and hooks inside the encoder: they would not run any more."""
    for name, module in encoder.named_modules():
        name = name or "encoder"
        if "forward" in module.__dict__:
            return f"the forward of its {name} was replaced, and would not run"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own hooks collect hidden states for its own forward, which does not run here.
        if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
            return f"its {name} has forward hooks, which would not run (gates still attached?)"
    return None


def _refuse_parts(encoder: Any) -> str | None:
    """Refuse modules that are not those which the config describes."""
    config = encoder.config
    if type(encoder.embeddings) not in _EMBEDDINGS:
        return f"its embeddings are a {type(encoder.embeddings).__name__}, not the model's own"
    for i, layer in enumerate(encoder.encoder.layer):
        parts = stock_parts(layer)
        activation = parts.get("activation", parts.get("intermediate.intermediate_act_fn"))
        if type(activation) is not type(ACT2FN[config.hidden_act]):
            kind = type(activation).__name__
            return f"layer {i}'s activation is a {kind}, not the config's {config.hidden_act}"
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            if type(parts[name]) is not nn.LayerNorm or parts[name].eps != config.layer_norm_eps:
                return f"layer {i}'s {name} is not the nn.LayerNorm that the config describes"
        for name in (*QKV, "attention.output.dense", "intermediate.dense", "output.dense"):
            if type(parts[name]) not in (nn.Linear, PrunedLinear) or parts[name].bias is None:
                kind = type(parts[name]).__name__
                return f"layer {i}'s {name} is a {kind}; a plain Linear with bias is needed"
    return None
