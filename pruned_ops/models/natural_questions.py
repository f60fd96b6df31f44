"""Models for Natural Questions, which transformers' Auto classes do not know: their class, loading one, and
making one of a model for question answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.heads import pruned_class


def natural_questions_class(model_type: str) -> type[Any]:
    """The model class for a stock or pruned model type; ValueError for one that is not known."""
    if model_type not in PRUNED_CONFIGS:
        raise ValueError(f"it is a {model_type!r} model; one of {', '.join(PRUNED_CONFIGS)} is needed")
    return pruned_class("NaturalQuestions", model_type)


def is_natural_questions(config: Any) -> bool:
    """Whether the model of this config was saved as a Natural Questions model."""
    return any(name.endswith("ForNaturalQuestions") for name in config.architectures or ())


def load_natural_questions(name_or_path: str | Path) -> Any:
    """The Natural Questions model that was saved there, dense or pruned; ValueError for another one."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    model_class = natural_questions_class(config.model_type)
    if not is_natural_questions(config):
        raise ValueError(
            f"{name_or_path} is a {config.model_type} checkpoint without answer types: fine-tune it "
            "on Natural Questions first (with_answer_types gives it the head)"
        )
    return model_class.from_pretrained(name_or_path)


def with_answer_types(model: Any) -> Any:
    """A Natural Questions model with the encoder and the start and end head of `model`, and a new, random
    answer type head.

    model: a stock or pruned model for question answering, which is left alone. Errors: ValueError for
    another model."""
    model_class = natural_questions_class(model.config.model_type)
    fields = {name: value for name, value in model.config.to_dict().items() if name != "architectures"}
    typed = model_class(model_class.config_class(**fields))
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler." not in name}
    keys = typed.load_state_dict(state, strict=False)
    missing = [name for name in keys.missing_keys if not name.startswith("answer_type_outputs.")]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"{type(model).__name__} is no question-answering model: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(keys.unexpected_keys) or 'none'}"
        )
    return typed.to(next(model.parameters()).device).train(model.training)
