"""Natural Questions documents made for tests, among them a file that a model learns in seconds."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from pruned_trainer.tasks.natural_questions.documents import Document, parse_document

NULL = {"start_token": -1, "end_token": -1, "candidate_index": -1}


def page(key: int, question: str, *paragraphs: str, **changes: Any) -> dict[str, Any]:
    """An entry of the simplified layout, whose paragraphs are top-level candidates; it has no annotation."""
    tokens, candidates = ["<H1>", "Title", "</H1>"], []
    for text in paragraphs:
        words = text.split(" ") if text else []
        if not words or not words[0].startswith("<"):
            words = ["<P>", *words, "</P>"]
        candidates.append(
            {"start_token": len(tokens), "end_token": len(tokens) + len(words), "top_level": True}
        )
        tokens += words
    entry = {
        "example_id": key, "question_text": question, "document_title": "Title",
        "document_text": " ".join(tokens), "long_answer_candidates": candidates, "annotations": [],
    }  # fmt: skip
    return {**entry, **changes}


def annotation(
    entry: dict[str, Any], candidate: int = -1, *short: tuple[int, int], yes_no: str = "NONE"
) -> Any:
    """An annotator's label; short: (start, end), document tokens."""
    long = dict(NULL)
    if candidate >= 0:
        chosen = entry["long_answer_candidates"][candidate]
        long = {
            "start_token": chosen["start_token"],
            "end_token": chosen["end_token"],
            "candidate_index": candidate,
        }
    spans = [{"start_token": start, "end_token": end} for start, end in short]
    return {"annotation_id": 0, "long_answer": long, "short_answers": spans, "yes_no_answer": yes_no}


def original(entry: dict[str, Any], annotators: int = 5) -> dict[str, Any]:
    """The same entry in the original layout, with byte offsets, and its annotations repeated in turn."""
    tokens, start = [], 0
    for word in entry["document_text"].split(" ") if entry["document_text"] else []:
        size = len(word.encode())
        html = word.startswith("<")
        tokens.append({"token": word, "start_byte": start, "end_byte": start + size, "html_token": html})
        start += size + 1
    labels = entry["annotations"] or [annotation(entry)]
    others = {name: value for name, value in entry.items() if name != "document_text"}
    repeated = [labels[i % len(labels)] for i in range(annotators)]
    return {**others, "document_tokens": tokens, "annotations": repeated}


def parsed(entry: dict[str, Any]) -> Document:
    return parse_document(json.dumps(entry).encode())


def write(path: Path, entries: list[Any]) -> Path:
    """A JSONL file, gzip where its name ends in .gz; entries that are bytes become lines as they are."""
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def matching_page(key: int, rng: random.Random, words: int, paragraphs: int = 2) -> dict[str, Any]:
    """A page of different words, of which the question is one and the answer; now and then it is absent."""
    chosen = rng.sample([f"w{i}" for i in range(words)], 5 * paragraphs + 1)
    texts = [" ".join(chosen[5 * i : 5 * i + 5]) for i in range(paragraphs)]
    absent = rng.random() < 0.3
    question = chosen[-1] if absent else rng.choice(chosen[:-1])
    entry = page(key, question, *texts)
    label = annotation(entry)
    if not absent:
        token = entry["document_text"].split(" ").index(question)
        label = annotation(entry, chosen.index(question) // 5, (token, token + 1))
    return {**entry, "annotations": [label]}


def matching_file(path: Path, documents: int, seed: int, words: int = 24, annotators: int = 1) -> Path:
    """A file of matching pages, in the simplified layout with one annotator, in the original with more."""
    rng = random.Random(seed)
    entries = [matching_page(1000 * seed + number, rng, words) for number in range(documents)]
    return write(path, entries if annotators == 1 else [original(entry, annotators) for entry in entries])
