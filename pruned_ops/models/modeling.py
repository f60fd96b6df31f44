"""Hugging Face models whose layers differ in size: PrunedBert* and PrunedRoberta*, heads, Auto* registration.

Self-contained modules with BERT's own parameter names. They run padded, in plain torch, and train;
`optimize` puts the packed encoder inside for inference. Loading is strict: a checkpoint whose tensors
disagree with its config is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, QuestionAnsweringModelOutput

from pruned_ops.layers.packing import check_mask
from pruned_ops.models.configuration import PRUNED_CONFIGS, PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import PrunedEmbeddings, PrunedEncoderModule, PrunedPooler
from pruned_ops.models.inputs import check_inputs
from pruned_ops.models.model_card import write_model_card


class PrunedPreTrainedModel(PreTrainedModel):
    """What the pruned models share: strict loading, from safetensors only."""

    config_class: type[Any] = PrunedBertConfig
    base_model_prefix = "bert"
    # The attention is torch's scaled_dot_product_attention while padded, the packed op when optimised.
    _supports_sdpa = True

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as any Hugging Face model, but refuse a checkpoint whose tensors are not exactly the config's.

        Errors: ValueError naming missing, unexpected and misshapen tensors; OSError where there is no
        safetensors file.
        A bare encoder may be read from a checkpoint with a head on top.
        """
        kwargs["use_safetensors"] = True
        # So that a wrong shape is reported below, by name and with all others.
        kwargs["ignore_mismatched_sizes"] = True
        model: Any
        info: dict[str, Any]
        model, info = super().from_pretrained(  # type: ignore[misc]
            name_or_path, *args, output_loading_info=True, **kwargs
        )
        unexpected = set(info["unexpected_keys"])
        if cls.__name__ == model.base_model.__class__.__name__:
            own = f"{cls.base_model_prefix}."
            unexpected = {key for key in unexpected if key.startswith(own) and "pooler." not in key}
        faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
        faults += [f"unexpected {key}" for key in sorted(unexpected)]
        for mismatched in sorted(info["mismatched_keys"]):
            faults.append(_misshapen(mismatched, model))
        if faults:
            shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise ValueError(f"the tensors in {name_or_path} are not what its config.json describes: {shown}")
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As any Hugging Face model's, with a model card beside it; see `write_model_card`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """What `push_to_hub` ends with; transformers put its placeholder where the card was."""
        write_model_card(working_dir, self)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _misshapen(mismatched: Any, model: nn.Module) -> str:
    """transformers 5 gives a tensor's name, its shape and the one expected; 4 the name alone."""
    if isinstance(mismatched, str):
        expected = tuple(model.state_dict()[mismatched].shape)
        return f"{mismatched} has another shape than config.json says, {expected}"
    key, found, expected = mismatched
    return f"{key} has shape {tuple(found)}, config.json says {tuple(expected)}"


class PrunedBertModel(PrunedPreTrainedModel):
    """The bare encoder: ids (batch, seqlen) -> last_hidden_state (batch, seqlen, hidden_size).

    add_pooling_layer: with BERT's pooler, which a checkpoint of a question-answering model does not have.
    """

    def __init__(
        self, config: PrunedBertConfig | PrunedRobertaConfig, add_pooling_layer: bool = False
    ) -> None:
        super().__init__(config)
        self.embeddings = PrunedEmbeddings(config)
        self.encoder = PrunedEncoderModule(config)
        self.pooler = PrunedPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word_embeddings = value

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
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, token_type_ids)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: the attention never stores its probabilities"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        additive_mask = None
        if attention_mask is not None:
            check_mask(attention_mask, x.size(0), x.size(1))
            # The lowest finite number rather than -inf: a row of padding only is then no NaN.
            additive_mask = (attention_mask == 0).to(x.dtype)[:, None, None, :] * torch.finfo(x.dtype).min
        collect = [x] if output_hidden_states else None
        x = self.encoder(x, additive_mask, collect)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pooler(x) if self.pooler is not None else None,
            hidden_states=tuple(collect) if collect else None,
        )
        return (
            output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
        )


class PrunedBertForQuestionAnswering(PrunedPreTrainedModel):
    """A pruned encoder with the start and end head of extractive question answering."""

    encoder_class: type[PrunedBertModel] = PrunedBertModel

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **for_the_encoder: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Start and end logits (batch, seqlen); the loss is the mean of both cross-entropies, as in stock
        BERT."""
        encoded = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **for_the_encoder,
        )
        start_logits, end_logits = (part.contiguous() for part in self.qa_outputs(encoded[0]).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start_logits, start_positions) + span_loss(end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=encoded.hidden_states
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy of one end of the answer; a position outside the window is no target, as in BERT."""
    outside = logits.size(1)
    return F.cross_entropy(logits, positions.flatten().clamp(0, outside), ignore_index=outside)


class PrunedRobertaModel(PrunedBertModel):
    """The bare RoBERTa encoder: BERT's, with positions counted from the padding index."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"


class PrunedRobertaForQuestionAnswering(PrunedBertForQuestionAnswering):
    """RoBERTa's counterpart of PrunedBertForQuestionAnswering."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


def answering_class(model_type: str) -> type[Any]:
    """The pruned counterpart of a question-answering model of this type, one of PRUNED_CONFIGS."""
    roberta = PRUNED_CONFIGS[model_type] is PrunedRobertaConfig
    return PrunedRobertaForQuestionAnswering if roberta else PrunedBertForQuestionAnswering


for _config, _encoder, _answerer in (
    (PrunedBertConfig, PrunedBertModel, PrunedBertForQuestionAnswering),
    (PrunedRobertaConfig, PrunedRobertaModel, PrunedRobertaForQuestionAnswering),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _encoder, exist_ok=True)
    AutoModelForQuestionAnswering.register(_config, _answerer, exist_ok=True)
