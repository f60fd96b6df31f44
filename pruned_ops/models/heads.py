"""Pruned encoders under four heads: answers to questions, Natural Questions, labels of texts and of tokens.

All have their publisher's own parameter names, and are registered with transformers' Auto classes.
Their forwards list every argument because transformers' Trainer reads their signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from pruned_ops.models.configuration import PrunedConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import (
    PRUNED_ENCODERS,
    PrunedBertModel,
    PrunedPreTrainedModel,
    PrunedRobertaModel,
    family_class,
)
from pruned_ops.models.families.description import TextHeadNames
from pruned_ops.models.families.known import BY_TYPE, FAMILIES, family_of, stock_head
from pruned_ops.models.inputs import first_tokens, mean_states, returned
from pruned_ops.models.modules import dropout_of, put


class _WithEncoder(PrunedPreTrainedModel):
    """A pruned encoder under its publisher's name ("bert", "roberta"), for a head on top of it."""

    encoder_class: type[PrunedBertModel] = PrunedBertModel

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        setattr(self, self.base_model_prefix, self._encoder(config))

    def _encoder(self, config: PrunedConfig) -> PrunedBertModel:
        return self.encoder_class(config)

    def _encoded(
        self,
        inputs: Sequence[Tensor | None],
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        for_the_encoder: dict[str, Any],
    ) -> BaseModelOutputWithPooling:
        """The encoder's output. inputs: ids, mask, types, positions and embeddings. for_the_encoder: further
        arguments, which only an optimised encoder takes."""
        input_ids, *others = inputs
        names = ("attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        return self.base_model(
            input_ids,
            **dict(zip(names, others, strict=True)),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **for_the_encoder,
        )


class PrunedBertForQuestionAnswering(_WithEncoder):
    """A pruned encoder with the start and end head of extractive question answering."""

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__(config)
        self.dropout = dropout_of(config, config.family.answers_dropout)
        add_prediction_head(self, config)
        put(self, config.family.answers_head, nn.Linear(config.hidden_size, 2))
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
        """Start and end logits, (batch, seqlen) each. As in stock BERT, the loss is the mean of both
        cross-entropies."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encoded(inputs, output_hidden_states, output_attentions, for_the_encoder)
        start, end = self._span_logits(encoded[0])
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start, start_positions) + span_loss(end, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=encoded.hidden_states
        )
        return returned(output, self.config, return_dict)

    def _span_logits(self, states: Tensor) -> tuple[Tensor, Tensor]:
        family = family_of(self.config)
        logits = self.get_submodule(family.answers_head)(self.dropout(family.predicted(self, states)))
        start, end = (part.contiguous() for part in logits.unbind(-1))
        return start, end


class PrunedPredictionHead(nn.Module):
    """A linear, an activation and a LayerNorm, which come before the last linear in the heads of some
    families."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        family = config.family
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, config.classifier_bias)
        self.act = ACT2FN[config.classifier_activation]
        eps, bias = family.value(config, "layer_norm_eps"), family.kind(config).norm_bias
        self.norm = nn.LayerNorm(config.hidden_size, eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same."""
        return self.norm(self.act(self.dense(x)))


def add_prediction_head(model: nn.Module, config: PrunedConfig) -> None:
    """Add what a family's heads have before their last linear, where they have it."""
    names = config.family.prediction_head
    if names is not None:
        put(model, names.module, PrunedPredictionHead(config))


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """The cross-entropy of one end of the answer. As in BERT, a position outside the window is no target."""
    outside = logits.size(1)
    return F.cross_entropy(logits, positions.flatten().clamp(0, outside), ignore_index=outside)


class PrunedRobertaForQuestionAnswering(PrunedBertForQuestionAnswering):
    """RoBERTa's counterpart of PrunedBertForQuestionAnswering."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


class AnswerType(IntEnum):
    """The classes of the answer type head: what kind of answer a window holds."""

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
    """A pruned encoder with start and end logits for each token, and an answer type read from the first token
    (CLS).

    transformers' Trainer knows the labels of its own heads by their names alone. To evaluate this one it
    takes TrainingArguments(label_names=["start_positions", "end_positions", "answer_types"])."""

    def __init__(self, config: PrunedConfig) -> None:
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
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encoded(inputs, output_hidden_states, output_attentions, for_the_encoder)
        start, end = self._span_logits(encoded[0])
        types = self.answer_type_outputs(first_tokens(encoded[0], attention_mask))
        loss = None
        if start_positions is not None and end_positions is not None and answer_types is not None:
            loss = span_loss(start, start_positions) + span_loss(end, end_positions)
            loss = (loss + F.cross_entropy(types, answer_types.flatten())) / 3
        output = NaturalQuestionsOutput(loss, start, end, types, encoded.hidden_states)
        return returned(output, self.config, return_dict)


class PrunedRobertaForNaturalQuestions(PrunedBertForNaturalQuestions):
    """RoBERTa's counterpart of PrunedBertForNaturalQuestions."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


class _Classifier(_WithEncoder):
    """The common part of the two classifiers, which make num_labels logits out of hidden states."""

    output_class: type[ModelOutput] = SequenceClassifierOutput

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.dropout = dropout_of(config, self._dropout_field(config))
        self._add_head(config)
        self.post_init()

    def _dropout_field(self, config: PrunedConfig) -> str:
        """The name of the config's field for the head's dropout, which may be None."""
        return "classifier_dropout"

    def _add_head(self, config: PrunedConfig) -> None:
        """Add what makes logits of hidden states."""
        raise NotImplementedError

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, seqlen, hidden_size) -> logits."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that stock transformers computes for this head."""
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
        """Logits, and the stock model's loss where labels are given."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self._encoded(inputs, output_hidden_states, output_attentions, for_the_encoder)
        logits = self.classified(encoded[0], attention_mask)
        loss = None if labels is None else self.loss(logits, labels)
        output: ModelOutput = self.output_class(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return returned(output, self.config, return_dict)


class PrunedBertForSequenceClassification(_Classifier):
    """A pruned encoder with a label for each text: logits (batch, num_labels).

    The label is read from the first real token, which is CLS on whichever side the padding is."""

    def _encoder(self, config: PrunedConfig) -> PrunedBertModel:
        return self.encoder_class(config, add_pooling_layer=config.family.text_head.first is None)

    def _dropout_field(self, config: PrunedConfig) -> str:
        return config.family.text_head.dropout

    def _add_head(self, config: PrunedConfig) -> None:
        names, width = config.family.text_head, config.pooled_width
        self.input_dropout = dropout_of(config, names.input_dropout)
        if config.family.prediction_head is not None:
            add_prediction_head(self, config)
            put(self, names.last, nn.Linear(config.hidden_size, self.num_labels))
            return
        self.activation = ACT2FN[names.activation]
        if names.first is not None:
            put(self, names.first, nn.Linear(config.hidden_size, width))
        put(self, names.last, nn.Linear(width, self.num_labels))

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        family = self.config.family
        names: TextHeadNames = family.text_head
        first, last = text_linears(self, names)
        if family.prediction_head is not None:
            means = family.pools_mean(self.config)
            pooled = mean_states(states, attention_mask) if means else first_tokens(states, attention_mask)
            return last(self.dropout(family.predicted(self, pooled)))
        x = self.activation(first(self.input_dropout(first_tokens(states, attention_mask))))
        return last(self.dropout(x))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)


def text_linears(model: Any, names: TextHeadNames) -> tuple[Any, Any]:
    """The two linears of the head that labels texts, of a stock or pruned model. Errors: AttributeError where
    one of them is not there."""
    first = model.base_model.pooler.dense if names.first is None else model.get_submodule(names.first)
    return first, model.get_submodule(names.last)


class PrunedRobertaForSequenceClassification(PrunedBertForSequenceClassification):
    """RoBERTa's counterpart: it has no pooler, and two linears in its head."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


class PrunedBertForTokenClassification(_Classifier):
    """A pruned encoder with a label for each token: logits (batch, seqlen, num_labels)."""

    output_class = TokenClassifierOutput

    def _add_head(self, config: PrunedConfig) -> None:
        add_prediction_head(self, config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)

    def classified(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.classifier(self.dropout(family_of(self.config).predicted(self, states)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits=logits, labels=labels, config=self.config)


class PrunedRobertaForTokenClassification(PrunedBertForTokenClassification):
    """RoBERTa's counterpart of PrunedBertForTokenClassification."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
    encoder_class = PrunedRobertaModel


# What follows "For" in the name of a model's class, nothing for a bare encoder -> the class of BERT's.
_OF_BERT: dict[str, type[Any]] = {
    "": PrunedBertModel,
    "QuestionAnswering": PrunedBertForQuestionAnswering,
    "NaturalQuestions": PrunedBertForNaturalQuestions,
    "SequenceClassification": PrunedBertForSequenceClassification,
    "TokenClassification": PrunedBertForTokenClassification,
}
# The same -> the class of every family, by its model type.
_PRUNED: dict[str, dict[str, type[Any]]] = {
    head: {
        family.pruned_type: family_class(kind, family, globals(), encoder_class=PRUNED_ENCODERS[family])
        if head
        else PRUNED_ENCODERS[family]
        for family in FAMILIES
    }
    for head, kind in _OF_BERT.items()
}


def head_name(architecture: str) -> str:
    """What follows "For" in the name of a model's class, "" for a bare encoder; ValueError where no pruned
    model has such a head."""
    name = architecture.partition("For")[2]
    if name not in _PRUNED:
        known = ", ".join(f"For{head}" for head in _PRUNED if head)
        raise ValueError(f"it is a {architecture[:100]!r}; known are encoders without a head and {known}")
    return name


def pruned_class(name: str, model_type: str) -> type[Any]:
    """The pruned model with the head that `head_name` names, for one of PRUNED_CONFIGS."""
    return _PRUNED[name][BY_TYPE[model_type].pruned_type]


def pruned_counterpart(kind: type[Any]) -> type[Any] | None:
    """The pruned class of a class with a head that is known here, the publisher's or one of ours (which is
    its own counterpart); None for another class."""
    if any(kind in classes.values() for head, classes in _PRUNED.items() if head):
        return kind
    family, head = stock_head(kind) or (None, "")
    return None if family is None or head not in _PRUNED else _PRUNED[head][family.pruned_type]


def _register() -> None:
    """Teach transformers' Auto classes the pruned models. Natural Questions has no Auto class."""
    for kind, encoder in _PRUNED[""].items():
        AutoConfig.register(kind, encoder.config_class, exist_ok=True)
        AutoModel.register(encoder.config_class, encoder, exist_ok=True)
        for head, auto_class in (
            ("QuestionAnswering", AutoModelForQuestionAnswering),
            ("SequenceClassification", AutoModelForSequenceClassification),
            ("TokenClassification", AutoModelForTokenClassification),
        ):
            auto_class.register(encoder.config_class, _PRUNED[head][kind], exist_ok=True)


_register()
