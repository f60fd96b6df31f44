"""What every request has to pass before a route reads it: the host it is for, the key, and the count."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

from pruned_ops.files import read_text
from pruned_ops.serving import refusals
from pruned_ops.serving.connections import Hosts
from pruned_ops.serving.refusals import ErrorBody, Refusal
from pruned_ops.serving.service import Service, as_json

Form = Callable[[Refusal], ErrorBody]

# Only the page's own styles and scripts run in it, and no other site may show it.
POLICY = (
    b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    b"frame-ancestors 'none'"
)
_HEADERS = [(b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff")]
# Whoever may ask nothing else may ask these: whether the server lives, and the page without its answers.
_OPEN = ("/", "/health", "/ping")


def form_of(path: str) -> Form:
    """How the API whose route this is says that it refuses."""
    if path.startswith(("/v1/embeddings", "/v1/models")):
        return refusals.openai
    if path in ("/v1/rerank", "/v2/rerank"):
        return refusals.reranking
    return refusals.plain if path == "/v1/qa" else refusals.tei


def response_of(refusal: Refusal, form: Form) -> Any:
    """The response that refuses a request."""
    answer = form(refusal)
    return as_json(answer.body, answer.status, refusal.headers)


class Keys:
    """The keys of a file, one a line; requests bring one as `Authorization: Bearer KEY`.

    Errors: OSError where the file cannot be read; ValueError where it holds no key, or one that no header
    can hold."""

    def __init__(self, path: Path) -> None:
        keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not keys or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
            raise ValueError(f"{path} has to hold keys, one a line, of printable ASCII without blanks")
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    def include(self, header: bytes) -> bool:
        """Whether the header brings one of the keys. How long it takes tells nothing of them."""
        kind, _, key = header.partition(b" ")
        digest = sha256(key.strip()).digest()
        is_known = False
        for known in self._hashes:
            is_known |= hmac.compare_digest(digest, known)
        return is_known and kind.lower() == b"bearer"


class Guard:
    """An application around another: it refuses what is not for this server, and counts what is answered.

    routes: the paths that are counted by name."""

    def __init__(
        self,
        application: Any,
        service: Service,
        hosts: Hosts,
        keys: Keys | None,
        routes: Collection[str],
    ) -> None:
        self._application, self._service, self._hosts, self._keys = application, service, hosts, keys
        self._routes = frozenset(routes)
        self._under_way = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        start, path, status = time.perf_counter(), scope["path"], 500

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await response_of(refusal, form_of(path))(scope, receive, sent)
                return
            self._under_way += 1
            try:
                await self._application(scope, receive, sent)
            finally:
                self._under_way -= 1
        finally:
            route = path if path in self._routes else "other"
            self._service.metrics.answered(route, status, time.perf_counter() - start)

    def _refusal(self, scope: Any) -> Refusal | None:
        """Why the request is refused unread, if it is."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._hosts.include(host):
            sentence = (
                f"this server is not {host[:200]!r}; --allow-host names hosts that it is besides localhost"
            )
            return Refusal("wrong_host", sentence, close=True)
        is_open = scope["path"] in _OPEN and scope["method"] in ("GET", "HEAD")
        if is_open or scope["method"] == "OPTIONS":
            return None
        if self._keys is not None and not self._keys.include(headers.get(b"authorization", b"")):
            return Refusal("no_key", "an API key is needed, as Authorization: Bearer KEY", close=True)
        if scope["method"] == "POST" and self._under_way >= self._service.limits.requests:
            sentence = f"{self._under_way} requests are under way already: ask again later"
            return Refusal("overloaded", sentence, retry_after=self._service.batcher.retry_after())
        return None
