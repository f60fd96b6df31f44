"""Checkpoints of int8 weights under the commands that judge and time models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pruned_ops
from head_models import pruned, stock
from inputs import logits, padded_batch, pruned_model
from int8_anywhere import int8_anywhere
from matching import save_checkpoint, squad_file
from pruned_ops.checkpoints.loading import load_any_head, load_model
from pruned_ops.cli import main
from pruned_ops.layers.int8 import Int8Linear
from pruned_ops.qa import agreement
from pruned_trainer import compact
from pruned_trainer.cli import main as trainer_main
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision
from text_files import classified, write_rows
from tiny_tokenizers import word_tokenizer


@pytest.fixture(autouse=True)
def _int8() -> Iterator[None]:
    with int8_anywhere():
        yield


def in_int8(model: Any, folder: Path) -> Path:
    """The folder of the model's int8 weights, with a tokenizer."""
    return save_checkpoint(pruned_ops.optimize(model, dtype="int8"), folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pruned question-answering model, with layers of no heads and of FFN width 0."""
    return in_int8(pruned_model(), tmp_path / "int8")


def run(capsys: pytest.CaptureFixture[str], command: str, *argv: object) -> tuple[int, str, str]:
    status = (trainer_main if command == "evaluate" else main)([command, *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_checked(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are held against themselves in fp32, what runs in int8 against the tolerance."""
    status, screen, error = run(capsys, "check", folder, "--backends", "reference")
    assert (status, error) == (0, "") and "passed: the int8 weights that run are those of the file" in screen
    rows = dict(re.findall(r"│ (\w+) +│ +(\S+) │", screen))
    assert list(rows) == ["saved", "optimised", "reference", "int8"]
    assert float(rows["reference"]) < 1e-4 < float(rows["int8"])
    status, screen, _ = run(capsys, "check", folder, "--backends", "reference", "--tolerance", 1e-6)
    assert status == 1 and "FAILED: int8 is off by" in screen
    monkeypatch.setattr(agreement, "_keeps_weights", lambda model: False)
    status, screen, _ = run(capsys, "check", folder, "--backends", "reference")
    assert status == 1 and "FAILED: the int8 weights that run are not those of the file" in screen


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_every_head_is_checked(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = in_int8(pruned("bert", head), tmp_path)
    status, screen, error = run(capsys, "check", folder, "--backends", "reference", "--tolerance", 0.5)
    assert (status, error) == (0, "") and "│ int8 " in screen


def test_timed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In int8, beside its own weights in fp32 and a dense model in fp32."""
    dense = save_checkpoint(pruned_model(), tmp_path / "fp32")
    short = ("--length", 6, "--rounds", 1, "--batches", 1)
    status, screen, error = run(capsys, "bench", folder, "--dense", dense, *short)
    assert (status, error) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in screen.splitlines() if "│" in line]
    assert rows == [
        ["pruned", "pruned_ops", "int8"], ["pruned", "Hugging Face", "fp32"],
        ["dense", "pruned_ops", "fp32"], ["dense", "Hugging Face", "fp32"],
    ]  # fmt: skip
    assert "the weights of the pruned model are stored in int8" in screen


def test_scored_as_it_is_served(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, said = squad_file(tmp_path / "squad.json", 20, 1), tmp_path / "said.json"
    argv = ("--eval-file", data, "--max-length", 30, "--stride", 4, "--predictions", said)
    status, screen, _ = run(capsys, "evaluate", "--model", folder, *argv)
    assert status == 0 and "f1_span" in screen
    answerer = pruned_ops.QuestionAnswerer(folder, max_length=30, stride=4)
    for article in json.loads(data.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answer = answerer.answer(asked["question"], paragraph["context"]).answer
                assert json.loads(said.read_text())[asked["id"]] == answer


def test_what_cannot_be_done(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = squad_file(tmp_path / "squad.json", 20, 1)
    stored = "stored in int8"
    for command, *argv in (
        ("check", folder, "--dtype", "bfloat16"),
        ("bench", folder, "--dtype", "bfloat16", "--length", 6),
        ("evaluate", "--model", folder, "--eval-file", data, "--dtype", "bfloat16"),
    ):
        status, _, error = run(capsys, str(command), *argv)
        assert status == 2 and stored in error.splitlines()[-1]
    status, _, error = run(capsys, "export", folder, "--onnx", tmp_path / "onnx")
    assert status == 2 and "its weights are quantised, and can only be run" in error
    status, _, error = run(capsys, "import", folder, tmp_path / "imported")
    assert status == 2 and "its weights are quantised, and can only be run" in error
    nothing = LayerDecision(Kept((), ()), Kept((), ()))
    with pytest.raises(ValueError, match="stored in int8, and are neither trained nor cut"):
        compact(load_model(str(folder), takes_int8=True), Decision((nothing,) * 5, 1, {}, {}))
    fp32 = save_checkpoint(pruned_model(), tmp_path / "fp32")
    status, _, error = run(capsys, "check", fp32, "--tolerance", 0.1)
    assert status == 2 and "--tolerance goes with --dtype, or with a checkpoint of int8 weights" in error


def test_its_weights_in_fp32(folder: Path) -> None:
    """transformers' own method makes a plain model of it, which is saved, trained and cast as any other; its
    card says so, and the other's does not."""
    batch = padded_batch((9, 4, 1))
    model = load_model(str(folder), takes_int8=True)
    expected = logits(model, batch)
    stored = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    plain = model.dequantize()
    assert torch.equal(logits(plain, batch), expected)
    trained = [parameter for name in stored for parameter in plain.get_submodule(name).parameters()]
    assert trained and all(parameter.requires_grad for parameter in trained)
    assert not any(isinstance(module, Int8Linear) for module in plain.modules())
    plain.save_pretrained(folder.with_name("plain"))
    uses = {"int8": "linear layers in int8; it can only be run", "plain": "it can be trained on"}
    for name, use in uses.items():
        assert f"  # plain torch, padded; {use}\n" in (folder.with_name(name) / "README.md").read_text()
    assert torch.equal(logits(load_model(str(folder.with_name("plain"))), batch), expected)
    assert plain.double().dtype == torch.float64


def test_a_head_of_texts_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stock("bert", "sequence")
    model.config.id2label, model.config.label2id = (
        {0: "low", 1: "high", 2: "no"},
        {"low": 0, "high": 1, "no": 2},
    )
    pruned_ops.optimize(model, dtype="int8").save_pretrained(tmp_path / "int8")
    word_tokenizer(90).save_pretrained(tmp_path / "int8")
    rows = write_rows(tmp_path / "rows.jsonl", classified(20, 1))
    argv = ("--task", "text-classification", "--model", tmp_path / "int8", "--eval-file", rows)
    status, screen, _ = run(capsys, "evaluate", *argv, "--max-length", 30)
    assert status == 0 and "accuracy" in screen
    assert isinstance(
        load_any_head(str(tmp_path / "int8"), takes_int8=True).bert.encoder.layer[0].output.dense, Int8Linear
    )
