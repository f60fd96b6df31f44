"""What the routes answer and refuse, each in the words of its API; the process goes on after each."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

from fastapi.testclient import TestClient  # noqa: E402

from pruned_ops.serving.application import Access, application  # noqa: E402
from pruned_ops.serving.connections import Hosts  # noqa: E402
from pruned_ops.serving.guard import Keys  # noqa: E402
from pruned_ops.serving.limits import Limits  # noqa: E402
from pruned_ops.serving.models import Served  # noqa: E402
from pruned_ops.serving.service import Service, as_json  # noqa: E402
from served import BROKEN, LABELS, loaded  # noqa: E402
from tiny_tokenizers import words  # noqa: E402

HERE = Hosts("localhost")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    names = ("embedder", "broken", "reranker", "classifier", "reader")
    return loaded(tmp_path_factory.mktemp("served"), *names)


def client_of(models: dict[str, Served], access: Access | None = None, **limits: Any) -> Any:
    app = application(Service(models, Limits(**limits)), access or Access(HERE))
    return TestClient(app, base_url="http://localhost:8000")


@pytest.fixture(scope="module")
def client(models: dict[str, Served]) -> Iterator[Any]:
    with client_of(models) as client:
        yield client


def test_tei_embeds(client: Any, models: dict[str, Served]) -> None:
    both = client.post("/embed", json={"inputs": ["w1 w2", "w3"]}).json()
    one = client.post("/embed", json={"inputs": "w1 w2", "normalize": False, "model": "embedder"})
    assert one.headers["x-compute-tokens"] == "4"
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    (raw,) = one.json()
    np.testing.assert_allclose(raw / np.linalg.norm(raw), both[0], rtol=1e-4, atol=1e-5)
    left, right = (
        client.post("/embed", json={"inputs": words(90), "truncate": True, "truncation_direction": side})
        for side in ("Left", "Right")
    )
    same = client.post("/embed", json={"inputs": words(78)}).json()
    np.testing.assert_allclose(right.json(), same, rtol=1e-4, atol=1e-5)
    assert not np.allclose(left.json(), same, atol=1e-2)


def test_similarity_reads_what_embed_reads(models: dict[str, Served]) -> None:
    """The model, the side that is cut and the prompt; on both routes."""
    prompted = replace(models["embedder"], prompts={"query": "w9 w8 "})
    sentences = ["w1 w2", words(90), "w3"]
    inputs = {"source_sentence": sentences[0], "sentences": sentences[1:]}
    left: dict[str, Any] = {"truncate": True, "truncation_direction": "Left"}
    with client_of({"embedder": prompted, "broken": models["broken"]}) as client:
        for asked in (left, {"truncate": True, "prompt_name": "query"}):
            vectors = np.array(client.post("/embed", json={"inputs": sentences, **asked}).json())
            for path in ("/similarity", "/"):
                similarities = client.post(path, json={"inputs": inputs, "parameters": asked}).json()
                np.testing.assert_allclose(similarities, vectors[1:] @ vectors[0], rtol=1e-4, atol=1e-5)
        nan = {"source_sentence": "w1", "sentences": [f"w2 {BROKEN}"]}
        for status, body in (
            (424, {"inputs": nan, "model": "broken"}),
            (424, {"inputs": nan, "parameters": {"model": "broken"}}),
            (404, {"inputs": nan, "model": "gpt-9"}),
            (200, {"inputs": nan, "parameters": None}),
        ):
            assert client.post("/similarity", json=body).status_code == status


def test_token_ids_are_cut_on_the_side_that_is_said(models: dict[str, Served]) -> None:
    prompted, ids = replace(models["embedder"], prompts={"query": "w9 w8 "}), list(range(4, 94))
    with client_of({"embedder": prompted}) as client:
        for side, kept in (("Left", ids[-80:]), ("Right", ids[:80])):
            cut = {"inputs": ids, "truncate": True, "truncation_direction": side}
            vectors, expected = (client.post("/embed", json=body).json() for body in (cut, {"inputs": kept}))
            np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
        response = client.post("/embed", json={"inputs": ids[:9], "prompt_name": "query"})
        assert response.status_code == 422 and "these are token ids" in response.json()["error"]


def test_many_token_ids_do_not_hold_up_the_server(
    client: Any, models: dict[str, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are checked beside it, as a long text is tokenised."""
    encoder, threads = models["embedder"].encoder, list[str]()
    own = encoder.of_ids

    def of_ids(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return own(*arguments)

    monkeypatch.setattr(encoder, "of_ids", of_ids)
    for count in (9, 5000):
        assert client.post("/embed", json={"inputs": [5] * count, "truncate": True}).status_code == 200
    assert ["pruned_ops-texts" in name for name in threads] == [False, True]


def test_numbers_have_the_digits_that_float32_has() -> None:
    numbers = np.array([[0.1, -2.0], [1e-8, 1 / 3]], dtype=np.float32)
    body = bytes(as_json(numbers).body)
    assert body == b"[[0.1,-2.0],[1e-8,0.33333334]]"
    np.testing.assert_array_equal(np.array(json.loads(body), dtype=np.float32), numbers)


def test_tei_reranks(client: Any) -> None:
    texts = ["w1", "w2 w3", words(30)]
    body = {"query": "w5", "texts": texts}
    ranks = client.post("/rerank", json=body | {"return_text": True}).json()
    assert sorted(rank["index"] for rank in ranks) == [0, 1, 2]
    assert all(rank["text"] == texts[rank["index"]] for rank in ranks)
    scores = [rank["score"] for rank in ranks]
    assert scores == sorted(scores, reverse=True)
    raw = client.post("/rerank", json=body | {"raw_scores": True}).json()
    found = [1 / (1 + np.exp(-rank["score"])) for rank in raw]
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    assert "text" not in raw[0]


def test_jina_reranks_on_the_same_route(client: Any) -> None:
    body = {"model": "reranker", "query": "w5", "documents": ["w1", {"text": "w2"}], "return_documents": True}
    for path in ("/rerank", "/v1/rerank"):
        answer = client.post(path, json=body).json()
        assert answer["model"] == "reranker" and answer["usage"]["total_tokens"] == 10
        first = answer["results"][0]
        assert first["document"]["text"] == ["w1", "w2"][first["index"]]
    both = client.post("/rerank", json={"query": "w5", "documents": ["w1"], "texts": ["w2"]})
    assert both.status_code == 400 and "texts or documents, not both" in both.json()["message"]
    refused = client.post("/rerank", json={"query": "w5", "documents": [3]})
    assert refused.status_code == 400 and "each document has to be a text" in refused.json()["detail"]


def test_tei_predicts(client: Any) -> None:
    one = client.post("/predict", json={"inputs": "w1"}).json()
    assert sorted(each["label"] for each in one) == sorted(LABELS.values())
    assert sum(each["score"] for each in one) == pytest.approx(1)
    pair = client.post("/predict", json={"inputs": ["w1", "w2"]}).json()
    many = client.post("/predict", json={"inputs": [["w1"], ["w1", "w2"]]}).json()
    for found, expected in zip(many, (one, pair), strict=True):
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        assert found[0]["score"] == pytest.approx(expected[0]["score"], rel=1e-4)
    score = client.post("/predict", json={"inputs": ["w1", "w2"], "model": "reranker"}).json()
    assert [each["label"] for each in score] == ["LABEL_0"] and 0 < score[0]["score"] < 1


def test_qa(client: Any, models: dict[str, Served]) -> None:
    """What `QuestionAnswerer.answer` says of the same text, over several windows."""
    answerer = models["reader"].answerer
    assert answerer is not None
    context = "\U0001f600 " + words(200)
    found = client.post("/v1/qa", json={"question": "w1", "context": context, "top_k": 3}).json()
    expected = answerer.answer("w1", context, top_k=3)
    assert [each["answer"] for each in found["answers"]] == [each.answer for each in expected]
    assert found["answers"][0]["score"] == pytest.approx(expected[0].score, rel=1e-4)
    span = found["best_span"]
    assert context[span["start"] : span["end"]] == span["answer"] != "" and found["ms"] > 0
    assert (found["model"], found["answer"]) == ("reader", expected[0].answer)


def test_the_pipelines_form_names_its_model(models: dict[str, Served]) -> None:
    asked = {"question": "w1", "context": "w2 w3"}
    with client_of({"reader": models["reader"]}) as client:
        assert client.post("/", json={"inputs": asked, "model": "gpt-9"}).status_code == 404
        assert client.post("/", json={"inputs": asked, "model": "reader"}).json()["answer"]
        assert client.post("/", json={"inputs": asked, "parameters": None}).json()["answer"]


def test_a_natural_questions_model_is_asked_like_any_other(tmp_path: Path) -> None:
    body = {"question": "w1", "context": words(200)}
    with client_of(loaded(tmp_path, "reader", "pages")) as client:
        expected, found = (
            client.post("/v1/qa", json=body | {"model": name}).json() for name in ("reader", "pages")
        )
    assert found["best_span"]["answer"] == expected["best_span"]["answer"] != ""


def test_what_it_tells_of_itself(client: Any, models: dict[str, Served]) -> None:
    assert client.get("/health").json() == {"status": "ok", "models": list(models)}
    info = client.get("/info").json()
    assert info["model_id"] == "embedder" and info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert [model["kind"] for model in info["models"]] == [model.kind for model in models.values()]
    client.post("/embed", json={"inputs": "w1 w2"})
    client.get("/nowhere")
    metrics = client.get("/metrics").text
    assert 'pruned_ops_tokens_total{model="embedder"}' in metrics
    assert 'pruned_ops_requests_total{route="/embed",status="200"}' in metrics
    assert 'route="other",status="404"' in metrics and "nowhere" not in metrics
    assert "pruned_ops_waiting_tokens 0.0" in metrics


# A body that is wrong, for each API; what of its answer is the sentence; and the status.
APIS = {
    "/embed": ("inputs", lambda body: body["error"]),
    "/v1/embeddings": ("input", lambda body: body["error"]["message"]),
    "/v1/rerank": ("documents", lambda body: body["message"]),
    "/v2/rerank": ("documents", lambda body: body["detail"]),
    "/rerank": ("texts", lambda body: body["error"]),
    "/predict": ("inputs", lambda body: body["error"]),
    "/v1/qa": ("context", lambda body: body["detail"]),
}
NAMED = {
    "/embed": "embedder", "/v1/embeddings": "embedder", "/v1/rerank": "reranker", "/v2/rerank": "reranker",
    "/rerank": "reranker", "/predict": "classifier", "/v1/qa": "reader",
}  # fmt: skip


def body_of(path: str, value: Any, **more: Any) -> dict[str, Any]:
    """A body for this route, with this value for its texts."""
    return {"model": NAMED[path], "query": "w1", "question": "w1", APIS[path][0]: value} | more


def refused(client: Any, path: str, content: bytes, why: str, *statuses: int) -> None:
    """The request is refused with one sentence in the API's words, and the next one is answered."""
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    sentence = APIS[path][1](response.json())
    assert response.status_code in statuses, response.text
    assert why in sentence and "\n" not in sentence and len(sentence) < 500
    assert client.post("/embed", json={"inputs": "w1"}).status_code == 200


@pytest.mark.parametrize("path", APIS)
def test_bad_input(client: Any, path: str) -> None:
    field = APIS[path][0]
    for content, why in (
        (b"", "it is empty"),
        (b'{"inputs": "w1"', "no JSON"),
        (b'{"inputs": NaN}', "no finite number"),
        (b'{"inputs": "\xff"}', "invalid start byte"),
        (b'{"inputs": "\\ud83d"}', "half a surrogate pair"),
        (b"[" * 100_000, "nested"),
        (b'["w1"]', "a JSON object is needed"),
        (b"null", "a JSON object is needed"),
        (b"{}", ""),
        (json.dumps(body_of(path, {"a": 1})).encode(), field),
        (json.dumps(body_of(path, 3)).encode(), field),
        (json.dumps(body_of(path, [3.5, None])).encode(), field),
        (json.dumps(body_of(path, None)).encode(), field),
    ):
        refused(client, path, content, why, 400, 422)
    text = "w1" if path in ("/embed", "/v1/embeddings", "/predict", "/v1/qa") else ["w1"]
    unknown = json.dumps(body_of(path, text, model="gpt-9")).encode()
    refused(client, path, unknown, "there is no model 'gpt-9'; there is embedder", 404)
    wrong = json.dumps(body_of(path, text, model="embedder" if field != "input" else "reader")).encode()
    if path != "/embed":
        refused(client, path, wrong, "this route needs", 400, 424)
    assert client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    zipped = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post(path, content=gzip.compress(b"{}"), headers=zipped).status_code == 415
    assert client.get(path).status_code == 405
    huge = json.dumps(body_of(path, "w" * 10_000_000 if text == "w1" else ["w" * 10_000_000])).encode()
    refused(client, path, huge, "a request of at most 8000000 bytes", 413)


@pytest.mark.parametrize("path", [path for path in APIS if path != "/v1/qa"])
def test_too_many_texts_and_none(client: Any, path: str) -> None:
    rows = [["w1"]] if path == "/predict" else ["w1"]
    refused(
        client, path, json.dumps(body_of(path, rows * 10_000)).encode(), "at most 2048 are taken", 413, 400
    )
    refused(client, path, json.dumps(body_of(path, [])).encode(), "", 400, 422)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/embed", {"inputs": ["w1", ""]}, 400),
        ("/embed", {"inputs": ""}, 400),
        ("/v1/embeddings", {"model": "embedder", "input": ""}, 400),
        ("/v1/embeddings", {"model": "embedder", "input": [[]]}, 400),
        ("/predict", {"inputs": ""}, 400),
        ("/rerank", {"query": "", "texts": ["w1"]}, 400),
        ("/v1/rerank", {"query": "", "documents": ["w1"]}, 400),
        ("/v1/qa", {"question": "", "context": "w1"}, 400),
    ],
)
def test_empty_texts(client: Any, path: str, body: dict[str, Any], status: int) -> None:
    refused(client, path, json.dumps(body).encode(), "", status)


def test_an_empty_document_is_one(client: Any) -> None:
    answer = client.post("/rerank", json={"query": "w1", "texts": ["", "w2"]})
    assert answer.status_code == 200 and len(answer.json()) == 2
    said = client.post("/v1/qa", json={"question": "w1", "context": ""}).json()
    assert said["answer"] == "" and said["best_span"] is None


def test_numbers_that_cannot_be(client: Any) -> None:
    for path, body, why in (
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "dimensions": 65}, "64 dimensions"),
        ("/v1/embeddings", {"model": "embedder", "input": [3, 100_000]}, "token id outside 0 to"),
        ("/v1/embeddings", {"model": "embedder", "input": [3, True]}, "are needed"),
        ("/v1/embeddings", {"model": "embedder", "input": "w1", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "w1"}, "model: Field required"),
        ("/embed", {"inputs": "w1", "prompt_name": "query"}, "has no prompt 'query'; it has none"),
        ("/embed", {"inputs": "w1", "truncate": "yes"}, "truncate"),
        ("/predict", {"inputs": "w1", "parameters": {"top_k": 0}}, "top_k"),
        ("/predict", {"inputs": "w1", "parameters": {"function_to_apply": "tanh"}}, "function_to_apply"),
        ("/v1/rerank", {"query": "w1", "documents": ["w1"], "top_n": 0}, "top_n"),
        ("/v2/rerank", {"query": "w1", "documents": ["w1"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ("/v2/rerank", {"query": "w1", "documents": ["w1"], "max_tokens_per_doc": 2}, "send shorter ones"),
        ("/predict", {"inputs": "w1", "parameters": 3}, "parameters: a JSON object is needed"),
        ("/v1/qa", {"question": "w1 " * 90, "context": "w1"}, "the question is too long"),
        ("/v1/qa", {"question": "w1 " * 400, "context": "w1"}, "at most 1000 characters"),
    ):
        refused(client, path, json.dumps(body).encode(), why, 400, 422)


def test_not_a_number_in_an_output(client: Any) -> None:
    """It is the error of the request that asked for it."""
    for path, body, status in (
        ("/embed", {"inputs": ["w1", f"w2 {BROKEN}"], "model": "broken"}, 424),
        ("/v1/embeddings", {"input": ["w1", f"w2 {BROKEN}"], "model": "broken"}, 500),
    ):
        refused(client, path, json.dumps(body).encode(), "not finite for input 1", status)
        assert client.post("/embed", json={"inputs": "w1", "model": "broken"}).status_code == 200


def test_only_this_machines_names_are_answered(client: Any) -> None:
    """Or a page elsewhere could ask the browser to read texts here, under a name of its own."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::1", "10.0.0.1", ""):
        for response in (
            client.get("/", headers={"Host": host}),
            client.post("/embed", json={"inputs": "w1"}, headers={"Host": host}),
        ):
            assert response.status_code == 421 and "--allow-host" in response.text, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "localhost."):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    everywhere = Hosts("0.0.0.0", ("Ask.example",))
    for host in ("10.0.0.1:8000", "[fe80::1]", "ask.example", "localhost"):
        assert everywhere.include(host) and (host == "localhost" or not Hosts("127.0.0.1").include(host))
    assert not everywhere.include("evil.example") and Hosts("192.0.2.7").include("192.0.2.7:80")


def test_no_other_site_may_ask_unless_it_is_named(
    client: Any, models: dict[str, Served], tmp_path: Path
) -> None:
    asks = {"Origin": "https://notes.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/embed", headers=asks).headers
    with client_of(models, Access(HERE, origins=("https://notes.example",))) as open_client:
        allowed = open_client.options("/embed", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://notes.example"
        other = open_client.options("/embed", headers=asks | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    (tmp_path / "keys").write_text("a-key\n")
    access = Access(HERE, Keys(tmp_path / "keys"), ("https://notes.example",))
    with client_of(models, access) as guarded:
        body, origin = {"inputs": "w1"}, {"Origin": "https://notes.example"}
        for headers, status in ((origin, 401), (origin | {"Authorization": "Bearer a-key"}, 200)):
            answer = guarded.post("/embed", json=body, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin["Origin"]
        elsewhere = guarded.post("/embed", json=body, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in elsewhere.headers
        assert guarded.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_keys(models: dict[str, Served], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key\nsecond-key\n")
    with client_of(models, Access(HERE, Keys(file))) as client:
        for path in ("/", "/health"):
            assert client.get(path).status_code == 200
        for header in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first-key"}):
            for response in (
                client.get("/metrics", headers=header),
                client.post("/embed", json={"inputs": "w1"}, headers=header),
                client.post("/v1/embeddings", json={"model": "embedder", "input": "w1"}, headers=header),
            ):
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            header = {"Authorization": f"Bearer {key}"}
            assert client.post("/embed", json={"inputs": "w1"}, headers=header).status_code == 200
    for content in ("", " \n", "two words", "caf\u00e9"):
        file.write_text(content)
        with pytest.raises(ValueError, match="has to hold keys"):
            Keys(file)


def test_unknown_routes_are_refused_in_each_apis_words(client: Any) -> None:
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.get("/nowhere").json() == {
        "error": "there is no route /nowhere",
        "error_type": "Validation",
    }
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(client: Any, models: dict[str, Served]) -> None:
    response = client.get("/")
    assert response.status_code == 200 and "http" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    with client_of({"embedder": models["embedder"]}) as other:
        assert "embedder: embedder" in other.get("/").text


def test_texts_are_cut_where_the_server_says_so(models: dict[str, Served]) -> None:
    with client_of(models, auto_truncate=True) as client:
        assert client.post("/embed", json={"inputs": words(300)}).status_code == 200
        body = {"model": "embedder", "input": words(300)}
        assert client.post("/v1/embeddings", json=body).json()["usage"]["total_tokens"] == 80
        assert client.post("/embed", json={"inputs": words(300), "truncate": False}).status_code == 413


def test_an_error_of_ours_is_one_sentence(
    models: dict[str, Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> None:
        raise ZeroDivisionError("in a route")

    with client_of(models) as client:
        monkeypatch.setattr(models["embedder"].encoder, "encode", fails)
        response = client.post("/v1/embeddings", json={"model": "embedder", "input": "w1"})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the server failed at this request"
        assert "in a route" in caplog.text
        monkeypatch.setattr(models["reranker"].encoder, "encode", fails)
        response = client.post("/rerank", json={"query": "w1", "documents": ["w2"]})
        assert response.status_code == 500  # as Jina's clients read it
        assert response.json()["detail"] == "the server failed at this request"
        assert client.get("/health").status_code == 200
