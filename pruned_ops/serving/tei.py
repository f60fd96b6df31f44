"""The routes of text-embeddings-inference, by which Hugging Face's clients ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request, Response
from pydantic import BeforeValidator, Field

from pruned_ops.serving.embedding import embeddings, tokens_of
from pruned_ops.serving.forms import (
    FloatArray,
    Form,
    TextOrTexts,
    Texts,
    TextsOrIds,
    as_list,
    sigmoid,
    softmax,
)
from pruned_ops.serving.models import Served
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import Service, as_json, characters
from pruned_ops.serving.texts import Text
from pruned_ops.version import __version__

Direction = Literal["left", "right", "Left", "Right"]
# What makes scores of logits, by the names of the pipelines.
_FUNCTIONS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "sigmoid": sigmoid,
    "softmax": softmax,
    "none": lambda logits: logits,
}


class _Cut(Form):
    """What all of TEI's requests say of texts that are too long, and the model, of which TEI has only one."""

    model: str | None = None
    truncate: bool | None = None
    truncation_direction: Direction = "right"


class EmbedRequest(_Cut):
    inputs: TextsOrIds
    normalize: bool | None = True
    prompt_name: str | None = None
    dimensions: int | None = None


class SparseRequest(_Cut):
    inputs: TextOrTexts
    prompt_name: str | None = None


class RerankRequest(_Cut):
    query: str
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False


def _predicted(value: Any) -> Any:
    """A text, a pair of texts, or a list of lists of one or two texts."""
    if type(value) is str:
        return value
    if type(value) is list and value:
        rows = [value] if type(value[0]) is str else value
        if all(type(row) is list and len(row) in (1, 2) and set(map(type, row)) == {str} for row in rows):
            return value
    raise ValueError("a text, a pair of texts, or a list of lists of one or two texts is needed")


class PredictParameters(Form):
    """Of the pipelines' form, which InferenceClient has."""

    top_k: int | None = Field(default=None, ge=1)
    function_to_apply: Literal["default", "sigmoid", "softmax", "none"] | None = None


class PredictRequest(_Cut):
    inputs: Annotated[Any, BeforeValidator(_predicted)]
    raw_scores: bool = False
    parameters: PredictParameters | None = None


class SimilarityInputs(Form):
    source_sentence: str
    sentences: Texts


class SimilarityParameters(_Cut):
    prompt_name: str | None = None


class SimilarityRequest(Form):
    inputs: SimilarityInputs
    model: str | None = None
    parameters: SimilarityParameters | None = None


def _side(form: _Cut) -> Literal["left", "right"]:
    return "left" if form.truncation_direction.lower() == "left" else "right"


def _cuts(service: Service, form: _Cut) -> bool:
    return service.limits.auto_truncate if form.truncate is None else form.truncate


async def embed(service: Service, request: Request) -> Response:
    """POST /embed: texts or token ids -> a list of embeddings."""
    return await embedded(service, request, await service.read(request, EmbedRequest))


async def embedded(service: Service, request: Request, form: EmbedRequest) -> Response:
    """The same for a body that was read already."""
    served = service.pick(form.model, "embedder")
    vectors, tokens = await embeddings(
        service, request, served, as_list(form.inputs), "inputs",
        cut=_cuts(service, form), side=_side(form), prompt_name=form.prompt_name, dimensions=form.dimensions,
        normalise=form.normalize is not False,
    )  # fmt: skip
    return as_json(vectors, headers=_computed(tokens))


async def embed_sparse(service: Service, request: Request) -> Response:
    """POST /embed_sparse: texts -> for each the indices and values that are not 0."""
    form = await service.read(request, SparseRequest)
    served = service.pick(form.model, "sparse embedder")
    texts = as_list(form.inputs)
    service.check_count(texts, "inputs")
    sequences = await tokens_of(
        service, served, texts, "inputs", _cuts(service, form), _side(form), form.prompt_name
    )
    sparse_vectors = []
    for vector in await service.computed(request, served, sequences):
        indices = np.flatnonzero(vector)
        values = vector[indices].tolist()
        pairs = zip(indices.tolist(), values, strict=True)
        sparse_vectors.append([{"index": index, "value": value} for index, value in pairs])
    return as_json(sparse_vectors, headers=_computed(sum(map(len, sequences))))


async def rerank(service: Service, request: Request, form: RerankRequest) -> Response:
    """POST /rerank, TEI's form of it: a query and texts -> their places and scores, best first."""
    served = service.pick(form.model, "reranker")
    service.check_count(form.texts, "texts")
    pairs: list[Text] = [(form.query, text) for text in form.texts]
    logits, tokens = await logits_of(
        service, request, served, pairs, _cuts(service, form), _side(form), field="texts"
    )
    scores = (logits if form.raw_scores else sigmoid(logits))[:, 0]
    ranks = [
        {"index": int(place), "score": float(scores[place])}
        | ({"text": form.texts[place]} if form.return_text else {})
        for place in np.argsort(-scores, kind="stable")
    ]
    return as_json(ranks, headers=_computed(tokens))


async def predict(service: Service, request: Request) -> Response:
    """POST /predict: texts or pairs -> for each the labels and their scores, best first."""
    return await predicted(service, request, await service.read(request, PredictRequest))


async def predicted(service: Service, request: Request, form: PredictRequest) -> Response:
    """The same for a body that was read already."""
    served = service.pick(form.model, "classifier", "reranker")
    is_one = type(form.inputs) is str or type(form.inputs[0]) is str
    rows = [form.inputs] if is_one else form.inputs
    service.check_count(rows, "inputs")
    texts: list[Text] = [
        row if type(row) is str else row[0] if len(row) == 1 else (row[0], row[1]) for row in rows
    ]
    logits, tokens = await logits_of(
        service, request, served, texts, _cuts(service, form), _side(form), field="inputs"
    )
    asked = form.parameters or PredictParameters()
    function = asked.function_to_apply or "default"
    if function == "default":
        is_alone = len(served.labels) == 1 or served.multi_label
        function = "none" if form.raw_scores else "sigmoid" if is_alone else "softmax"
    predictions = [_labelled(served, _FUNCTIONS[function](row))[: asked.top_k] for row in logits]
    # The pipelines' form has a list for each text, also for a single one.
    is_flat = is_one and form.parameters is None
    return as_json(predictions[0] if is_flat else predictions, headers=_computed(tokens))


def _labelled(served: Served, scores: FloatArray) -> list[dict[str, Any]]:
    order = np.argsort(-scores, kind="stable")
    return [{"score": float(scores[place]), "label": served.labels[place]} for place in order]


async def logits_of(
    service: Service,
    request: Request,
    served: Served,
    texts: list[Text],
    cut: bool,
    side: Literal["left", "right"] = "right",
    *,
    field: str,
) -> tuple[Any, int]:
    """The logits (texts, labels) of texts or pairs, and how many tokens they took. The first of a pair, a
    query, has to hold something. Errors: Refusal."""
    for place, text in enumerate(texts):
        if not (text if isinstance(text, str) else text[0]):
            sentence = "the query is empty" if isinstance(text, tuple) else f"{field} {place} is empty"
            raise Refusal("empty", f"{sentence}: it has no text", field)
    size = sum(len(text) if isinstance(text, str) else characters(text) for text in texts)
    sequences = await service.beside(size, lambda: served.encoder.encode(texts, cut, side))
    return np.stack(await service.computed(request, served, sequences)), sum(map(len, sequences))


async def similarity(service: Service, request: Request) -> Response:
    """POST /similarity: a sentence and others -> the cosine of each with it."""
    return await compared(service, request, await service.read(request, SimilarityRequest))


async def compared(service: Service, request: Request, form: SimilarityRequest) -> Response:
    """The same for a body that was read already."""
    asked = form.parameters or SimilarityParameters()
    served = service.pick(asked.model if form.model is None else form.model, "embedder")
    service.check_count(form.inputs.sentences, "sentences")
    texts = [form.inputs.source_sentence, *form.inputs.sentences]
    vectors, tokens = await embeddings(
        service, request, served, texts, "inputs",
        cut=_cuts(service, asked), side=_side(asked), prompt_name=asked.prompt_name,
    )  # fmt: skip
    return as_json(vectors[1:] @ vectors[0], headers=_computed(tokens))


def _computed(tokens: int) -> dict[str, str]:
    return {"x-compute-tokens": str(tokens)}


def info(service: Service) -> dict[str, Any]:
    """GET /info: the first model as TEI tells of its only one; then every model, in our own words."""
    first, limits = next(iter(service.models.values())), service.limits
    return {
        "model_id": first.name,
        "model_sha": None,
        "model_dtype": first.dtype,
        "model_type": _model_type(first),
        "max_concurrent_requests": limits.requests,
        "max_input_length": first.encoder.max_tokens,
        "max_batch_tokens": limits.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.texts,
        "auto_truncate": limits.auto_truncate,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "models": [
            {
                "name": served.name,
                "kind": served.kind,
                "dtype": served.dtype,
                "max_input_length": served.encoder.max_tokens,
                "dimension": served.dimension or None,
                "pooling": served.pooling or None,
                "labels": list(served.labels),
                "prompts": served.prompts,
                "default_prompt": served.default_prompt,
                "notes": list(served.notes),
            }
            for served in service.models.values()
        ],
    }


def _model_type(served: Served) -> dict[str, Any]:
    """The kind of a model in TEI's words; question answering is none of them."""
    if served.kind in ("embedder", "sparse embedder"):
        return {"embedding": {"pooling": served.pooling}}
    if served.kind == "question answering":
        return {"question_answering": {}}
    labels = {str(place): label for place, label in enumerate(served.labels)}
    places = {label: place for place, label in enumerate(served.labels)}
    return {served.kind: {"id2label": labels, "label2id": places}}
