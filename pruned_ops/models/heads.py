"""Pruned encoders under the other common heads: a label for a text, and a label for each token.

Stock BERT's and RoBERTa's own parameter names. The text's label is read from the first real token, which is
the CLS token on whichever side the padding is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import (
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from pruned_ops.models.configuration import PRUNED_CONFIGS, PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import PrunedBertModel, PrunedPreTrainedModel, PrunedRobertaModel
from pruned_ops.models.inputs import first_tokens


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


class AnswerType(IntEnum):
    """What a window says of its question: the classes of the answer type head."""

    NULL = 0
    YES = 1
    NO = 2
    SHORT = 3
    LONG = 4


@dataclass
class NaturalQuestionsOutput(ModelOutput):
    """start_logits, end_logits: (batch, seqlen). answer_type_logits: (batch, len(AnswerType)). loss: the mean
    of the three cross-entropies, where labels were given."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    answer_type_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class PrunedBertForNaturalQuestions(PrunedBertForQuestionAnswering):
    """A pruned encoder with start and end logits for each token, and an answer type read from the first one
    (CLS)."""

    def __init__(self, config: PrunedBertConfig | PrunedRobertaConfig) -> None:
        super().__init__(config)
        self.answer_type_outputs = nn.Linear(config.hidden_size, len(AnswerType))
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        answer_types: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **for_the_encoder: Any,
    ) -> NaturalQuestionsOutput | tuple[Any, ...]:
        """Logits, and the loss where all three labels (batch,) are given. A row of padding only has the
        answer type of a zero hidden state."""
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
        states = encoded[0]
        first = first_tokens(states, attention_mask)
        start, end = (part.contiguous() for part in self.qa_outputs(states).unbind(-1))
        types = self.answer_type_outputs(first)
        loss = None
        if start_positions is not None and end_positions is not None and answer_types is not None:
            loss = span_loss(start, start_positions) + span_loss(end, end_positions)
            loss = (loss + F.cross_entropy(types, answer_types.flatten())) / 3
        output = NaturalQuestionsOutput(loss, start, end, types, encoded.hidden_states)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


class PrunedRobertaForNaturalQuestions(PrunedBertForNaturalQuestions):
    """RoBERTa's counterpart of PrunedBertForNaturalQuestions."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


def natural_questions_class(model_type: str) -> type[Any]:
    """The model class for a BERT or RoBERTa, stock or pruned; ValueError for another model type."""
    if model_type not in PRUNED_CONFIGS:
        raise ValueError(f"it is a {model_type!r} model; one of {', '.join(PRUNED_CONFIGS)} is needed")
    roberta = PRUNED_CONFIGS[model_type] is PrunedRobertaConfig
    return PrunedRobertaForNaturalQuestions if roberta else PrunedBertForNaturalQuestions


def is_natural_questions(config: Any) -> bool:
    """Whether the model of this config was saved as one of these classes."""
    return any(name.endswith("ForNaturalQuestions") for name in config.architectures or ())


def load_natural_questions(name_or_path: str | Path) -> Any:
    """The Natural Questions model that was saved there, dense or pruned; ValueError for another one."""
    config = AutoConfig.from_pretrained(name_or_path)
    model_class = natural_questions_class(config.model_type)
    if type(config) is not model_class.config_class:
        raise ValueError(
            f"{name_or_path} is a stock {config.model_type} checkpoint, without answer types: fine-tune it "
            "on Natural Questions first (with_answer_types gives it the head)"
        )
    return model_class.from_pretrained(name_or_path)


def with_answer_types(model: Any) -> Any:
    """A Natural Questions model with the encoder and the start and end head of `model`, a stock or pruned
    question-answering BERT or RoBERTa, and a new, random answer type head. `model` is left alone."""
    model_class = natural_questions_class(model.config.model_type)
    fields = {k: v for k, v in model.config.to_dict().items() if k != "architectures"}
    made = model_class(model_class.config_class(**fields))
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler." not in name}
    keys = made.load_state_dict(state, strict=False)
    missing = [name for name in keys.missing_keys if not name.startswith("answer_type_outputs.")]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"{type(model).__name__} is no question-answering model: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(keys.unexpected_keys) or 'none'}"
        )
    return made.to(next(model.parameters()).device).train(model.training)
