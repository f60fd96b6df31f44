"""What a server takes: sizes of requests, lengths of the queue, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pruned_ops.shape import checked_int


@dataclass(frozen=True)
class Limits:
    """The limits of one server. Errors: ValueError for numbers that cannot be.

    body_bytes: bytes of a request's body. texts: texts of one request. requests: requests that are under way
    at once. queue_tokens: tokens that wait for a model; one request of more is taken when nothing waits.
    batch_tokens: tokens of a batch, padding included. wait_ms: milliseconds that a request waits for others
    to share its batch, and only while others are on their way. patience: seconds in which a client has to
    have sent a whole request, or taken an answer. grace: seconds that requests under way have to be answered
    when the server ends. auto_truncate: whether TEI's and OpenAI's routes cut a text that is too long for the
    model where the request does not say so.
    """

    body_bytes: int = 8_000_000
    texts: int = 2048  # as OpenAI's API has it
    requests: int = 512  # as TEI has it
    queue_tokens: int = 1 << 17
    batch_tokens: int = 4096  # TOKENS_ON_A_CPU, which is not imported, so that --help needs no torch
    wait_ms: float = 5.0
    patience: float = 30.0
    grace: float = 20.0
    auto_truncate: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                checked_int(field.name, value, 1)
            elif field.type == "float" and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} is {value!r}; a number of 0 or more is needed")

    @property
    def bodies_bytes(self) -> int:
        """Bytes that the bodies of all requests under way may hold together."""
        return 8 * self.body_bytes
