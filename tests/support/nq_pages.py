"""Natural Questions documents made in a test, and a task on them that takes seconds to learn."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from pruned_trainer.tasks.natural_questions.documents import Document, parse_document

NULL = {"start_token": -1, "end_token": -1, "candidate_index": -1}


def page(key: int, question: str, *paragraphs: str, **changes: Any) -> dict[str, Any]:
    """An entry of the simplified layout: each paragraph a top-level candidate, no annotation."""
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
        one = entry["long_answer_candidates"][candidate]
        long = {
            "start_token": one["start_token"],
            "end_token": one["end_token"],
            "candidate_index": candidate,
        }
    spans = [{"start_token": start, "end_token": end} for start, end in short]
    return {"annotation_id": 0, "long_answer": long, "short_answers": spans, "yes_no_answer": yes_no}


def original(entry: dict[str, Any], annotators: int = 5) -> dict[str, Any]:
    """The same entry in the original layout, with byte offsets, and its annotations repeated in turn."""
    tokens, place = [], 0
    for word in entry["document_text"].split(" ") if entry["document_text"] else []:
        size = len(word.encode())
        html = word.startswith("<")
        tokens.append({"token": word, "start_byte": place, "end_byte": place + size, "html_token": html})
        place += size + 1
    labels = entry["annotations"] or [annotation(entry)]
    found = {name: value for name, value in entry.items() if name != "document_text"}
    repeated = [labels[i % len(labels)] for i in range(annotators)]
    return {**found, "document_tokens": tokens, "annotations": repeated}


def parsed(entry: dict[str, Any]) -> Document:
    return parse_document(json.dumps(entry).encode())


def write(path: Path, entries: list[Any]) -> Path:
    """JSONL, packed where the name ends in .gz; entries of bytes are lines as they are."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in entries]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def matching_page(key: int, rng: random.Random, words: int, paragraphs: int = 2) -> dict[str, Any]:
    """ "w7" asked of a page of different words: a short answer where it is there; now and then it is not."""
    chosen = rng.sample([f"w{i}" for i in range(words)], 5 * paragraphs + 1)
    texts = [" ".join(chosen[5 * i : 5 * i + 5]) for i in range(paragraphs)]
    absent = rng.random() < 0.3
    asked = chosen[-1] if absent else rng.choice(chosen[:-1])
    entry = page(key, asked, *texts)
    label = annotation(entry)
    if not absent:
        place = entry["document_text"].split(" ").index(asked)
        label = annotation(entry, chosen.index(asked) // 5, (place, place + 1))
    return {**entry, "annotations": [label]}


def matching_file(path: Path, documents: int, seed: int, words: int = 24, annotators: int = 1) -> Path:
    """A file of such pages: simplified with one annotator, original with more."""
    rng = random.Random(seed)
    entries = [matching_page(1000 * seed + number, rng, words) for number in range(documents)]
    return write(path, entries if annotators == 1 else [original(one, annotators) for one in entries])
