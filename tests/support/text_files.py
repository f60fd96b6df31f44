"""Small files for the tasks on rows of texts, made from seeds, which models learn in seconds."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from matching import WORDS, save_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": WORDS + 4, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# The options of commands on these models: 20 words and the special tokens fit.
CUT = ("--max-length", "24")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as the ending of the path says: .jsonl, .jsonl.gz, .json, .csv or .tsv."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(lines)
    return path


def classified(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of ten words; a text is "high" where most of them are of the upper half."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        high = rng.random() < 0.5
        words = [rng.randrange(WORDS // 2) + (WORDS // 2 if high == (i < 8) else 0) for i in range(10)]
        rng.shuffle(words)
        rows.append({"text": " ".join(f"w{word}" for word in words), "label": "high" if high else "low"})
    return rows


def scored(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of texts; the score is the share of the first's words that the second has."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words, common = rng.sample(range(WORDS), 12), rng.randrange(5)
        first, second = words[:4], words[4 - common : 8 - common]
        texts = [" ".join(f"w{word}" for word in half) for half in (first, second)]
        rows.append({"text_a": texts[0], "text_b": texts[1], "score": common / 4})
    return rows


def checkpoint(folder: Path, model_class: Any, **fields: Any) -> Path:
    """A small random model of this class, with the word tokenizer."""
    torch.manual_seed(0)
    return save_checkpoint(model_class(BertConfig(**{**SIZES, **fields})), folder)


def tagged(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences in words; w0 to w3 begin an entity of type a, w4 and w5 of type b; w6 to w9 go on."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [rng.randrange(WORDS) for _ in range(10)]
        tags: list[str] = []
        for word in words:
            if word < 6:
                tags.append("B-a" if word < 4 else "B-b")
            else:
                tags.append(f"I-{tags[-1][2:]}" if word < 10 and tags and tags[-1] != "O" else "O")
        rows.append({"tokens": [f"w{word}" for word in words], "tags": tags})
    return rows


def ranked(queries: int, seed: int) -> list[dict[str, Any]]:
    """Distinct queries of two words with four passages, of which the one that holds them is relevant."""
    rng = random.Random(seed)
    rows = []
    for asked in rng.sample([(a, b) for a in range(WORDS) for b in range(WORDS) if a != b], queries):
        others = [word for word in range(WORDS) if word not in asked]
        rng.shuffle(others)
        passages = [others[5 * i : 5 * i + 4] for i in range(4)]
        right = rng.randrange(4)
        passages[right][1:3] = asked
        texts = [" ".join(f"w{word}" for word in words) for words in passages]
        query = f"w{asked[0]} w{asked[1]}"
        rows.append({"query": query, "passage": texts, "relevant": [i == right for i in range(4)]})
    return rows
