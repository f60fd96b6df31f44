"""Reads requests by httptools, and also those that would rather speak another protocol."""

from __future__ import annotations

import sys

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Headers by which a client asks for another protocol.
_WISHES = (b"upgrade", b"http2-settings", b"connection")


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but for requests that ask for an upgrade, as Java's HttpClient does for HTTP/2.
    httptools leaves the body of those unread, and whatever comes after it. They are read again without it.
    """

    _data = b""

    def data_received(self, data: bytes) -> None:
        self._data = data
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        return True  # so that the request is not begun, and what follows is called

    def handle_websocket_upgrade(self) -> None:
        """Read the request that asked for an upgrade again."""
        method, error = self.parser.get_method(), sys.exception()
        assert isinstance(error, httptools.HttpParserUpgrade)
        if method == b"CONNECT":
            self.send_400_response("This is no proxy.")
            return
        head = [method + b" " + self.url + b" HTTP/1.1"]
        head += [name + b": " + value for name, value in self.headers if name not in _WISHES]
        rest = self._data[error.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        super().data_received(b"\r\n".join([*head, b"", rest]))
