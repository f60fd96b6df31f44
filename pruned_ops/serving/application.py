"""All routes of a server, each answering and refusing as the clients of its API expect."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from pruned_ops.serving import answering, openai, ranking, tei
from pruned_ops.serving.connections import Hosts
from pruned_ops.serving.forms import AnyForm
from pruned_ops.serving.guard import Form, Guard, Keys, form_of, response_of
from pruned_ops.serving.metrics import CONTENT_TYPE
from pruned_ops.serving.refusals import Refusal
from pruned_ops.serving.service import ClientGone, Service, as_json

Route = Callable[[Service, Request], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]

POSTED: dict[str, Route] = {
    "/embed": tei.embed,
    "/embed_sparse": tei.embed_sparse,
    "/predict": tei.predict,
    "/similarity": tei.similarity,
    "/rerank": ranking.rerank,
    "/v1/embeddings": openai.create_embeddings,
    "/v1/rerank": ranking.cohere_v1,
    "/v2/rerank": ranking.cohere_v2,
    "/v1/qa": answering.answer,
}
GOT = ("/", "/health", "/ping", "/info", "/metrics", "/v1/models")
_LOG = logging.getLogger("pruned_ops.serving")
_NOBODY = 499  # the status of an answer that nobody reads


@dataclass(frozen=True)
class Access:
    """Who may ask.

    hosts: the names under which the server answers. keys: what requests have to bring, if anything. origins:
    sites whose pages may ask from a browser; none by default.
    """

    hosts: Hosts
    keys: Keys | None = None
    origins: tuple[str, ...] = ()


def application(service: Service, access: Access) -> Any:
    """The server as an ASGI application."""
    app = FastAPI(title="pruned-ops serve", docs_url=None, redoc_url=None, openapi_url=None)
    posted = {path: _endpoint(service, route) for path, route in POSTED.items()}
    posted["/"] = _endpoint(service, _default_route(service))
    for path, endpoint in posted.items():
        app.router.add_route(path, endpoint, methods=["POST"])
    _add_information(app, service)
    app.add_exception_handler(HTTPException, _unrouted)
    guarded = Guard(Posted(app, posted), service, access.hosts, access.keys, {*POSTED, *GOT})
    if not access.origins:
        return guarded
    return CORSMiddleware(  # around the guard: a page that may ask may also read why it is refused
        guarded,
        allow_origins=list(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


class Posted:
    """An application around another: what is posted to a known path goes to its endpoint at once, without
    FastAPI's layers and its search through all routes."""

    def __init__(self, application: Any, endpoints: Mapping[str, Endpoint]) -> None:
        self._application, self._endpoints = application, endpoints

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await self._application(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _endpoint(service: Service, route: Route) -> Endpoint:
    """The route with its refusals said in the words of its API."""

    async def endpoint(request: Request) -> Response:
        with service.serving(request):
            try:
                return await route(service, request)
            except Refusal as refused:
                refusal = refused
            except ClientGone:
                return Response(status_code=_NOBODY)
            except Exception:  # a fault of ours: the server goes on, and says where it was
                _LOG.exception("%s failed", request.scope["path"])
                refusal = Refusal("fault", "the server failed at this request")
            form: Form = getattr(request.state, "form", form_of(request.scope["path"]))
            return response_of(refusal, form)

    return endpoint


def _default_route(service: Service) -> Route:
    """What POST / does, as TEI and Hugging Face's endpoints have it: it depends on the first model."""
    routes: dict[str, Route] = {
        "embedder": _embed_or_compare,
        "sparse embedder": tei.embed_sparse,
        "reranker": _rerank_or_predict,
        "classifier": tei.predict,
        "question answering": answering.pipeline,
    }
    return routes[next(iter(service.models.values())).kind]


async def _embed_or_compare(service: Service, request: Request) -> Response:
    """Embeddings, or the similarities that InferenceClient.sentence_similarity asks for here."""
    fields = (await service.read(request, AnyForm)).fields
    if isinstance(fields.get("inputs"), dict):
        return await tei.compared(service, request, service.parsed(fields, tei.SimilarityRequest))
    return await tei.embedded(service, request, service.parsed(fields, tei.EmbedRequest))


async def _rerank_or_predict(service: Service, request: Request) -> Response:
    fields = (await service.read(request, AnyForm)).fields
    if "inputs" in fields:
        return await tei.predicted(service, request, service.parsed(fields, tei.PredictRequest))
    return await tei.rerank(service, request, service.parsed(fields, tei.RerankRequest))


def _add_information(app: FastAPI, service: Service) -> None:
    """Add the routes that tell of the server and its models."""
    started = int(time.time())
    page = files("pruned_ops.serving").joinpath("page.html").read_text(encoding="utf-8")

    async def index(request: Request) -> Response:
        if service.of_kinds("question answering"):
            return HTMLResponse(page)
        models = "".join(f"{served.name}: {served.kind}\n" for served in service.models.values())
        return PlainTextResponse(f"pruned-ops serves\n{models}")

    async def health(request: Request) -> Response:
        return as_json({"status": "ok", "models": list(service.models)})

    async def information(request: Request) -> Response:
        return as_json(tei.info(service))

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def models(request: Request) -> Response:
        return as_json(openai.list_models(service, started))

    async def model(request: Request) -> Response:
        try:
            return as_json(openai.retrieve_model(service, request.path_params["name"], started))
        except Refusal as refusal:
            return response_of(refusal, form_of(request.scope["path"]))

    for path, endpoint in (
        ("/", index), ("/health", health), ("/ping", health), ("/info", information), ("/metrics", metrics),
        ("/v1/models", models), ("/v1/models/{name:path}", model),
    ):  # fmt: skip
        app.router.add_route(path, endpoint, methods=["GET"])


async def _unrouted(request: Request, error: Exception) -> Response:
    """What has no route, or not for this method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 405:
        refusal = Refusal("wrong_method", f"{request.method} is not for {path[:200]}")
    else:
        refusal = Refusal("unknown_route", f"there is no route {path[:200]}")
    return response_of(refusal, form_of(path))
