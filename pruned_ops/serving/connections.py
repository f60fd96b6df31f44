"""An HTTP server that no client holds up, and that answers what is under way before it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import uvicorn

from pruned_ops.serving.limits import Limits

try:
    from pruned_ops.serving.reading import HttpProtocol
except ModuleNotFoundError:  # without httptools h11 reads the same, in Python, which takes longer
    from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol  # type: ignore[assignment]

# Seconds that a connection may lie idle between two requests. Clients keep theirs for a minute or less.
_IDLE = 75
# Seconds that connections have to close once nothing is under way any more.
_LAST_WORDS = 2.0
_EVERY_ADDRESS = ("", "0.0.0.0", "::")
# Bytes of a request's head. httptools has no limit of its own; h11's is the same.
_HEAD_BYTES = 1 << 16


class Hosts:
    """The names under which a server answers. A page elsewhere can give its own name this machine's address,
    and would then be let in by the browser; the name in the request's Host still tells.

    host: where the server listens. more: further names."""

    def __init__(self, host: str, more: tuple[str, ...] = ()) -> None:
        self._any_address = host in _EVERY_ADDRESS
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)}
        if self._any_address:
            self._names.add(socket.gethostname().lower())
        else:
            try:
                self._names |= {str(address[4][0]) for address in socket.getaddrinfo(host, None)}
            except OSError:
                pass  # the server says so when it listens

    def include(self, header: str | None) -> bool:
        """Whether a request with this Host is for this server."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self._names or (self._any_address and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Ends(Protocol):
    """What the end of a server is told to."""

    @property
    def is_working(self) -> bool: ...

    def end(self) -> None:
        """Take no more work."""

    def give_up(self) -> None:
        """Refuse whoever still waits."""


class Joined:
    """A connection on which what is written in one turn of the event loop goes out as one piece: the head and
    the body of an answer would otherwise be two, for each of which the client is woken.

    Everything but writing and closing is the transport's own."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send the data at the end of this turn."""
        if not data:
            return
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def close(self) -> None:
        """Send what is written, and close."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))


class _Impatient(HttpProtocol):
    """Drops a client that does not send a whole request, or does not take its answer, in time, or whose
    request has no end of its head."""

    patience: float
    sending: asyncio.TimerHandle | None = None
    taking: asyncio.TimerHandle | None = None
    head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        joined: Any = Joined(transport, self.loop)
        self.transport = joined
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        self._wait_for_request()
        super().data_received(data)
        is_head = self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)
        self.head_bytes = self.head_bytes + len(data) if is_head else 0
        if self.head_bytes > _HEAD_BYTES:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self._cancel_sending()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.taking is None:
            self.taking = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_taking()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_sending()
        self._cancel_taking()
        super().connection_lost(exc)

    @property
    def is_sending(self) -> bool:
        """Whether the client has still to send something."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    @property
    def is_waited_for(self) -> bool:
        """Whether a request is under way whose end the client has still to send."""
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _wait_for_request(self) -> None:
        if self.sending is None:
            self.sending = self.loop.call_later(self.patience, self._drop)

    def _drop(self) -> None:
        self.sending = None
        if self.is_sending:
            self.transport.abort()

    def _cancel_sending(self) -> None:
        if self.sending is not None:
            self.sending.cancel()
            self.sending = None

    def _cancel_taking(self) -> None:
        if self.taking is not None:
            self.taking.cancel()
            self.taking = None


class Server(uvicorn.Server):
    """A server that ends at one SIGTERM or Ctrl-C: it takes no more, answers what is under way, and refuses
    what is not answered after `limits.grace` seconds. A second one ends it at once."""

    def __init__(self, application: Any, work: Ends, limits: Limits) -> None:
        protocol = type("Impatient", (_Impatient,), {"patience": limits.patience})
        settings: dict[str, Any] = {
            "http": protocol, "ws": "none", "log_level": "warning", "proxy_headers": False,
            "server_header": False,
        }  # fmt: skip
        super().__init__(
            uvicorn.Config(
                application,
                timeout_keep_alive=_IDLE,
                timeout_graceful_shutdown=limits.grace + _LAST_WORDS,  # type: ignore[arg-type]
                **settings,
            )
        )
        self._work, self._grace = work, limits.grace

    async def shutdown(self, sockets: Any = None) -> None:
        self._work.end()
        # uvicorn closes those on which nothing is under way, once their clients have taken what is written.
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Impatient) and connection.is_waited_for:
                connection.transport.abort()
        asyncio.get_running_loop().call_later(self._grace, self._work.give_up)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and not the process: its status tells that it ended as it should."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._end) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet: what keeps a server from starting is known before
    its models are loaded. Errors: OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once, without waiting for more, only on sockets that say they are TCP's: otherwise the
    # head and the body of an answer would lie 40 ms apart.
    place = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
    except (OSError, OverflowError) as error:
        place.close()
        raise OSError(f"cannot listen at {host}, port {port}: {error}") from error
    return place


def url(place: socket.socket) -> str:
    """The address of a bound socket, as a browser takes it."""
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(application: Any, place: socket.socket, work: Ends, limits: Limits) -> None:
    """Serve at a bound socket until SIGTERM or Ctrl-C."""
    Server(application, work, limits).run(sockets=[place])
    if work.is_working:
        # The models' thread cannot be stopped within a kernel, and Python must not end around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
