"""What the routes of every API share: reading a request, finding its model, and having its texts computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from pruned_ops.files import parse_json, shown
from pruned_ops.serving.batcher import Batcher
from pruned_ops.serving.folders import Kind
from pruned_ops.serving.limits import Limits
from pruned_ops.serving.metrics import Metrics
from pruned_ops.serving.models import Served
from pruned_ops.serving.refusals import Refusal

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

_ARTICLES: dict[Kind, str] = {
    "embedder": "an ", "sparse embedder": "a ", "reranker": "a ", "classifier": "a ",
    "question answering": "a model for ",
}  # fmt: skip
# Bytes of a body, or characters of texts, that are parsed or tokenised at once: it takes a millisecond at
# most, and another thread would cost about as much.
_AT_ONCE = 4096
# A body that is too large is read on for so many times the limit, and thrown away, so that its sender gets to
# read why it was refused.
_READ_ON = 4


class ClientGone(Exception):
    """The client left: nobody reads an answer."""


class Service:
    """The models of one server, with the thread that computes them and the one for long texts."""

    def __init__(self, models: Mapping[str, Served], limits: Limits) -> None:
        self.models, self.limits, self.metrics = models, limits, Metrics()
        self.batcher = Batcher(limits, self.metrics)
        self.metrics.watch(self.batcher)
        # One thread: more would take the models' cores.
        self._beside = ThreadPoolExecutor(1, "pruned_ops-texts")
        self._aliases = {served.source: served for served in models.values()} | dict(models)
        self._body_bytes = 0  # of the requests under way

    # The end of the server; see connections.Ends.

    @property
    def is_working(self) -> bool:
        return self.batcher.is_working

    def end(self) -> None:
        self.batcher.end()

    def give_up(self) -> None:
        self.batcher.give_up()

    def of_kinds(self, *kinds: Kind) -> list[Served]:
        """The models of these kinds, the first kind's first."""
        return [served for kind in kinds for served in self.models.values() if served.kind == kind]

    def pick(self, name: str | None, *kinds: Kind) -> Served:
        """The model of this name, or the first of these kinds. Errors: Refusal where there is none, and for
        one of another kind."""
        fitting = self.of_kinds(*kinds)
        needed = " or ".join(f"{_ARTICLES[kind]}{kind}" for kind in kinds)
        if name is None:
            if not fitting:
                raise Refusal("wrong_model", f"no model is served that this route is for: it needs {needed}")
            return fitting[0]
        served = self._aliases.get(name)
        if served is None:
            names = ", ".join(self.models)
            raise Refusal("unknown_model", f"there is no model {shown(name)}; there is {names}", "model")
        if served not in fitting:
            is_one = f"{_ARTICLES[served.kind]}{served.kind}"
            sentence = f"{served.name} is {is_one}, and this route needs {needed}"
            raise Refusal("wrong_model", sentence, "model")
        return served

    @contextmanager
    def serving(self, request: Request) -> Iterator[None]:
        """While a request is under way: batches may wait for its texts, and its bytes are counted."""
        request.state.arrival, request.state.bytes = self.batcher.arrival(), 0
        try:
            yield
        finally:
            request.state.arrival.is_over()
            self._body_bytes -= request.state.bytes

    async def read(self, request: Request, form: type[Body]) -> Body:
        """The body of a request. Errors: Refusal where it is too large or of another form."""
        body = await self._body(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("media_type", "the request has to come as application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refusal("media_type", "the body has to come uncompressed, without a Content-Encoding")
        try:
            if len(body) <= _AT_ONCE:
                return form.model_validate(parse_json(body))
            return await asyncio.to_thread(lambda: form.model_validate(parse_json(body)))
        except ValidationError as error:
            raise _misshapen(error) from None
        except ValueError as error:
            raise Refusal("invalid", f"the request is no JSON: {error}") from None

    @staticmethod
    def parsed(fields: Mapping[str, Any], form: type[Body]) -> Body:
        """A body that was read as something more general. Errors: Refusal."""
        try:
            return form.model_validate(fields)
        except ValidationError as error:
            raise _misshapen(error) from None

    async def _body(self, request: Request) -> bytes:
        """The bytes of a body, whatever the request says of their number."""
        limit, total = self.limits.body_bytes, 0
        body = bytearray()
        try:
            async for part in request.stream():
                total += len(part)
                if total > _READ_ON * limit:
                    break
                if total > limit:
                    self._hold(request, -request.state.bytes)
                    body.clear()
                    continue
                body += part
                self._hold(request, len(part))
                if self._body_bytes > self.limits.bodies_bytes:
                    raise Refusal(
                        "overloaded",
                        "the requests under way hold as many bytes as they may: ask again later",
                        retry_after=self.batcher.retry_after(),
                        close=True,
                    )
        except ClientDisconnect:
            raise ClientGone from None
        if total > limit:
            sentence = f"a request of at most {limit} bytes is taken"
            raise Refusal("too_large", sentence, close=total > _READ_ON * limit)
        return bytes(body)

    def _hold(self, request: Request, change: int) -> None:
        request.state.bytes += change
        self._body_bytes += change

    def check_count(self, texts: Sequence[Any], field: str) -> None:
        """Refusal for more texts than one request may have, and for none."""
        if not texts:
            raise Refusal("empty", f"{field} is empty: at least one is needed", field)
        if len(texts) > self.limits.texts:
            raise Refusal(
                "too_large", f"{field} has {len(texts)} entries, and at most {self.limits.texts} are taken",
                field,
            )  # fmt: skip

    async def beside(self, size: int, work: Callable[[], T], may_wait: bool = False) -> T:
        """What is made of texts of so many characters or ids, by their tokenizer for example. Long ones do
        not hold up the server, nor does work that may have to wait for others'."""
        if size <= _AT_ONCE and not may_wait:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._beside, work)

    async def computed(self, request: Request, served: Served, sequences: list[Any]) -> list[Any]:
        """The model's result for each sequence. Where the client leaves meanwhile, the work is dropped.
        Errors: Refusal; ClientGone."""
        job = self.batcher.begin(served, sequences, request.state.arrival)
        left = asyncio.ensure_future(_left(request))
        left.add_done_callback(lambda _: job.done.cancel())
        try:
            return await job.done
        except asyncio.CancelledError:
            if left.done():
                raise ClientGone from None
            raise
        finally:
            left.cancel()
            self.batcher.forget(job)


async def _left(request: Request) -> None:
    """Wait until the client of a request, which was read to its end, leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _misshapen(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body, as a sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    names = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "model_attributes_type"):  # their own sentence names a class of ours
        message = "a JSON object is needed"
    place = ".".join(names)
    return Refusal("invalid", f"{place}: {message}" if place else message, names[0] if names else None)


def characters(texts: Iterable[str | list[int]]) -> int:
    """The characters of texts, or the token ids of lists, together."""
    return sum(map(len, texts))


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with this value, in which numpy's arrays are lists; a float32 has as few digits as tell it
    from others."""
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers, "application/json")
