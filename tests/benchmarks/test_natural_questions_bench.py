"""bench_natural_questions.py: Hugging Face's model is the checkpoint's, and the script runs end to end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import bench_natural_questions as bench
from inputs import padded_batch, pruned_model, stock_model
from nq_pages import matching_file
from pruned_ops.models.natural_questions import with_answer_types
from tiny_tokenizers import word_tokenizer


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_hugging_face_s_model_is_the_checkpoint_s(kind: str, attention: str) -> None:
    model = with_answer_types(stock_model(kind)).eval()
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    theirs = bench.HuggingFace(model, attention).eval()
    assert theirs.encoder.config._attn_implementation == attention
    assert type(theirs.encoder).__module__.startswith("transformers.")
    with torch.no_grad():
        expected, found = model(**batch), theirs(**batch)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][real], expected[name][real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.answer_type_logits, expected.answer_type_logits, atol=2e-5, rtol=1e-4)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in (("dense", stock_model()), ("pruned", pruned_model())):
        with_answer_types(model).save_pretrained(tmp_path / name)
        word_tokenizer(90).save_pretrained(tmp_path / name)
    data = matching_file(tmp_path / "eval.jsonl", 6, 1, words=90, annotators=5)
    peaks = iter(range(100, 200))
    monkeypatch.setattr(bench, "peak_apart", lambda *_: float(next(peaks)))  # a process each takes seconds
    monkeypatch.setattr(bench, "MAX_LENGTH", 40)
    monkeypatch.setattr(bench, "STRIDE", 8)
    out = tmp_path / "out.csv"
    argv = [str(tmp_path / "dense"), str(tmp_path / "pruned"), "--data", str(data), "--out", str(out)]
    bench.main([*argv, "--documents", "4", "--rounds", "2"])
    rows = {row["runner"]: row for row in csv.DictReader(out.open())}
    assert {
        "hf-eager dense",
        "hf-sdpa dense",
        "ours dense",
        "torch-sdpa pruned",
        "ours pruned",
    } <= rows.keys()
    for row in rows.values():
        assert float(row["documents_per_s"]) > 0 and row["documents"] == "4" and row["rounds"] == "2"
        assert int(row["padded_tokens"]) >= int(row["real_tokens"]) > 0
    assert float(rows["hf-eager dense"]["speedup_vs_rival"]) == 1
    assert float(rows["torch-sdpa pruned"]["speedup_vs_itself_padded"]) == 1
    table = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in rows) and "4 documents of eval.jsonl" in table
