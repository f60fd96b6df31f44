"""Clients of a server on this machine: requests over loopback as fast as it answers, or at a given rate.

The clients are one process without threads: each request is bytes that were made before, and of each answer
the status and the length are read, so that the clients take little of the cores that the server needs.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from harness import cpu_seconds

PAGE = 4096
# Seconds after which a request counts as lost.
LOST = 120.0


@dataclass
class Load:
    """What came of a load. seconds: of each answered request. statuses: how many requests ended so; 0 for
    those that were lost. elapsed: seconds from the first request to the last answer. cpu: seconds that the
    server's process computed meanwhile, 0 where it is not known. memory: resident bytes of
    the server's process, once a second."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    elapsed: float = 0.0
    cpu: float = 0.0
    memory: list[int] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return len(self.seconds) / self.elapsed if self.elapsed else 0.0

    @property
    def cpu_ms(self) -> float:
        """Milliseconds that the server's process computed for a request."""
        return 1000 * self.cpu / len(self.seconds) if self.seconds else float("nan")

    def ms(self, percent: float) -> float:
        """This percentile of the answered requests' milliseconds."""
        if not self.seconds:
            return float("nan")
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


class Target:
    """A server that is asked. headers: further lines of each request's head."""

    def __init__(self, url: str, path: str, process: int | None = None) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.path = parts.hostname or "127.0.0.1", parts.port or 80, path
        self.process = process
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def request(self, body: bytes) -> bytes:
        """The whole of a request with this body."""
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def ask(self, request: bytes) -> int:
        """The status of the answer, which is read to its end; 0 where none came."""
        try:
            async with asyncio.timeout(LOST):
                return await self._ask(request)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.LimitOverrunError):
            return 0

    async def _ask(self, request: bytes) -> int:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                break
            writer.close()  # the server closed what was idle too long: no request is lost by that
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status, *lines = head.split(b"\r\n")
            fields = {name.lower(): value for name, _, value in (line.partition(b":") for line in lines)}
            await reader.readexactly(int(fields[b"content-length"]))
        except BaseException:
            writer.close()
            raise
        if b"close" in fields.get(b"connection", b"").lower():
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(status.split()[1])

    def cpu(self) -> float:
        """The seconds that the server's process has computed; 0 where it is not known."""
        return 0.0 if self.process is None else cpu_seconds(self.process)

    def close(self) -> None:
        """Close the connections that lie idle."""
        while self._idle:
            self._idle.pop()[1].close()

    def memory(self) -> int:
        """The resident bytes of the server's process; 0 where it is not known."""
        if self.process is None:
            return 0
        return int(Path(f"/proc/{self.process}/statm").read_text().split()[1]) * PAGE


async def _watch(target: Target, load: Load) -> None:
    while True:
        load.memory.append(target.memory())
        await asyncio.sleep(1)


async def _timed(target: Target, request: bytes, load: Load) -> None:
    start = time.perf_counter()
    status = await target.ask(request)
    load.statuses[status] += 1
    if status == 200:
        load.seconds.append(time.perf_counter() - start)


async def _closed(target: Target, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    load, start, cpu = Load(), time.perf_counter(), target.cpu()
    order = iter(range(1 << 60))

    async def client() -> None:
        while True:  # once at least, however late it comes to its turn
            await _timed(target, requests[next(order) % len(requests)], load)
            if time.perf_counter() >= start + seconds:
                return

    watch = asyncio.create_task(_watch(target, load))
    await asyncio.gather(*(client() for _ in range(clients)))
    load.elapsed, load.cpu = time.perf_counter() - start, target.cpu() - cpu
    watch.cancel()
    target.close()
    return load


async def _open(target: Target, requests: Sequence[bytes], rate: float, seconds: float) -> Load:
    load, start, cpu, choose = Load(), time.perf_counter(), target.cpu(), random.Random(0)
    under_way: set[asyncio.Task[None]] = set()
    watch = asyncio.create_task(_watch(target, load))
    due, number = 0.0, 0
    while due < seconds:
        wait = start + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(_timed(target, requests[number % len(requests)], load))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        due += choose.expovariate(rate)
        number += 1
        if number % 64 == 0:
            await asyncio.sleep(0)  # where the rate is beyond what the clients can send, answers are read too
    if under_way:
        await asyncio.wait(under_way)
    load.elapsed, load.cpu = time.perf_counter() - start, target.cpu() - cpu
    watch.cancel()
    target.close()
    return load


def closed_loop(target: Target, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """So many clients that each ask again as soon as they are answered."""
    return asyncio.run(_closed(target, requests, clients, seconds))


def open_loop(target: Target, requests: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Requests that come by chance, `rate` a second in the mean, whether or not others are answered."""
    return asyncio.run(_open(target, requests, rate, seconds))
