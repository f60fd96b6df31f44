"""Questions, texts and requests under attack: an answer is a part of its text, a refusal says why, and the
server never fails."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

from fuzzing import HOSTILE, fuzzed, json_bytes, mutated_bytes, mutated_json
from inputs import stock_model
from matching import save_checkpoint
from pruned_ops import QuestionAnswerer
from pruned_ops.commands.ask import answer_lines
from pruned_ops.qa.windows import RefusedQuestion
from tiny_tokenizers import byte_tokenizer

# Words that the word tokenizer knows, and everything else that text may be.
TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(["w1", "w2", "w7", " ", "\n", "\U0001f600"]), max_size=60
).map(" ".join)
RECORD: Any = {"id": 3, "question": "w1 w2", "context": "w1 w2 w3 w4"}


@pytest.fixture(scope="module")
def word_answerer(tmp_path_factory: pytest.TempPathFactory) -> QuestionAnswerer:
    model = stock_model(vocab_size=410)
    return QuestionAnswerer(save_checkpoint(model, tmp_path_factory.mktemp("attacked") / "model"))


@pytest.fixture(scope="module")
def byte_answerer() -> QuestionAnswerer:
    model = stock_model("roberta", vocab_size=300)
    return QuestionAnswerer(model, byte_tokenizer(), max_length=64, stride=16)


@pytest.mark.parametrize("tokenizer", ["word", "byte"])
@fuzzed(25, question=TEXT, context=TEXT, top_k=st.integers(1, 5))
def test_answers(
    tokenizer: str,
    word_answerer: QuestionAnswerer,
    byte_answerer: QuestionAnswerer,
    question: str,
    context: str,
    top_k: int,
) -> None:
    """An answer is its context from start to end, and asking again gives the same."""
    answerer = word_answerer if tokenizer == "word" else byte_answerer
    try:
        answers = answerer.answer(question, context, top_k=top_k)
    except RefusedQuestion as error:
        assert "\n" not in str(error)
        return
    assert 1 <= len(answers) <= top_k and answers == answerer.answer(question, context, top_k=top_k)
    for answer in answers:
        assert answer.answer == context[answer.start : answer.end] and 0 <= answer.score <= 1


@fuzzed(30, records=st.lists(mutated_json([RECORD]) | st.sampled_from([RECORD] + HOSTILE), max_size=8))
def test_streams(word_answerer: QuestionAnswerer, records: list[Any]) -> None:
    """One answer or refusal for each record, in order; a bad record changes nothing for the others."""
    results = list(word_answerer.stream(records, progress=False, keep_refused=True))
    assert len(results) == len(records)
    right = word_answerer.answer(RECORD["question"], RECORD["context"])
    kept = [n for n, result in enumerate(results) if not isinstance(result, RefusedQuestion)]
    again = list(word_answerer.stream([records[n] for n in kept], progress=False, keep_refused=True))
    assert again == [results[n] for n in kept]
    if len(kept) == 1 and records[kept[0]] == RECORD:
        assert results[kept[0]] == right
    for index, (record, result) in enumerate(zip(records, results, strict=True)):
        if record == RECORD:  # in another batch the head's product, which is torch's, may round otherwise
            assert replace(result, score=right.score) == right
            assert result.score == pytest.approx(right.score, abs=1e-6)
        if isinstance(result, RefusedQuestion):
            assert result.index == index and "\n" not in str(result)


@fuzzed(
    30,
    lines=st.lists(
        mutated_bytes([json_bytes(RECORD)]) | st.sampled_from([json_bytes(RECORD), b"", b"\xff"]), max_size=8
    ),
)
def test_json_lines(
    word_answerer: QuestionAnswerer, lines: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line is answered under its number, or counted as bad."""
    lines = [line.replace(b"\n", b" ") for line in lines]
    out = io.BytesIO()
    skipped = answer_lines(word_answerer, iter(lines), out, skip_bad=True)
    answered = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(answered) + skipped == sum(bool(line.strip()) for line in lines)
    numbers = [answer["line"] for answer in answered]
    assert numbers == sorted(set(numbers)) and all(lines[number - 1].strip() for number in numbers)
    assert capsys.readouterr().err.count("skipped:") == skipped


# A body for each route, in the words of its API.
BODIES: dict[str, Any] = {
    "/v1/qa": {"question": "w1 w2", "context": "w1 w2 \U0001f600 w3", "top_k": 2},
    "/embed": {"inputs": ["w1", "w2 w3"], "normalize": True, "truncate": False},
    "/v1/embeddings": {"model": "embedder", "input": ["w1"], "dimensions": 8, "encoding_format": "base64"},
    "/rerank": {"query": "w1", "texts": ["w1", "w2"], "raw_scores": False},
    "/v1/rerank": {"model": "reranker", "query": "w1", "documents": ["w1", {"text": "w2"}], "top_n": 1},
    "/predict": {"inputs": [["w1"], ["w1", "w2"]]},
    "/similarity": {"inputs": {"source_sentence": "w1", "sentences": ["w2"]}},
    "/": {"inputs": "w1"},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    for package in ("fastapi", "orjson", "prometheus_client"):
        pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')
    from fastapi.testclient import TestClient

    from pruned_ops.serving.application import Access, application
    from pruned_ops.serving.connections import Hosts
    from pruned_ops.serving.limits import Limits
    from pruned_ops.serving.service import Service
    from served import loaded

    models = loaded(tmp_path_factory.mktemp("served"), "embedder", "reranker", "classifier", "reader")
    app: Any = application(Service(models, Limits()), Access(Hosts("localhost")))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        yield client


@fuzzed(
    60,
    method=st.sampled_from(["POST", "POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS"]),
    path=st.sampled_from([*BODIES, *BODIES, "/health", "/../etc/passwd", "/v1/models/x", "/embed/x"]),
    body=mutated_json(list(BODIES.values())).map(json_bytes)
    | mutated_bytes([json_bytes(body) for body in BODIES.values()])
    | st.sampled_from(sorted(map(json_bytes, BODIES.values()))),
    kind=st.sampled_from(
        ["application/json", "application/json", "text/plain", "application/json; charset=utf-16", ""]
    ),
)
def test_requests(client: Any, method: str, path: str, body: bytes, kind: str) -> None:
    """An answer, or a refusal in one sentence; "the server failed" is said of our faults alone."""
    response = client.request(method, path, content=body, headers={"content-type": kind})
    assert response.status_code in (200, 400, 404, 405, 413, 415, 422, 424)
    assert "the server failed" not in response.text
    if response.status_code != 200:
        said = response.json()
        sentence = said.get("message") or said.get("detail") or said["error"]
        sentence = sentence["message"] if isinstance(sentence, dict) else sentence
        assert sentence and "\n" not in sentence
    elif (method, path) == ("POST", "/v1/qa"):
        context, span = json.loads(body)["context"], response.json()["best_span"]
        assert span is None or context[span["start"] : span["end"]] == span["answer"]
