"""A real server and its clients: slow ones, ones that leave, too many of them, and a browser; and its end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

import numpy as np  # noqa: E402

from inputs import SUPPORT  # noqa: E402
from pruned_ops.serving import connections  # noqa: E402
from pruned_ops.serving.limits import Limits  # noqa: E402
from pruned_ops.serving.models import Loading, load_all  # noqa: E402
from served import HUNG, Slow, loaded, saved, served  # noqa: E402
from tiny_tokenizers import words  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEAD = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"inputs": "w1"}'


@pytest.fixture
def slow() -> Iterator[Slow]:
    model = Slow()
    yield model
    model.may_answer.set()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def asked(url: str, path: str = "/embed", body: Any = None) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of the answer to a text, or to a body."""
    connection = HTTPConnection("127.0.0.1", port_of(url), timeout=HUNG)
    content = json.dumps({"inputs": "w1"} if body is None else body)
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, dict(response.getheaders())


def lives(url: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port_of(url), timeout=HUNG)
    connection.request("GET", "/health")
    return connection.getresponse().status == 200


def until(is_so: Any) -> None:
    end = time.monotonic() + HUNG
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(url: str, content: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port_of(url)), HUNG)
    client.sendall(content)
    return client


def whole(body: bytes = BODY) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_it_answers_while_a_model_computes(slow: Slow) -> None:
    with served({"slow": slow}, Limits(patience=0.2)) as (url, *_), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, url)
        assert slow.is_asked.wait(HUNG) and lives(url)
        time.sleep(0.5)  # who waits for an answer is not slow
        assert not answer.done()
        slow.may_answer.set()
        assert answer.result(HUNG)[0] == 200


def test_a_question_waits_for_a_long_text_and_nobody_else_does(tmp_path: Path) -> None:
    """The tokenizer is somebody else's, as while a book is cut."""
    models = loaded(tmp_path, "reader")
    answerer = models["reader"].answerer
    assert answerer is not None
    question = {"question": "w1", "context": "w2 w3"}
    with served(models) as (url, *_), ThreadPoolExecutor(1) as pool:
        with answerer.lock:
            answer = pool.submit(asked, url, "/v1/qa", question)
            for _ in range(20):
                health = HTTPConnection("127.0.0.1", port_of(url), timeout=HUNG)
                health.request("GET", "/health")
                assert health.getresponse().status == 200
                health.close()
            assert not answer.done()
        assert answer.result(HUNG)[0] == 200


def test_answers_are_sent_at_once(slow: Slow) -> None:
    """Without the 40 ms that TCP would wait between their head and their body."""
    with served({"slow": slow}) as (url, _, server), begun(url, b"GET"):
        until(lambda: server.server_state.connections)
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_answer_goes_out_as_one_piece(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and body apart would wake the client twice."""
    pieces: list[bytes] = []

    class Transport:
        def __init__(self, transport: Any) -> None:
            self.__dict__.update(
                own=transport, write=lambda data: (pieces.append(data), transport.write(data))
            )

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    joined = connections.Joined
    monkeypatch.setattr(connections, "Joined", lambda transport, loop: joined(Transport(transport), loop))
    slow.may_answer.set()
    with served({"slow": slow}) as (url, *_):
        assert asked(url)[0] == 200
    (piece,) = pieces
    assert piece.startswith(b"HTTP/1.1 200") and piece.endswith(b"]]")


def test_too_many_requests_are_refused_in_their_apis_words(slow: Slow) -> None:
    with served({"slow": slow}, Limits(requests=2)) as (url, service, _), ThreadPoolExecutor(2) as pool:
        answers: list[Future[Any]] = [pool.submit(asked, url) for _ in range(2)]
        until(lambda: service.batcher.waiting_requests == 2)
        status, answer, headers = asked(url)
        assert (status, answer["error_type"], headers["retry-after"]) == (429, "Overloaded", "1")
        status, answer, headers = asked(url, "/v1/embeddings", {"model": "slow", "input": "w1"})
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert lives(url)
        slow.may_answer.set()
        assert [each.result(HUNG)[0] for each in answers] == [200, 200]
        assert asked(url)[0] == 200


def test_too_many_tokens_are_refused(slow: Slow) -> None:
    """Stand-in texts have as many tokens as characters."""
    with served({"slow": slow}, Limits(queue_tokens=5)) as (url, service, _), ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(asked, url)]
        assert slow.is_asked.wait(HUNG)
        answers.append(pool.submit(asked, url, "/embed", {"inputs": "a" * 9}))  # alone in the queue
        until(lambda: service.batcher.waiting_tokens == 9)
        status, answer, _ = asked(url)
        assert status == 429 and "9 tokens wait already, and 5 may" in answer["error"]
        slow.may_answer.set()
        assert [each.result(HUNG)[0] for each in answers] == [200, 200]


def test_the_work_of_a_client_that_left_is_dropped(slow: Slow) -> None:
    with served({"slow": slow}) as (url, service, _), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, url)
        assert slow.is_asked.wait(HUNG)
        client = begun(url, whole(b'{"inputs": ["left", "left"]}'))
        until(lambda: service.batcher.waiting_tokens == 8)
        client.close()
        until(lambda: service.batcher.waiting_tokens == 0)
        slow.may_answer.set()
        assert answer.result(HUNG)[0] == 200 and asked(url)[0] == 200
    assert slow.texts == ["w1", "w1"]
    assert b"pruned_ops_dropped_texts_total 2.0" in service.metrics.text()


@pytest.mark.parametrize("said", [b"", b"Content-Length: 10\r\n"])
def test_a_body_without_end_is_refused(slow: Slow, said: bytes) -> None:
    """Sent in chunks, whatever its length is said to be."""
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    with served({"slow": slow}, Limits(body_bytes=100_000)) as (url, service, _):
        with begun(url, HEAD + said + b"Transfer-Encoding: chunked\r\n\r\n") as client:
            with pytest.raises(ConnectionError):
                for _ in range(640):
                    client.sendall(chunk)
        assert lives(url) and not service._body_bytes


def test_a_body_that_is_too_large_is_refused_to_its_sender(slow: Slow) -> None:
    """It is read on and thrown away, so that clients that first send get to know why."""
    slow.may_answer.set()
    with served({"slow": slow}, Limits(body_bytes=100_000)) as (url, *_):
        status, answer, _ = asked(url, body={"inputs": "w" * 300_000})
        assert (status, answer["error"]) == (413, "a request of at most 100000 bytes is taken")
        assert asked(url)[0] == 200


@pytest.mark.parametrize("content", [b"", b"GET / HT", HEAD, HEAD + b"Content-Length: 10\r\n\r\n{"])
def test_a_client_that_does_not_go_on_is_dropped(slow: Slow, content: bytes) -> None:
    with served({"slow": slow}, Limits(patience=0.2)) as (url, *_):
        with begun(url, content) as client:
            with suppress(ConnectionError):
                assert client.recv(1) == b""
        assert lives(url)


def test_a_client_that_sends_a_byte_at_a_time_is_dropped(slow: Slow) -> None:
    with served({"slow": slow}, Limits(patience=0.3)) as (url, *_):
        with begun(url, HEAD + b"Content-Length: 100000\r\n\r\n") as client:
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    client.sendall(b" ")
                    time.sleep(0.01)
        assert lives(url)


def test_a_client_whose_head_has_no_end_is_dropped(slow: Slow) -> None:
    with served({"slow": slow}) as (url, *_):
        with begun(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n") as client:
            with pytest.raises(ConnectionError):
                for number in range(10_000):
                    client.sendall(b"X-%d: %s\r\n" % (number, b"a" * 1000))
        assert lives(url)


def test_a_large_body_that_is_refused_unread_is_no_head(slow: Slow) -> None:
    """Its sender gets to read the refusal, and may go on."""
    body = json.dumps({"inputs": "w" * 300_000}).encode()
    with served({"slow": slow}, Limits(requests=1)) as (url, *_), ThreadPoolExecutor(1) as pool:
        first = pool.submit(asked, url)
        assert slow.is_asked.wait(HUNG)
        with begun(url, whole(body)[:1000]) as client:
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 429")
            client.sendall(whole(body)[1000:])
            slow.may_answer.set()
            assert first.result(HUNG)[0] == 200
            client.sendall(whole())
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_an_upgrade_that_is_not_to_be_had_is_answered_without(slow: Slow) -> None:
    """As Java's HttpClient asks for it, with a body, and on the same connection again."""
    slow.may_answer.set()
    upgrade = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
    with served({"slow": slow}) as (url, *_), begun(url, b"") as client:
        for _ in range(2):
            client.sendall(upgrade + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_take_its_answer_is_dropped(slow: Slow) -> None:
    slow.may_answer.set()
    slow.dimension = 20_000
    slow.compute = lambda texts: [np.ones(20_000, dtype=np.float32)] * len(texts)  # type: ignore[method-assign]
    body = json.dumps({"inputs": ["w1"] * 50}).encode()  # of which 20 MB are made, more than sockets buffer
    with served({"slow": slow}, Limits(patience=0.5)) as (url, _, server):
        with begun(url, whole(body)) as client:
            until(lambda: server.server_state.total_requests == 1)
            until(lambda: not server.server_state.connections)
            received = 0
            with suppress(ConnectionError):
                while part := client.recv(1 << 20):
                    received += len(part)
            assert 0 < received < 10_000_000
        assert lives(url)


def test_an_answer_that_is_being_taken_at_the_end_is_sent_whole(slow: Slow) -> None:
    slow.may_answer.set()
    slow.dimension = 20_000
    slow.compute = lambda texts: [np.ones(20_000, dtype=np.float32)] * len(texts)  # type: ignore[method-assign]
    body = json.dumps({"inputs": ["w1"] * 50}).encode()  # the answer is larger than what sockets buffer
    with served({"slow": slow}) as (url, service, server), begun(url, whole(body)) as client:
        connections: Any = server.server_state.connections
        until(lambda: any(one.cycle is not None and one.cycle.response_complete for one in connections))
        server.should_exit = True
        until(lambda: service.batcher._ends)
        received = bytearray()
        while part := client.recv(1 << 20):
            received += part
    content = received.partition(b"\r\n\r\n")[2]
    assert len(json.loads(content)) == 50


def test_what_is_under_way_is_answered_at_the_end(slow: Slow) -> None:
    """And not what comes then, and nobody is waited for who only holds a connection."""
    with served({"slow": slow}) as (url, service, _), ThreadPoolExecutor(2) as pool:
        answer = pool.submit(asked, url)
        assert slow.is_asked.wait(HUNG)
        waits = pool.submit(asked, url)
        until(lambda: service.batcher.waiting_requests == 2)
        idle = [begun(url, content) for content in (b"", HEAD)]
        service.end()
        assert asked(url)[0] == 503
        threading.Timer(0.3, slow.may_answer.set).start()
    assert answer.result(HUNG)[0] == waits.result(HUNG)[0] == 200
    for client in idle:
        client.close()


SERVE = """
import sys
sys.path.insert(0, {support!r})
from pruned_ops.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_signal_ends_the_command(tmp_path: Path) -> None:
    """With a request that is computed, which is answered, and clients that do not go on. (Ctrl-C does the
    same; `make soak` sends it.)"""
    (folder,) = saved(tmp_path, "reader")
    command = [sys.executable, "-c", SERVE.format(support=SUPPORT), f"first={folder}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            ended_by(process, signal.SIGTERM)
        finally:
            process.kill()


def ended_by(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    assert process.stdout and process.stderr
    assert process.stdout.readline() == b"first: question answering, at most 80 tokens\n"
    url = process.stdout.readline().split()[0].decode()
    idle = [begun(url, content) for content in (b"", HEAD)]
    body = {"question": "w1", "context": words(90) * 60}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, url, "/v1/qa", body)
        until(lambda: b"pruned_ops_waiting_requests 1.0" in metrics_of(url) or answer.done())
        process.send_signal(number)
        assert answer.result(HUNG)[0] == 200
    assert process.wait(HUNG) == 0 and process.stderr.read() == b""
    for client in idle:
        client.close()


def metrics_of(url: str) -> bytes:
    connection = HTTPConnection("127.0.0.1", port_of(url), timeout=HUNG)
    connection.request("GET", "/metrics")
    return connection.getresponse().read()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is here")
def test_a_browser_shows_the_answers(tmp_path: Path) -> None:
    """What the page's script made of a question in its address: the answers marked, names as text."""
    (folder,) = saved(tmp_path, "reader")
    models = load_all([f"<b>eager</b>={folder}", f"shy={folder}"], Loading(device="cpu"))
    for name, threshold in (("<b>eager</b>", 1e9), ("shy", -1e9)):
        answerer = models[name].answerer
        assert answerer is not None
        answerer.null_score_threshold = threshold
    models |= loaded(tmp_path, "embedder")
    text = "\U0001f600 " + words(30) + " <i>w3</i>"
    with served(models) as (url, *_):
        done = subprocess.run(
            [
                str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                "--virtual-time-budget=20000", "--dump-dom",
                f"{url}/?{urlencode({'question': 'w1', 'text': text})}",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        _, said, _ = asked(url, "/v1/qa", {"question": "w1", "context": text, "model": "shy"})
    page = done.stdout
    assert page.count("<section>") == 2, done.stderr[-2000:]
    mark = f"<mark>{said['best_span']['answer']}</mark>"
    assert page.count("<mark>") == page.count(mark) == 2
    assert "<h2>&lt;b&gt;eager&lt;/b&gt;</h2>" in page
    assert '<p class="answer">no answer</p>' in page and "best span: “" in page and " ms · score " in page
    assert "&lt;i&gt;w3&lt;/i&gt;" in page and "<i>" not in page
