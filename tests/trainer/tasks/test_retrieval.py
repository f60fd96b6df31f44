"""Queries and documents as BEIR has them: what is read and left out, and what the scores in a file mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts import embedding
from pruned_trainer.tasks.texts.embedding import EmbeddingTask
from pruned_trainer.tasks.texts.prepared import PreparedTexts
from pruned_trainer.tasks.texts.ranking import RETRIEVAL
from pruned_trainer.tasks.texts.retrieval import Retrieval
from text_files import write_rows


def test_documents_and_queries_that_are_bad_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    """A document of a title alone is none of them: BEIR's collections have such."""
    rows = [{"_id": "a", "title": "w1", "text": ""}, {"_id": "b", "title": "", "text": "w2"}]
    bad: list[dict[str, Any]] = [
        {"_id": "c", "title": " ", "text": ""}, {"_id": "a", "text": "w3"}, {"_id": "d", "text": 4}
    ]  # fmt: skip
    corpus = write_rows(tmp_path / "corpus.jsonl", [*bad[:1], *rows, *bad[1:]])
    asked = [{"_id": "q", "text": "w1"}, {"_id": "r", "text": " "}]
    queries = write_rows(tmp_path / "queries.jsonl", asked)
    pairs = [("q", "a"), ("q", "d"), ("r", "b")]
    named = [{"query-id": query, "corpus-id": document, "score": 1} for query, document in pairs]
    judged = write_rows(tmp_path / "test.tsv", named)
    options = TaskOptions(task="embedding", corpus=corpus, queries=queries, skip_bad=True)
    task = EmbeddingTask(options)
    search = task.read(judged, "validation")
    assert isinstance(search, Retrieval) and search.documents == ("w1", "w2")
    assert [query.texts for query in search.queries] == [("w1",)] and search.relevant == ({0: 1.0},)
    assert len(task.faults.skipped) == 6 and f"{corpus}, row 0: 'text' is empty" in task.faults.skipped
    with pytest.raises(FormatError, match=r"corpus\.jsonl, row 0: 'text' is empty"):
        EmbeddingTask(replace(options, skip_bad=False)).read(judged, "validation")


def test_a_query_to_which_no_document_is_relevant_is_a_fault(tmp_path: Path) -> None:
    """However often it is judged. A query that is not judged at all (s) is none."""
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"_id": n, "text": f"w{n}"} for n in range(2)])
    queries = write_rows(tmp_path / "queries.jsonl", [{"_id": q, "text": f"w{q}"} for q in "qrs"])
    grades = [("q", 0, 0), ("r", 0, 0), ("q", 1, -1), ("r", 1, 2)]
    rows = [{"query-id": query, "corpus-id": number, "score": grade} for query, number, grade in grades]
    judged = write_rows(tmp_path / "test.tsv", rows)
    options = TaskOptions(task="embedding", corpus=corpus, queries=queries, skip_bad=True)
    task = EmbeddingTask(options)
    search = task.read(judged, "validation")
    assert isinstance(search, Retrieval) and search.relevant == ({1: 2.0},)
    (fault,) = task.faults.skipped
    assert fault == f"{judged}, row 0: no document is relevant to query 'q'"
    with pytest.raises(FormatError, match="no document is relevant to query 'q'"):
        EmbeddingTask(replace(options, skip_bad=False)).read(judged, "validation")


def test_scores_of_documents_are_the_gains_of_ndcg(tmp_path: Path) -> None:
    """As the grades of BEIR's files are; the other metrics ask only whether a document is relevant."""
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"_id": n, "text": f"w{n}"} for n in range(3)])
    queries = write_rows(tmp_path / "queries.jsonl", [{"_id": "q", "text": "w9"}])
    grades = [{"query-id": "q", "corpus-id": n, "score": grade} for n, grade in ((0, 1), (1, 2), (2, 0))]
    task = EmbeddingTask(TaskOptions(task="embedding", corpus=corpus, queries=queries))
    search = task.read(write_rows(tmp_path / "test.tsv", grades), "validation")
    assert isinstance(search, Retrieval) and search.relevant == ({0: 1.0, 1: 2.0},)
    nothing: Any = None
    texts = PreparedTexts("texts", 4, [], nothing, (), nothing, nothing, nothing)
    prepared = embedding._search(texts, search, ["w9", "w0", "w1", "w2"])
    assert prepared.gold.tolist() == [[1.0, 2.0, 0.0]]
    said = np.array([[3.0, 2.0, 1.0]])
    found = {metric.score.key: metric.value(prepared.gold, said) for metric in RETRIEVAL}
    gains = (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    assert found == pytest.approx({"ndcg": 100 * gains, "mrr": 100, "recall": 100})
