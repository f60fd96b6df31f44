"""Every family goes every way: commands, answers, ONNX, import, sentence-transformers, the server, a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pruned_ops
from family_models import (
    ANSWERS,
    PRUNED_TYPES,
    TEXTS,
    TOKENS,
    WORDS,
    batch,
    largest_difference,
    outputs,
    pruned,
    saved,
    stock,
)
from matching import squad_file
from pruned_ops import QuestionAnswerer
from pruned_ops.checkpoints.loading import load_any_head, load_model, load_tokenizer
from pruned_ops.cli import main
from pruned_ops.models.natural_questions import load_natural_questions, with_answer_types
from pruned_trainer.cli import main as trainer_main
from quick_reports import quick_reports as quick_reports  # of the jobs below
from tiny_tokenizers import words

CLOSE = 3e-5
# BERT and RoBERTa go these ways in the tests of each.
NEW = [kind for kind in PRUNED_TYPES if kind not in ("pruned_bert", "pruned_roberta")]
TYPES = pytest.mark.parametrize("pruned_type", NEW)
# Those that are not imported; test_modernbert.py has what else ModernBERT refuses.
OTHERS = ("pruned_modernbert", "pruned_deberta_v2")
IMPORTED = pytest.mark.parametrize("pruned_type", [kind for kind in NEW if kind not in OTHERS])
# So many tokens of words, and of bytes, hold a question and some of a text.
CUT = 40


@pytest.fixture
def reader(pruned_type: str, tmp_path: Path) -> Path:
    """The folder of a stock question-answering model."""
    return saved(pruned_type, ANSWERS, tmp_path / "reader")


@IMPORTED
def test_checked_imported_asked(reader: Path, pruned_type: str, tmp_path: Path) -> None:
    assert main(["check", str(reader), "--device", "cpu", "--backends", "reference"]) == 0
    assert main(["import", str(reader), str(tmp_path / "imported")]) == 0
    source, again = load_model(str(reader)), load_model(str(tmp_path / "imported"))
    assert again.config.model_type == pruned_type
    assert largest_difference(outputs(again, batch("holes")), outputs(source, batch("holes"))) <= CLOSE
    text = words(20)
    found = QuestionAnswerer(reader, max_length=CUT).answer("w3", text, top_k=3)
    same = QuestionAnswerer(again, load_tokenizer(str(reader)), max_length=CUT).answer("w3", text, top_k=3)
    assert [one.answer for one in same] == [one.answer for one in found]
    assert all(one.answer == text[one.start : one.end] for one in found)


@pytest.mark.parametrize("pruned_type", OTHERS)
def test_checked_asked(reader: Path, pruned_type: str) -> None:
    assert main(["check", str(reader), "--device", "cpu", "--backends", "reference"]) == 0
    source, text = load_model(str(reader)), words(20)
    found = QuestionAnswerer(reader, max_length=CUT).answer("w3", text, top_k=3)
    fast = pruned_ops.optimize(source)
    same = QuestionAnswerer(fast, load_tokenizer(str(reader)), max_length=CUT).answer("w3", text, top_k=3)
    assert [one.answer for one in same] == [one.answer for one in found]
    assert all(one.answer == text[one.start : one.end] for one in found)


@TYPES
@pytest.mark.parametrize("head", ["", ANSWERS, TEXTS, TOKENS])
def test_exported(pruned_type: str, head: str, tmp_path: Path) -> None:
    """Stock, and pruned to odd shapes: ONNX Runtime computes what the model does."""
    pytest.importorskip("onnx", reason='needs the extra "onnx"')
    ort = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')
    for name, model in (
        ("stock", stock(PRUNED_TYPES[pruned_type], head)),
        ("pruned", pruned(pruned_type, head)),
    ):
        path = pruned_ops.export_onnx(model, tmp_path / name, token_types=False)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for inputs in (batch("holes"), batch("right", (33, 40, 1))):
            given = {name: tensor.numpy() for name, tensor in inputs.items()}
            names, real = [one.name for one in session.get_outputs()], inputs["attention_mask"].bool()
            found = dict(zip(names, map(torch.from_numpy, session.run(names, given)), strict=True))
            for name, expected in outputs(model, inputs).items():
                ours = found[name][real] if found[name].shape[:2] == real.shape else found[name]
                torch.testing.assert_close(ours, expected, atol=CLOSE, rtol=CLOSE)


@TYPES
def test_natural_questions(pruned_type: str, tmp_path: Path) -> None:
    """A stock model gets answer types, and is saved as a pruned one; the bare encoder is loaded, too."""
    model, inputs = with_answer_types(stock(PRUNED_TYPES[pruned_type], ANSWERS)).eval(), batch("right")
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert largest_difference(outputs(load_natural_questions(tmp_path), inputs), expected) == 0
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE
    bare = stock(PRUNED_TYPES[pruned_type], "")
    bare.save_pretrained(tmp_path / "bare")
    assert type(load_any_head(str(tmp_path / "bare"))) is type(bare)


@TYPES
@pytest.mark.parametrize(
    ("kind", "head"), [("SentenceTransformer", ""), ("CrossEncoder", TEXTS), ("SparseEncoder", WORDS)]
)
def test_sentence_transformers(pruned_type: str, kind: str, head: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    labels = {"num_labels": 1} if head == TEXTS else {}
    saved(pruned_type, head, tmp_path, **labels)
    plain, fast = (getattr(library, kind)(str(tmp_path), device="cpu") for _ in range(2))
    pruned_ops.optimize(fast)
    texts: Any = [words(number) for number in (3, 10, 1, 7)]
    if kind == "CrossEncoder":
        texts = [(text, words(5)) for text in texts]
    call = "predict" if kind == "CrossEncoder" else "encode"
    found, expected = (getattr(one, call)(texts) for one in (fast, plain))
    if kind == "SparseEncoder":
        found, expected = found.to_dense().numpy(), expected.to_dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=CLOSE)


@TYPES
def test_served(reader: Path, pruned_type: str, tmp_path: Path) -> None:
    for package in ("fastapi", "orjson", "prometheus_client"):
        pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')
    from pruned_ops.serving.models import Loading, load

    for name, head in (("embedder", ""), ("classifier", TEXTS)):
        folder = saved(pruned_type, head, tmp_path / name)
        packed = load(str(folder), "a", Loading(device="cpu"))
        plain = load(str(folder), "b", Loading(device="cpu", plain=True))
        sequences = packed.encoder.encode([words(3), words(20)], cut=True)
        np.testing.assert_allclose(packed.compute(sequences), plain.compute(sequences), rtol=1e-4, atol=CLOSE)
    assert load(str(reader), "c", Loading(device="cpu")).kind == "question answering"


@TYPES
def test_pruned_by_a_job_and_timed(reader: Path, pruned_type: str, tmp_path: Path) -> None:
    train, judged = (squad_file(tmp_path / f"{n}.json", 24, n) for n in (1, 2))
    out = tmp_path / "out"
    argv = ["prune", "--model", reader, "--train-file", train, "--eval-file", judged, "--out", out]
    argv += ["--macs", "0.6", "--gate-steps", 2, "--retrain-steps", 2, "--max-length", CUT, "--stride", 4]
    assert trainer_main([*map(str, argv)]) == 0
    narrow = load_model(str(out))
    assert narrow.config.model_type == pruned_type
    report = json.loads((out / "report.json").read_text())
    assert report["shape"] == narrow.config.layer_shapes
    assert report["pruned"]["macs"] <= 0.6 * report["dense"]["macs"]
    assert narrow.config.family.name in (out / "README.md").read_text()
    timed = ["bench", out, "--dense", reader, "--length", 9, "--rounds", 1]
    assert main([*map(str, timed)]) == 0
