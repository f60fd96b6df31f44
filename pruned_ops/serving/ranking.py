"""Reranking as Cohere's and Jina's clients ask for it, and /rerank, whose form the body tells."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import numpy as np
from fastapi import Request, Response
from pydantic import Field

from pruned_ops.serving import refusals, tei
from pruned_ops.serving.forms import AnyForm, Documents, Form, sigmoid
from pruned_ops.serving.models import Served
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import Service, as_json
from pruned_ops.serving.texts import Text


class RankingRequest(Form):
    """What Cohere's and Jina's requests have in common."""

    model: str | None = None
    query: str
    documents: Documents
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = Field(default=None, ge=1)


async def cohere_v1(service: Service, request: Request) -> Response:
    """POST /v1/rerank, which Jina's clients ask, too: a query and documents -> the best first."""
    form = await service.read(request, RankingRequest)
    return await _ranked(service, request, form, version="1")


async def cohere_v2(service: Service, request: Request) -> Response:
    """POST /v2/rerank: the same without documents in the answer."""
    form = await service.read(request, RankingRequest)
    return await _ranked(service, request, form, version="2")


async def rerank(service: Service, request: Request) -> Response:
    """POST /rerank: TEI's form has `texts`, Jina's `documents`."""
    fields = (await service.read(request, AnyForm)).fields
    if "documents" not in fields:
        return await tei.rerank(service, request, service.parsed(fields, tei.RerankRequest))
    request.state.form = refusals.reranking
    if "texts" in fields:
        raise Refusal("invalid", "a request has texts or documents, not both", "texts")
    return await _ranked(service, request, service.parsed(fields, RankingRequest), version="1")


async def _ranked(service: Service, request: Request, form: RankingRequest, version: str) -> Response:
    """A document that is too long is cut, as both APIs do."""
    served = service.pick(form.model, "reranker")
    longest = served.encoder.max_tokens
    if form.max_tokens_per_doc is not None and form.max_tokens_per_doc < longest:
        raise Refusal(
            "invalid",
            f"max_tokens_per_doc is {form.max_tokens_per_doc}; documents are cut where query and document "
            f"have {longest} tokens, and not before: send shorter ones",
            "max_tokens_per_doc",
        )
    service.check_count(form.documents, "documents")
    pairs: list[Text] = [(form.query, document) for document in form.documents]
    logits, tokens = await tei.logits_of(service, request, served, pairs, True, field="query")
    scores = sigmoid(logits)[:, 0]
    order = np.argsort(-scores, kind="stable")[: form.top_n]
    results = [_result(form, int(place), float(scores[place])) for place in order]
    return as_json(_answer(served, results, tokens, version))


def _result(form: RankingRequest, place: int, score: float) -> dict[str, Any]:
    result: dict[str, Any] = {"index": place, "relevance_score": score}
    if form.return_documents:
        result["document"] = {"text": form.documents[place]}
    return result


def _answer(served: Served, results: list[dict[str, Any]], tokens: int, version: str) -> dict[str, Any]:
    """Cohere's fields are id and meta, Jina's model and usage; results are both's."""
    return {
        "id": str(uuid4()),
        "model": served.name,
        "results": results,
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
    }
