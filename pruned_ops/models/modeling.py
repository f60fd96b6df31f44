"""Hugging Face models whose layers differ in size: PrunedBert* and PrunedRoberta*, heads, Auto* registration.

Self-contained modules with BERT's own parameter names. They run padded, in plain torch, and train;
`optimize` puts the packed encoder inside for inference. Loading is strict: a checkpoint whose tensors
disagree with its config is refused.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from pruned_ops.models.configuration import PRUNED_CONFIGS, PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import (
    PrunedBertModel,
    PrunedPreTrainedModel,
    PrunedRobertaModel,
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
