"""The page of `pruned-ops ask --serve`: what it answers, what it refuses, and how a browser shows it."""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from inputs import stock_model
from matching import save_checkpoint
from pruned_ops import Answer, QuestionAnswerer
from pruned_ops.cli import main
from pruned_ops.commands import http_server
from pruned_ops.commands.http_server import Hosts, Worker, server
from tiny_tokenizers import words

pytest.importorskip("fastapi", reason='FastAPI is not installed: pip install "pruned_ops[serve]"')
from fastapi.testclient import TestClient  # noqa: E402

from pruned_ops.commands.serve import LONGEST_QUESTION, LONGEST_TEXT, application  # noqa: E402

HUNG = 60  # seconds after which somebody is taken to hang
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def answerers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuestionAnswerer]:
    """One that always answers, and one that never does."""
    made = {}
    for name, threshold in (("eager <b>", 1e9), ("shy", -1e9)):
        model = stock_model()
        model.config.null_score_threshold = threshold
        folder = save_checkpoint(model, tmp_path_factory.mktemp("serve") / "model")
        made[name] = QuestionAnswerer(str(folder))
    return made


@pytest.fixture
def client(answerers: dict[str, QuestionAnswerer]) -> TestClient:
    return TestClient(application(answerers), base_url="http://localhost:8000")


def test_both_models_answer_side_by_side(client: TestClient, answerers: Any) -> None:
    text = words(30)
    said = client.post("/answer", json={"question": "w1", "text": text}).json()["answers"]
    eager, shy = said
    wanted = answerers["eager <b>"].answer("w1", text)
    assert (eager["model"], eager["answer"], eager["score"]) == ("eager <b>", wanted.answer, wanted.score)
    assert shy["answer"] == "" and shy["best_span"]["text"] == wanted.answer
    for one in said:
        span = one["best_span"]
        assert text[span["start"] : span["end"]] == span["text"] and one["ms"] > 0


def test_places_are_counted_as_a_browser_counts(client: TestClient) -> None:
    """A character beyond U+FFFF is two of JavaScript's."""
    text = "\U0001f600 " * 5 + words(20)
    span = client.post("/answer", json={"question": "w1", "text": text}).json()["answers"][0]["best_span"]
    units = text.encode("utf-16-le")
    assert units[2 * span["start"] : 2 * span["end"]].decode("utf-16-le") == span["text"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"question": "", "text": "w1"}, "at least 1 character"),
        ({"question": "w1"}, "Field required"),
        ({"question": "w" * (LONGEST_QUESTION + 1), "text": "w1"}, "at most 1000 characters"),
        ({"question": "w1", "text": "w" * (LONGEST_TEXT + 1)}, "at most 500000 characters"),
        ({"question": "w1", "text": 3}, "valid string"),
        ({"question": "w1 " * 300, "text": "w1"}, "is too long"),
    ],
)
def test_what_is_refused(client: TestClient, body: dict[str, Any], why: str) -> None:
    response = client.post("/answer", json=body)
    assert response.status_code == 422 and why in response.text


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"question": NaN, "text": "w1"}', "'NaN' is no finite number"),
        (b'{"question": "w1", "text": "w2", "more": [-Infinity]}', "'-Infinity' is no finite number"),
        (b'{"question": "w1", "text": "\\ud83d"}', "half a surrogate pair"),
        (b'{"question": "w1", "text": "\xff"}', "invalid start byte"),
        (b"[" * 100_000, "nested"),
        (b'["w1"]', "valid dictionary"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_json_is_refused(client: TestClient, body: bytes, why: str) -> None:
    response = client.post("/answer", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and why in response.text
    assert client.post("/answer", content=body).status_code == 415


def test_only_this_machines_names_are_answered(client: TestClient) -> None:
    """Or a page elsewhere could ask the browser to read texts here, under a name of its own."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::1", "10.0.0.1", ""):
        response = client.get("/", headers={"Host": host})
        assert response.status_code == 421 and "--allow-host" in response.text, host
        assert client.post("/answer", json={}, headers={"Host": host}).status_code == 421
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "localhost."):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    everywhere = Hosts("0.0.0.0", ("Ask.example",))
    for host in ("10.0.0.1:8000", "[fe80::1]", "ask.example", "localhost"):
        assert everywhere.include(host) and (host == "localhost" or not Hosts("127.0.0.1").include(host))
    assert not everywhere.include("evil.example") and Hosts("192.0.2.7").include("192.0.2.7:80")


def test_a_huge_request_is_refused_unread(client: TestClient) -> None:
    response = client.post("/answer", content=b"{" + b" " * 7_000_000)
    assert response.status_code == 413 and "bytes is taken" in response.text


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200 and "http" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert client.get("/docs").status_code == 404


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(stock_model(), tmp_path / "model")
    for extra, why in (
        (["--serve", "--beside", tmp_path / "none"], "holds no config.json"),
        (["--serve", "--top-k", 2], "answers there"),
        (["--questions", "-", "--beside", folder], "--beside goes with --serve"),
    ):
        assert main(["ask", str(folder), *map(str, extra)]) == 2
        assert why in capsys.readouterr().err


@contextmanager
def serving(answerers: Any, patience: float = 30.0) -> Iterator[int]:
    """The port of a real server on this machine."""
    worker = Worker()
    this = server(application(answerers, worker=worker), "127.0.0.1", 0, worker, patience)
    thread = threading.Thread(target=this.run)
    thread.start()
    while not this.started:
        thread.join(0.05)
        assert thread.is_alive()
    try:
        yield this.servers[0].sockets[0].getsockname()[1]
    finally:
        this.should_exit = True
        thread.join()


class Slow:
    """Stands in for a model that computes a long text."""

    def __init__(self) -> None:
        self.is_asked, self.may_answer = threading.Event(), threading.Event()

    def answer(self, question: str, text: str, top_k: int) -> list[Answer]:
        self.is_asked.set()
        self.may_answer.wait(HUNG)
        return [Answer("", 1.0, 0, 0)]


def asked_of(port: int, path: str, body: Any = None) -> Any:
    """The server's JSON; None for the page."""
    connection = HTTPConnection("127.0.0.1", port, timeout=HUNG)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, content
    return None if path == "/" else json.loads(content)


def test_the_page_answers_while_a_long_text_is_computed() -> None:
    slow = Slow()
    with serving({"slow": slow}, patience=0.2) as port, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asked_of, port, "/answer", {"question": "w1", "text": "w2"})
        assert slow.is_asked.wait(HUNG)
        asked_of(port, "/")
        assert asked_of(port, "/health") == {"status": "ok", "models": ["slow"]}
        assert not asked.done()
        time.sleep(0.5)  # who waits for an answer is not slow
        slow.may_answer.set()
        assert asked.result(HUNG)["answers"][0]["score"] == 1.0


def test_the_model_is_not_asked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MOST_WAITING", 1)
    slow = Slow()
    with serving({"slow": slow}) as port, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asked_of, port, "/answer", {"question": "w1", "text": "w2"})
        assert slow.is_asked.wait(HUNG)
        with pytest.raises(AssertionError, match="1 questions wait already"):
            asked_of(port, "/answer", {"question": "w1", "text": "w2"})
        slow.may_answer.set()
        assert asked.result(HUNG)["answers"]


HEAD = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("said", [b"", b"Content-Length: 10\r\n"])
def test_a_body_without_end_is_refused(answerers: Any, said: bytes) -> None:
    """Sent in chunks, whatever its length is said to be."""
    chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
    with serving(answerers) as port, socket.create_connection(("127.0.0.1", port), HUNG) as client:
        client.sendall(HEAD + said + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(64):
                client.sendall(chunk)
        asked_of(port, "/")


@pytest.mark.parametrize("begun", [b"", b"GET / HT", HEAD, HEAD + b"Content-Length: 10\r\n\r\n{"])
def test_a_client_that_does_not_go_on_is_dropped(answerers: Any, begun: bytes) -> None:
    with serving(answerers, patience=0.2) as port:
        with socket.create_connection(("127.0.0.1", port), HUNG) as client:
            client.sendall(begun)
            with suppress(ConnectionError):
                assert client.recv(1) == b""
        asked_of(port, "/")


SERVE = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from pruned_ops.commands.serve import serve
class Slow:
    def answer(self, *asked, **options):
        print("asked", flush=True)
        threading.Event().wait()
serve({"slow": Slow()}, "127.0.0.1", int(sys.argv[1]))
"""


def test_one_ctrl_c_ends_it() -> None:
    """With a text that is computed, a client that does not go on, and one that keeps its connection."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"http://127.0.0.1:")
        clients = []
        for begun in (b"", HEAD + b"Content-Length: 10\r\n\r\n{",
                      HEAD + b'Content-Length: 32\r\n\r\n{"question": "w1", "text": "w2"}'):  # fmt: skip
            clients.append(connected(port))
            clients[-1].sendall(begun)
        assert process.stdout.readline() == b"asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(HUNG) == 0 and process.stderr.read() == b""
        for client in clients:
            client.close()


def connected(port: int) -> socket.socket:
    """A connection, once the server listens."""
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), HUNG)
        time.sleep(0.05)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is here")
def test_a_browser_shows_the_answers(answerers: Any, tmp_path: Path) -> None:
    """What the page's script made of a question in its address: the answer marked, names as text."""
    text = words(30) + " <i>w3</i>"
    asked = urlencode({"question": "w1", "text": text})
    with serving(answerers) as port:
        done = subprocess.run(
            [
                str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                "--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{port}/?{asked}",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
    page = done.stdout
    assert page.count("<section>") == 2, done.stderr[-2000:]
    assert page.count("<mark>") == 2 and "<h2>eager &lt;b&gt;</h2>" in page
    assert '<p class="answer">no answer</p>' in page and "best span: “" in page and " ms · score " in page
    assert "&lt;i&gt;w3&lt;/i&gt;" in page and "<i>" not in page
