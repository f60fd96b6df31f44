"""Pruned encoders under the other common heads: a label for a text, and a label for each token.

Stock BERT's and RoBERTa's own parameter names. The text's label is read from the first real token, which is
the CLS token on whichever side the padding is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from pruned_ops.models.configuration import PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import PrunedBertModel, PrunedPreTrainedModel, PrunedRobertaModel
from pruned_ops.models.inputs import first_tokens

Config = PrunedBertConfig | PrunedRobertaConfig


class _Classifier(PrunedPreTrainedModel):
    """An encoder, and logits out of its hidden states."""

    encoder_class: type[PrunedBertModel] = PrunedBertModel
    output_class: type[Any] = SequenceClassifierOutput

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        setattr(self, self.base_model_prefix, self._encoder(config))
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if given is None else given)
        self.classifier = self._head(config)
        self.post_init()

    def _encoder(self, config: Config) -> PrunedBertModel:
        return self.encoder_class(config)

    def _head(self, config: Config) -> nn.Module:
        return nn.Linear(config.hidden_size, self.num_labels)

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, seqlen, hidden_size) -> logits."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Stock transformers' loss for this head."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **for_the_encoder: Any,
    ) -> Any:
        """Logits, and the loss where there are labels, as the stock model's."""
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
        logits = self.classified(encoded[0], attention_mask)
        loss = None if labels is None else self.loss(logits, labels)
        output = self.output_class(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


class PrunedBertForSequenceClassification(_Classifier):
    """A pruned BERT with its pooler and a label (num_labels logits) for each text: (batch, num_labels)."""

    def _encoder(self, config: Config) -> PrunedBertModel:
        return self.encoder_class(config, add_pooling_layer=True)

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooler: Any = self.base_model.pooler
        return self.classifier(self.dropout(pooler(first_tokens(states, attention_mask)[:, None])))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)


class PrunedBertForTokenClassification(_Classifier):
    """A pruned BERT with a label for each token: (batch, seqlen, num_labels)."""

    output_class = TokenClassifierOutput

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.classifier(self.dropout(states))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, config=self.config)


class PrunedRobertaForSequenceClassification(PrunedBertForSequenceClassification):
    """RoBERTa's counterpart: no pooler, two linears in the head."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel

    def _encoder(self, config: Config) -> PrunedBertModel:
        return self.encoder_class(config)

    def _head(self, config: Config) -> nn.Module:
        hidden = config.hidden_size
        return nn.ModuleDict(
            {"dense": nn.Linear(hidden, hidden), "out_proj": nn.Linear(hidden, self.num_labels)}
        )

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        head: Any = self.classifier
        x = torch.tanh(head["dense"](self.dropout(first_tokens(states, attention_mask))))
        return head["out_proj"](self.dropout(x))


class PrunedRobertaForTokenClassification(PrunedBertForTokenClassification):
    """RoBERTa's counterpart of PrunedBertForTokenClassification."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


for _config, _sequences, _tokens in (
    (PrunedBertConfig, PrunedBertForSequenceClassification, PrunedBertForTokenClassification),
    (PrunedRobertaConfig, PrunedRobertaForSequenceClassification, PrunedRobertaForTokenClassification),
):
    AutoModelForSequenceClassification.register(_config, _sequences, exist_ok=True)
    AutoModelForTokenClassification.register(_config, _tokens, exist_ok=True)
