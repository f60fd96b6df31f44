"""Natural Questions predictions: the best span of a document, and files that the official metric reads."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nq_pages import annotation, original, page, parsed, write
from pruned_ops.models.heads import AnswerType
from pruned_trainer.tasks.natural_questions.documents import Document, read_documents
from pruned_trainer.tasks.natural_questions.metrics import nq_metrics
from pruned_trainer.tasks.natural_questions.predictions import LOWEST, decode_documents, predictions_json
from pruned_trainer.tasks.natural_questions.windows import (
    NqWindow,
    answer_span,
    cut_document,
    features,
    located,
)
from real_data import real_data
from tiny_tokenizers import word_tokenizer


def logits_of(windows: list[NqWindow], best: int, start: int, end: int, kind: AnswerType) -> Any:
    """Flat logits, but for a span in one window, and its type."""
    logits = []
    for number, window in enumerate(windows):
        first, last, types = np.zeros(len(window)), np.zeros(len(window)), np.zeros(5)
        if number == best:
            first[start], last[end], types[kind] = 3.0, 4.0, 1.0
            first[window.cls_index] = 0.5
        logits.append((first, last, types))
    return logits


def located_windows(document: Document, number: int, *how: int) -> list[NqWindow]:
    read, windows = cut_document(document, word_tokenizer(), *how)
    return [located(window, read, number) for window in windows]


def test_what_is_trained_is_what_is_right(tmp_path: Path) -> None:
    """A model that says exactly what its windows' labels say finds every long answer of real pages, and every
    short one that is a single span: features and decoding are each other's inverse."""
    tokenizer = AutoTokenizer.from_pretrained(real_data("models/minilm-l6-squad2"))
    path = tmp_path / "gold.jsonl"
    with gzip.open(real_data("data/natural_questions/eval.jsonl.gz")) as file:
        path.write_bytes(b"".join(itertools.islice(file, 120)))
    documents = list(read_documents([path]))
    windows: list[NqWindow] = []
    logits: list[Any] = []
    for number, document in enumerate(documents):
        read, cut_windows = cut_document(document, tokenizer)
        for window, feature in zip(cut_windows, features(document, read, cut_windows), strict=True):
            located_window = located(window, read, number)
            windows.append(located_window)
            start, end, kind = feature["start_positions"], feature["end_positions"], feature["answer_types"]
            logits += logits_of([located_window], 0, start, end, AnswerType(kind))
    written = predictions_json(documents, decode_documents(windows, logits, len(documents)))
    (tmp_path / "predictions.json").write_text(json.dumps(written))
    metrics = nq_metrics(path, tmp_path / "predictions.json")
    assert metrics["long-best-threshold-f1"] == 1.0
    answered = [document for document in documents if answer_span(document)]
    single = sum(any(len(label.short) == 1 for label in document.labels) for document in answered)
    expected = single / len(answered)
    assert metrics["short-best-threshold-f1"] == pytest.approx(expected, abs=0.03) and expected > 0.8


def test_a_large_and_an_empty_document(tmp_path: Path) -> None:
    words = [f"w{i % 400}" for i in range(100_000)]
    large = page(1, "w1", *(" ".join(words[i : i + 1000]) for i in range(0, 100_000, 1000)))
    empty = page(2, "w1", document_text="")
    documents = [parsed(original(large)), parsed(original(empty))]
    windows = [w for i, document in enumerate(documents) for w in located_windows(document, i)]
    assert len(windows) > 300 and windows[-1].document == 1 and (windows[-1].candidate == -1).all()
    at = np.flatnonzero(windows[200].candidate >= 0)
    logits = logits_of(windows, 200, at[10], at[12], AnswerType.SHORT)
    answers = decode_documents(windows, logits, 2)
    assert answers[0].start == windows[200].first[at[10]] and answers[0].end == windows[200].last[at[12]]
    assert answers[0].score == 6.5 and answers[1].score == LOWEST
    written = predictions_json(documents, answers)
    assert written["predictions"][1]["long_answer"]["start_token"] == -1
    path, gold = (
        tmp_path / "predictions.json",
        write(tmp_path / "gold.jsonl", [original(large), original(empty)]),
    )
    path.write_text(json.dumps(written))
    assert nq_metrics(gold, path)["long-best-threshold-f1"] == 0.0  # no annotator gave an answer


def test_predictions_of_the_annotated_answers_are_all_right(tmp_path: Path) -> None:
    """A model that says what the annotators say has an F1 of 1, yes, no and long answers included."""
    entries, kinds = [], (AnswerType.SHORT, AnswerType.YES, AnswerType.NO)
    for key, kind in enumerate(kinds):
        entry = page(key, "w1", "w1 w2", "w3 w4 w5")
        yes_no = kind.name if kind != AnswerType.SHORT else "NONE"
        short = [(8, 10)] if kind == AnswerType.SHORT else []
        entries.append(original({**entry, "annotations": [annotation(entry, 1, *short, yes_no=yes_no)]}))
    documents = list(read_documents([write(tmp_path / "gold.jsonl", entries)]))
    windows, logits = [], []
    for number, (document, kind) in enumerate(zip(documents, kinds, strict=True)):
        document_windows = located_windows(document, number, 64, 8)
        span = (
            np.flatnonzero(document_windows[0].first == 8)[0],
            np.flatnonzero(document_windows[0].last == 10)[0],
        )
        windows += document_windows
        logits += logits_of(document_windows, 0, *span, kind)
    written = predictions_json(
        [document.without_text() for document in documents], decode_documents(windows, logits, 3)
    )
    first = written["predictions"][0]
    text = " ".join(documents[0].tokens).encode()
    place = first["short_answers"][0]
    assert text[place["start_byte"] : place["end_byte"]].decode() == "w3 w4"
    assert first["long_answer"]["candidate_index"] == 1 and first["long_answer_score"] == 6.5
    assert [entry["yes_no_answer"] for entry in written["predictions"]] == ["NONE", "YES", "NO"]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(written))
    metrics = nq_metrics(tmp_path / "gold.jsonl", path)
    assert metrics["long-best-threshold-f1"] == metrics["short-best-threshold-f1"] == 1.0


def test_a_span_lies_in_one_candidate() -> None:
    (window,) = located_windows(parsed(page(1, "w1", "w2 w3", "w4 w5")), 0, 64, 8)
    start, end = np.flatnonzero(window.candidate == 0)[-1], np.flatnonzero(window.candidate == 1)[0]
    (answer,) = decode_documents([window], logits_of([window], 0, start, end, AnswerType.LONG), 1)
    assert answer.candidate in (0, 1)
    lies = window.first[window.candidate == answer.candidate]
    assert lies[0] <= answer.start < answer.end <= lies[-1] + 1


def test_decoding_refusals() -> None:
    (window,) = located_windows(parsed(page(1, "w1", "w2 w3")), 0, 64, 8)
    good = logits_of([window], 0, 4, 4, AnswerType.SHORT)
    with pytest.raises(ValueError, match="1 windows, but logits of 0"):
        decode_documents([window], [], 1)
    with pytest.raises(ValueError, match=r"no window of document 1 \(1 in all\)"):
        decode_documents([window], good, 2)
    with pytest.raises(ValueError, match="window 0 has 7 tokens, but logits of"):
        decode_documents([window], [(good[0][0][1:], *good[0][1:])], 1)
    with pytest.raises(ValueError, match="the logits of window 0 are not finite"):
        decode_documents([window], [(*good[0][:2], np.full(5, np.nan))], 1)
    with pytest.raises(ValueError, match="example 1: question 0 is too long"):
        cut_document(parsed(page(1, " ".join(["w1"] * 30), "w2 w3")), word_tokenizer(), 32, 4)
