"""Why a request is not answered, and how each API says so: always one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

Reason = Literal[
    "invalid",  # no JSON, or of another form than the route takes
    "empty",  # there is no text in it
    "too_large",  # too many bytes or texts, or a text that is too long for the model
    "media_type",  # not sent as JSON, as any other site can make a browser do
    "unknown_model",  # no model of that name is served
    "wrong_model",  # the model does something else
    "unknown_route",
    "wrong_method",
    "wrong_host",
    "no_key",  # the API key is missing or another
    "overloaded",  # too much waits already
    "ending",  # the server ends
    "fault",  # the model failed, or computed numbers that are not finite
]

_STATUS: Mapping[Reason, int] = {
    "invalid": 400,
    "empty": 400,
    "too_large": 413,
    "media_type": 415,
    "unknown_model": 404,
    "wrong_model": 400,
    "unknown_route": 404,
    "wrong_method": 405,
    "wrong_host": 421,
    "no_key": 401,
    "overloaded": 429,
    "ending": 503,
    "fault": 500,
}
# Where TEI has other numbers: its clients tell by them what went wrong.
_TEI_STATUS: Mapping[Reason, int] = {**_STATUS, "invalid": 422, "wrong_model": 424, "fault": 424}
_TEI_TYPES: Mapping[Reason, str] = {
    "empty": "Empty", "wrong_model": "Backend", "fault": "Backend", "overloaded": "Overloaded",
    "ending": "Unhealthy",
}  # fmt: skip
_OPENAI_TYPES: Mapping[Reason, str] = {
    "overloaded": "rate_limit_error", "ending": "server_error", "fault": "server_error",
}  # fmt: skip
_OPENAI_CODES: Mapping[Reason, str] = {
    "unknown_model": "model_not_found", "no_key": "invalid_api_key", "overloaded": "rate_limit_exceeded",
    "unknown_route": "unknown_url",
}  # fmt: skip


class Refusal(Exception):
    """A request that is not answered.

    sentence: what is wrong, and what can be done. field: the part of the body that is to blame, if any.
    retry_after: seconds after which asking again may help. close: whether the connection is closed, because
    what is left of the request is not read.
    """

    def __init__(
        self,
        reason: Reason,
        sentence: str,
        field: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(sentence)
        self.reason, self.sentence, self.field = reason, " ".join(sentence.split()), field
        self.retry_after, self.close = retry_after, close

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the refusal, whatever the API."""
        headers = {"Connection": "close"} if self.close else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.reason == "no_key":
            headers["WWW-Authenticate"] = "Bearer"
        return headers


@dataclass(frozen=True)
class ErrorBody:
    """A refusal in the words of an API."""

    status: int
    body: dict[str, Any]


def tei(refusal: Refusal) -> ErrorBody:
    """As text-embeddings-inference says it."""
    kind = _TEI_TYPES.get(refusal.reason, "Validation")
    return ErrorBody(_TEI_STATUS[refusal.reason], {"error": refusal.sentence, "error_type": kind})


def openai(refusal: Refusal) -> ErrorBody:
    """As OpenAI's API says it. What is too large in an accepted body is an invalid request there."""
    reason = refusal.reason
    fault = {
        "message": refusal.sentence,
        "type": _OPENAI_TYPES.get(reason, "invalid_request_error"),
        "param": "model" if reason == "unknown_model" else refusal.field,
        "code": _OPENAI_CODES.get(reason),
    }
    status = 400 if reason == "too_large" and refusal.field is not None else _STATUS[reason]
    return ErrorBody(status, {"error": fault})


def reranking(refusal: Refusal) -> ErrorBody:
    """As Cohere's API says it (`message`), and Jina's (`detail`), which share a route."""
    sentence = refusal.sentence
    return ErrorBody(_STATUS[refusal.reason], {"id": str(uuid4()), "message": sentence, "detail": sentence})


def plain(refusal: Refusal) -> ErrorBody:
    """As the server's own routes say it."""
    return ErrorBody(_STATUS[refusal.reason], {"detail": refusal.sentence})
