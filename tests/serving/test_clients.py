"""Published clients, which are told another address and nothing else, and get what the models compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

from pruned_ops.serving.models import Served  # noqa: E402
from served import BROKEN, LABELS, loaded, served  # noqa: E402
from tiny_tokenizers import words  # noqa: E402

TEXTS = [words(3), words(40), "w5", words(11)]
QUERY = "w1 w2"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    names = ("embedder", "broken", "reranker", "classifier", "reader")
    return loaded(tmp_path_factory.mktemp("served"), *names)


@pytest.fixture(scope="module")
def address(models: dict[str, Served]) -> Iterator[str]:
    with served(models) as (url, *_):
        yield url


def rows(model: Served, texts: list[Any]) -> Any:
    """What the model computes for each text alone."""
    sequences = model.encoder.encode(texts, cut=True)
    return np.stack([model.compute([sequence])[0] for sequence in sequences])


def embedded(model: Served, texts: list[str]) -> Any:
    vectors = rows(model, texts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scores(model: Served, texts: list[str]) -> Any:
    return torch.sigmoid(torch.tensor(rows(model, [(QUERY, text) for text in texts])))[:, 0].numpy()


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), expected, rtol=1e-4, atol=1e-5)


def test_openai(address: str, models: dict[str, Served]) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0) as client:
        expected = embedded(models["embedder"], TEXTS)
        answer = client.embeddings.create(model="embedder", input=TEXTS)  # as base64, which it asks for
        close([each.embedding for each in answer.data], expected)
        assert [each.index for each in answer.data] == [0, 1, 2, 3] and answer.model == "embedder"
        assert answer.usage.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)
        plain = client.embeddings.create(model="embedder", input=TEXTS[0], encoding_format="float")
        close([plain.data[0].embedding], expected[:1])
        ids = [2, 4, 5, 6, 3]  # [CLS] w0 w1 w2 [SEP]
        close([client.embeddings.create(model="embedder", input=ids).data[0].embedding], expected[:1])
        short = client.embeddings.create(model="embedder", input=TEXTS, dimensions=7)
        cut = expected[:, :7]
        close([each.embedding for each in short.data], cut / np.linalg.norm(cut, axis=1, keepdims=True))
        assert [model.id for model in client.models.list()] == list(models)
        assert client.models.retrieve("reranker").id == "reranker"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'") as unknown:
            client.embeddings.create(model="gpt", input="w1")
        assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
        with pytest.raises(openai.BadRequestError, match="and this route needs an embedder"):
            client.embeddings.create(model="reranker", input="w1")
        with pytest.raises(openai.InternalServerError, match="not finite for input 1"):
            client.embeddings.create(model="broken", input=["w1", f"w1 {BROKEN}"])
        with pytest.raises(openai.BadRequestError, match="more than 80 tokens"):
            client.embeddings.create(model="embedder", input=words(90))


@pytest.mark.parametrize("version", [1, 2])
def test_cohere(address: str, models: dict[str, Served], version: int) -> None:
    cohere = pytest.importorskip("cohere", reason="the cohere client is not installed")
    client_class = cohere.Client if version == 1 else cohere.ClientV2
    client = client_class(api_key="none", base_url=address)
    expected = scores(models["reranker"], TEXTS)
    best = np.argsort(-expected)
    answer = client.rerank(model="reranker", query=QUERY, documents=TEXTS, top_n=3)
    assert [result.index for result in answer.results] == best[:3].tolist()
    close([result.relevance_score for result in answer.results], expected[best[:3]])
    if version == 1:
        documents = [{"text": text} for text in TEXTS]
        asked = client.rerank(model="reranker", query=QUERY, documents=documents, return_documents=True)
        assert [result.document.text for result in asked.results] == [TEXTS[place] for place in best]
    long = client.rerank(model="reranker", query=QUERY, documents=[words(300)])  # is cut, as Cohere does
    assert 0 <= long.results[0].relevance_score <= 1
    with pytest.raises(cohere.NotFoundError, match="there is no model 'rerank-v9'"):
        client.rerank(model="rerank-v9", query=QUERY, documents=TEXTS)


def test_hugging_face(address: str, models: dict[str, Served]) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(address)
    expected = embedded(models["embedder"], TEXTS)
    close(client.feature_extraction(TEXTS), expected)  # type: ignore[arg-type]  # a list is taken, too
    close(client.feature_extraction(TEXTS[0], model=f"{address}/embed"), expected[:1])
    close(client.feature_extraction(words(300), truncate=True), embedded(models["embedder"], [words(300)]))
    raw = client.feature_extraction(TEXTS[0], normalize=False)
    close(raw, rows(models["embedder"], TEXTS[:1]))
    close(client.sentence_similarity(TEXTS[0], TEXTS[1:]), expected[1:] @ expected[0])
    with pytest.raises(HfHubHTTPError, match="413"):
        client.feature_extraction(words(300))
    found = client.text_classification(TEXTS[1], model=f"{address}/predict")
    shares, order = torch.tensor(rows(models["classifier"], TEXTS[1:2]))[0].softmax(0).sort(descending=True)
    assert [each.label for each in found] == [LABELS[place] for place in order.tolist()]
    close([each.score for each in found], shares)
    for function in ("none", "sigmoid"):
        found = client.text_classification(
            TEXTS[1],
            model=f"{address}/predict",
            top_k=2,
            function_to_apply=function,  # type: ignore[arg-type]
        )
        best = torch.tensor(rows(models["classifier"], TEXTS[1:2]))[0].topk(2).values
        close([each.score for each in found], best.sigmoid() if function == "sigmoid" else best)


def test_hugging_face_question_answering(models: dict[str, Served]) -> None:
    from huggingface_hub import InferenceClient

    answerer = models["reader"].answerer
    assert answerer is not None
    with served({"reader": models["reader"]}) as (url, *_):
        found = InferenceClient(url).question_answering(question=QUERY, context=words(100))
        most = InferenceClient(url).question_answering(
            question=QUERY, context=words(100), max_answer_len=2, top_k=3
        )
    expected = answerer.answer(QUERY, words(100), allow_none=False)
    assert (found.answer, found.start, found.end) == (expected.answer, expected.start, expected.end)
    assert found.score == pytest.approx(expected.score, rel=1e-4)
    assert isinstance(most, list) and [len(each.answer.split()) <= 2 for each in most] == [True] * 3


def test_langchain(address: str, models: dict[str, Served]) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    # Its other way to ask sends the token ids of OpenAI's own models.
    client = langchain.OpenAIEmbeddings(
        model="embedder", base_url=f"{address}/v1", api_key="none", check_embedding_ctx_length=False
    )
    expected = embedded(models["embedder"], TEXTS)
    close(client.embed_documents(TEXTS), expected)
    close([client.embed_query(TEXTS[0])], expected[:1])
