"""An HTTP server for one machine's own page: no client holds it up, and one Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

# Seconds in which a client has to have sent a whole request. The longest text takes 1.6 Mbit/s for it.
PATIENCE = 30.0
# Seconds that connections have to close when the server ends.
_LAST_WORDS = 2
# So many questions wait for the model at most; each may hold a request of some megabytes.
MOST_WAITING = 32
_EVERY_ADDRESS = ("", "0.0.0.0", "::")


class Busy(Exception):
    """The work is not done: too much waits already, or the server ends."""


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


class Worker:
    """A thread that does one job after another, while the server goes on."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._waiting: set[asyncio.Future[Any]] = set()
        self.is_working = False
        # As a daemon it does not keep the process from ending in the middle of a long text.
        Thread(target=self._work, name="pruned_ops-model", daemon=True).start()

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result or error. Errors: Busy."""
        if len(self._waiting) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} questions wait already; ask again later")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.add(done)
        self._jobs.put((done, job))
        try:
            return await done
        finally:
            self._waiting.discard(done)

    def give_up(self) -> None:
        """Let everybody who waits get Busy."""
        for done in self._waiting:
            if not done.done():
                done.set_exception(Busy("the server ends"))

    def _work(self) -> None:
        while True:
            done, job = self._jobs.get()
            if done.done():
                continue  # nobody waits any more
            self.is_working = True
            result, error = None, None
            try:
                result = job()
            except Exception as fault:  # it is the asker's
                error = fault
            self.is_working = False
            try:
                done.get_loop().call_soon_threadsafe(_settle, done, result, error)
            except RuntimeError:
                pass  # the loop was closed meanwhile


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)


def server(app: Any, host: str, port: int, worker: Worker, patience: float = PATIENCE) -> Any:
    """A uvicorn.Server of the application; see `serve`."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Drops a client that has not sent a whole request in time."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            self._wait()
            super().data_received(data)

        def on_response_complete(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        @property
        def is_sending(self) -> bool:
            """Whether the client has still to send something."""
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def _wait(self) -> None:
            if self.timer is None:
                self.timer = self.loop.call_later(patience, self._drop)

        def _drop(self) -> None:
            self.timer = None
            if self.is_sending:
                self.transport.abort()

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            worker.give_up()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Impatient) and connection.is_sending:
                    connection.transport.abort()
            await super().shutdown(sockets)

    settings: dict[str, Any] = {"http": Impatient, "ws": "none", "log_level": "warning"}
    return Server(uvicorn.Config(app, host, port, timeout_graceful_shutdown=_LAST_WORDS, **settings))


def serve(app: Any, host: str, port: int, worker: Worker) -> None:
    """Serve until Ctrl-C. Errors: ImportError where uvicorn is not installed."""
    this = server(app, host, port, worker)
    try:
        this.run()
    except KeyboardInterrupt:
        pass  # that is how it is ended
    if not this.started:
        raise OSError(f"cannot listen at {host}, port {port}")
    if worker.is_working:
        # The model's thread cannot be stopped within a kernel, and Python must not end around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
