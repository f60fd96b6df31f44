"""Which of the known heads a model has, by its class, and the hooks that let it compute this head on packed
rows."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn

from pruned_ops.models.encoder import PrunedPreTrainedModel
from pruned_ops.models.families.description import ANSWERS, TEXT_LABELS, TOKEN_LABELS, WORDS
from pruned_ops.models.families.known import family_of, stock_head
from pruned_ops.models.heads import (
    PrunedBertForNaturalQuestions,
    PrunedBertForQuestionAnswering,
    PrunedBertForSequenceClassification,
    PrunedBertForTokenClassification,
)
from pruned_ops.runtime.packed_heads import (
    PackedHead,
    SpanAndTypeHead,
    SpanHead,
    TextHead,
    TokenHead,
    VocabularyHead,
    after_answering,
    after_classifying,
    before,
)

# By the head's name in the publishers' classes, and by our own classes.
_OF_STOCK: dict[str, type[PackedHead]] = {
    ANSWERS: SpanHead,
    TEXT_LABELS: TextHead,
    TOKEN_LABELS: TokenHead,
    WORDS: VocabularyHead,
}
_OF_OURS: dict[type[Any], type[PackedHead]] = {
    PrunedBertForNaturalQuestions: SpanAndTypeHead,
    PrunedBertForQuestionAnswering: SpanHead,
    PrunedBertForSequenceClassification: TextHead,
    PrunedBertForTokenClassification: TokenHead,
}


def known_head(kind: type[Any]) -> tuple[type[PackedHead], type[Any]] | None:
    """The packed head of a class of models, and the class among its bases that is known to have it; None for
    a class without one."""
    for base in kind.__mro__:
        if base in _OF_OURS:
            return _OF_OURS[base], base
        of_stock = stock_head(base)
        if of_stock is not None:
            return _OF_STOCK[of_stock[1]], base
    return None


def reads_place_0(model: Any) -> bool:
    """Whether this is a model of a known class that reads a text's label from position 0, padding or not;
    ours read it from the first real token, and some the mean over all real ones."""
    known = known_head(type(model))
    if known is None or known[0] is not TextHead or isinstance(model, PrunedPreTrainedModel):
        return False
    return not family_of(model.config).pools_mean(model.config)


def gives_answers(model: nn.Module) -> bool:
    """Whether this is a model of a known class that gives start and end logits."""
    known = known_head(type(model))
    return known is not None and issubclass(known[0], SpanHead)


def gives_labels(model: nn.Module) -> bool:
    """Whether this is a model of a known class that gives labels of texts or of tokens."""
    known = known_head(type(model))
    return known is not None and issubclass(known[0], (TextHead, TokenHead))


def packed_head(module: nn.Module) -> PackedHead | None:
    """The packed head of a model whose forward is that of a known class, for answers or labels; None for
    another model."""
    head = _any_packed_head(module)
    return None if isinstance(head, VocabularyHead) else head


def _any_packed_head(module: nn.Module) -> PackedHead | None:
    known = known_head(type(module))
    if known is None:
        return None
    # The pruned classifiers share one forward, and differ in the `classified` that it calls.
    is_changed = any(
        getattr(type(module), name, None) is not getattr(known[1], name, None)
        for name in ("forward", "classified")
    )
    return None if is_changed else known[0](module, known[1])


def hook_head(module: nn.Module) -> tuple[PackedHead | None, bool]:
    """Register the hooks that a model of a known class needs around its packed encoder. They do nothing while
    its encoder is not packed.

    Returns the head that is computed on packed rows, or None where it cannot be, and whether the model is of
    a known class."""
    known = known_head(type(module))
    if known is None:
        return None, False
    parameters = inspect.signature(type(module).forward).parameters
    names = tuple(parameters)[1:]
    # transformers 4's forwards do not hand keyword arguments on to the encoder.
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if stock_head(known[1]) is not None:
        hands_on &= family_of(module.config).hands_on
    head = _any_packed_head(module) if hands_on else None
    after = after_answering if issubclass(known[0], SpanHead) else after_classifying
    asked = partial(before, names, head, reads_place_0(module))
    module.register_forward_pre_hook(asked, with_kwargs=True)
    # The first of all: hooks that the model has already see, and may change, its logits.
    module.register_forward_hook(partial(after, names), with_kwargs=True, prepend=True)
    return head, True
