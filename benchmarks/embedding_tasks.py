"""Texts to embed, and what embeddings are worth: Spearman's correlation on STS-B, nDCG@10 on SciFact."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Short texts are the sentences of STS-B, middle ones the first sentences of SciFact's abstracts, a random
# number of them. Long ones are abstracts four times over, which the tokenizer cuts to one length, so that
# there is no padding to save. Mixed ones are short and middle in random order.
TEXTS = ("short", "middle", "long", "mixed")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def texts_of(data: Path, number: int) -> dict[str, list[str]]:
    """`number` texts of each kind, drawn with seed 0; of long ones a quarter of it. ValueError where the data
    have fewer."""
    rng = random.Random(0)
    pairs = list(records(data / "stsb" / "eval.jsonl.gz"))
    sentences = [pair[side] for pair in pairs for side in ("text_a", "text_b")]
    abstracts = [row["text"] for row in records(data / "scifact" / "corpus.jsonl.gz")]
    most = min(len(sentences), len(abstracts))
    if number > most:
        raise ValueError(f"{number} texts of each kind are too many: {data} has {most}")
    short, chosen = rng.sample(sentences, number), rng.sample(abstracts, number)
    middle = []
    for text in chosen:
        parts = text.split(". ")
        middle.append(". ".join(parts[: rng.randint(1, len(parts))]))
    long = [" ".join([text] * 4) for text in chosen[: max(1, number // 4)]]
    mixed = rng.sample([*short[: number // 2], *middle[: number - number // 2]], number)
    return {"short": short, "middle": middle, "long": long, "mixed": mixed}


def calibration_of(data: Path) -> list[str]:
    """Texts for an int8 that looks at some: sentences of STS-B that nothing is scored on."""
    return [pair["text_a"] for pair in records(data / "stsb" / "validation.jsonl.gz")][:300]


def normalised(vectors: Any) -> Any:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stsb(model: Any, data: Path, documents: int) -> float:
    """Spearman's correlation, times 100, of the cosines with the people's scores."""
    from scipy.stats import spearmanr

    pairs = list(records(data / "stsb" / "eval.jsonl.gz"))
    first, second = (
        normalised(model.encode([pair[side] for pair in pairs], show_progress_bar=False))
        for side in ("text_a", "text_b")
    )
    return 100 * float(spearmanr((first * second).sum(1), [pair["score"] for pair in pairs]).statistic)


def scifact(model: Any, data: Path, documents: int) -> float:
    """nDCG@10 of the claims' abstracts by cosine, with title and text, as in BEIR. Of the abstracts, those
    that a claim needs and then the first others are searched, `documents` in all."""
    from sklearn.metrics import ndcg_score

    claims = list(records(data / "scifact" / "eval.jsonl.gz"))
    needed = {document for claim in claims for document in claim["relevant"]}
    corpus = sorted(records(data / "scifact" / "corpus.jsonl.gz"), key=lambda row: row["id"] not in needed)
    corpus = corpus[: max(documents, len(needed))]
    matrix = normalised(
        model.encode([f"{row['title']} {row['text']}" for row in corpus], show_progress_bar=False)
    )
    asked = normalised(model.encode([claim["text"] for claim in claims], show_progress_bar=False))
    relevance = [[float(row["id"] in claim["relevant"]) for row in corpus] for claim in claims]
    return 100 * float(ndcg_score(relevance, asked @ matrix.T, k=10))


# A task -> its score, times 100, of a model with `encode`.
TASKS: dict[str, Callable[[Any, Path, int], float]] = {"stsb": stsb, "scifact": scifact}
