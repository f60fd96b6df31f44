"""Embeddings for every API that has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Request

from pruned_ops.serving.forms import FloatArray, normalised
from pruned_ops.serving.models import Served
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import Service, characters
from pruned_ops.serving.texts import Side, TokenSequence

LONGEST_PROMPT = 64  # characters of a prompt's name that are repeated in an error


async def embeddings(
    service: Service,
    request: Request,
    served: Served,
    texts: list[Any],
    field: str,
    *,
    cut: bool,
    side: Side = "right",
    prompt_name: str | None = None,
    dimensions: int | None = None,
    normalise: bool = True,
) -> tuple[FloatArray, int]:
    """The embeddings (texts, dimensions) of texts or lists of token ids, and how many tokens they took.

    field: what the API calls the texts. cut: whether a text that is too long loses its end (side: the other
    one). Errors: Refusal."""
    service.check_count(texts, field)
    sequences = await tokens_of(service, served, texts, field, cut, side, prompt_name)
    vectors = np.stack(await service.computed(request, served, sequences))
    if dimensions is not None:
        if not 1 <= dimensions <= served.dimension:
            sentence = f"{served.name} has {served.dimension} dimensions; {dimensions} cannot be had"
            raise Refusal("invalid", sentence, "dimensions")
    vectors = np.ascontiguousarray(vectors[:, : dimensions or served.dimension])
    return normalised(vectors) if normalise else vectors, sum(map(len, sequences))


async def tokens_of(
    service: Service,
    served: Served,
    texts: list[Any],
    field: str,
    cut: bool,
    side: Side = "right",
    prompt_name: str | None = None,
) -> list[TokenSequence]:
    """The tokens of texts, or of lists of token ids, before which no prompt can be put. Errors: Refusal."""
    prompt = _prompt(served, prompt_name)
    if not isinstance(texts[0], str):
        if prompt_name is not None:
            sentence = "a prompt is put before texts, and these are token ids: give its ids with them"
            raise Refusal("invalid", sentence, "prompt_name")
        return await service.beside(characters(texts), lambda: served.encoder.of_ids(texts, cut, side))
    for place, text in enumerate(texts):
        if not text:
            raise Refusal("empty", f"{field} {place} is empty: it has no text", field)
    if prompt:
        texts = [prompt + text for text in texts]
    return await service.beside(characters(texts), lambda: served.encoder.encode(texts, cut, side))


def _prompt(served: Served, name: str | None) -> str:
    name = served.default_prompt if name is None else name
    if name is None:
        return ""
    if name not in served.prompts:
        known = ", ".join(served.prompts) or "none"
        sentence = f"{served.name} has no prompt {name[:LONGEST_PROMPT]!r}; it has {known}"
        raise Refusal("invalid", sentence, "prompt_name")
    return served.prompts[name]
