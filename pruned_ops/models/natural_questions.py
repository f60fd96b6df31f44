"""Natural Questions models: an encoder with a start, an end and an answer type head (Alberti et al. 2019);
pruned encoders, and dense ones as the same classes with full layer shapes.

No Auto class knows this task: load with these classes, or with `load_natural_questions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import ModelOutput

from pruned_ops.models.configuration import PRUNED_CONFIGS, PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import PrunedRobertaModel
from pruned_ops.models.inputs import first_tokens
from pruned_ops.models.modeling import PrunedBertForQuestionAnswering, span_loss


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
