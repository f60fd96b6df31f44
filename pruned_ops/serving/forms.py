"""Parts of request bodies that several APIs share, checked with a sentence for each fault."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict

FloatArray = NDArray[np.floating[Any]]


class Form(BaseModel):
    """A body; what it has besides the fields of its route is not read, because clients send more."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class AnyForm(BaseModel):
    """A body of which one field tells the form: it is checked when that is known."""

    model_config = ConfigDict(extra="allow")

    @property
    def fields(self) -> dict[str, Any]:
        """All of it."""
        return self.model_extra or {}


def _is_texts(value: Any) -> bool:
    return type(value) is list and all(type(text) is str for text in value)


def _is_ids(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(number) is int for number in value)


def _text_or_texts(value: Any) -> Any:
    if type(value) is str or _is_texts(value):
        return value
    raise ValueError("a text or a list of texts is needed")


def _texts_or_ids(value: Any) -> Any:
    """Texts, or the token ids of one text or of several."""
    if type(value) is str or _is_texts(value) or _is_ids(value):
        return value
    if type(value) is list and all(_is_ids(ids) for ids in value):
        return value
    raise ValueError("a text, a list of texts, or token ids of one or several texts are needed")


def _texts(value: Any) -> Any:
    if _is_texts(value):
        return value
    raise ValueError("a list of texts is needed")


def _documents(value: Any) -> Any:
    """A list of texts, or of objects that hold one as their `text`."""
    if type(value) is not list:
        raise ValueError("a list of texts is needed")
    texts = [document.get("text") if type(document) is dict else document for document in value]
    if not all(type(text) is str for text in texts):
        raise ValueError("each document has to be a text, or an object with a text")
    return texts


TextOrTexts = Annotated[Any, BeforeValidator(_text_or_texts)]
TextsOrIds = Annotated[Any, BeforeValidator(_texts_or_ids)]
Texts = Annotated[list[str], BeforeValidator(_texts)]
Documents = Annotated[list[str], BeforeValidator(_documents)]


def as_list(value: Any) -> list[Any]:
    """Texts, or lists of token ids, of a value that may be one of either."""
    if type(value) is str or _is_ids(value):
        return [value]
    return list(value)


def normalised(vectors: FloatArray) -> FloatArray:
    """Each row (rows, numbers) with a length of 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def sigmoid(values: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)), for values of any size."""
    return np.exp(-np.logaddexp(0, -values.astype(np.float64)))


def softmax(values: FloatArray) -> FloatArray:
    """Probabilities along the last axis."""
    powers = np.exp(values.astype(np.float64) - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
