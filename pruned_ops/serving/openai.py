"""The routes of OpenAI's API for embeddings."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import Request, Response

from pruned_ops.serving.embedding import embeddings
from pruned_ops.serving.forms import FloatArray, Form, TextsOrIds, as_list
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import Service, as_json


class EmbeddingsRequest(Form):
    model: str
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


async def create_embeddings(service: Service, request: Request) -> Response:
    """POST /v1/embeddings: texts or token ids -> embeddings of length 1, as numbers or base64 of float32."""
    form = await service.read(request, EmbeddingsRequest)
    served = service.pick(form.model, "embedder")
    vectors, tokens = await embeddings(
        service, request, served, as_list(form.input), "input",
        cut=service.limits.auto_truncate, dimensions=form.dimensions,
    )  # fmt: skip
    data = [
        {"object": "embedding", "index": place, "embedding": embedding}
        for place, embedding in enumerate(_written(vectors, form.encoding_format))
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": served.name, "usage": usage})


def _written(vectors: FloatArray, encoding: str) -> list[Any]:
    if encoding == "float":
        return list(vectors)
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in np.asarray(vectors)]


def list_models(service: Service, started: int) -> dict[str, Any]:
    """GET /v1/models: the models, with what each one does."""
    return {"object": "list", "data": [_model(service, name, started) for name in service.models]}


def retrieve_model(service: Service, name: str, started: int) -> dict[str, Any]:
    """GET /v1/models/NAME. Errors: Refusal for an unknown one."""
    if name not in service.models:
        raise Refusal("unknown_model", f"there is no model {name[:100]!r}", "model")
    return _model(service, name, started)


def _model(service: Service, name: str, started: int) -> dict[str, Any]:
    kind = service.models[name].kind
    return {"id": name, "object": "model", "created": started, "owned_by": "pruned_ops", "kind": kind}
