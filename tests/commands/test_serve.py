"""The page of `pruned-ops ask --serve`: what it answers, what it refuses, and how a browser shows it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from inputs import stock_model
from matching import save_checkpoint
from pruned_ops import QuestionAnswerer
from pruned_ops.cli import main
from tiny_tokenizers import words

pytest.importorskip("fastapi", reason='FastAPI is not installed: pip install "pruned_ops[serve]"')
from fastapi.testclient import TestClient  # noqa: E402

from pruned_ops.commands.serve import LONGEST_QUESTION, LONGEST_TEXT, application  # noqa: E402

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
    return TestClient(application(answerers))


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


@pytest.fixture
def address(answerers: dict[str, QuestionAnswerer]) -> Iterator[str]:
    """Of a real server, on a free port of this machine."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application(answerers), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is here")
def test_a_browser_shows_the_answers(address: str, tmp_path: Path) -> None:
    """What the page's script made of a question in its address: the answer marked, names as text."""
    text = words(30) + " <i>w3</i>"
    asked = urlencode({"question": "w1", "text": text})
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=20000", "--dump-dom", f"{address}?{asked}",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    page = done.stdout
    assert page.count("<section>") == 2, done.stderr[-2000:]
    assert page.count("<mark>") == 2 and "<h2>eager &lt;b&gt;</h2>" in page
    assert '<p class="answer">no answer</p>' in page and "best span: “" in page and " ms · score " in page
    assert "&lt;i&gt;w3&lt;/i&gt;" in page and "<i>" not in page
