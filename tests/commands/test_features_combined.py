"""Features one after another, as users combine them, for every family: pruned to layers of nothing, trimmed
before and after, quantised, and then served, under sentence-transformers, in ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import inputs
from family_models import PRUNED_TYPES, TEXTS, saved
from int8_anywhere import int8_anywhere
from matching import save_checkpoint, squad_file
from pruned_ops import QuestionAnswerer, export_onnx, optimize, trim_vocabulary
from pruned_ops.checkpoints.loading import load_any_head, load_tokenizer
from pruned_ops.checkpoints.quantizing import quantize
from pruned_ops.cli import main
from pruned_trainer.cli import main as trainer_main
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision
from tiny_tokenizers import words

# Words that occur, of those that there are; pairs of them are what is ranked.
USED = [words(number) for number in (3, 9, 1, 6)]
PAIRS = [(text, words(4)) for text in USED]
# Heads and FFN units that stay in each layer.
LEFT = ((3, 0), (0, 16), (0, 0))


@pytest.fixture(autouse=True)
def _int8() -> Iterator[None]:
    with int8_anywhere():
        yield


def decision(folder: Path) -> Path:
    """The file of a decision that leaves LEFT."""

    def last(count: int, of: int) -> Kept:
        return Kept(tuple(range(of - count, of)), (1.0,) * count)

    layers = tuple(LayerDecision(last(heads, 4), last(units, 40)) for heads, units in LEFT)
    Decision(layers, 1, {}, {}).save(folder / "decision.json")
    return folder / "decision.json"


def logits(folder: Path, fast: bool = False) -> Any:
    """What the model in a folder gives for PAIRS, (pairs, 1); fast: optimised, in int8 where it is stored
    so."""
    model, tokenizer = load_any_head(str(folder), takes_int8=True), load_tokenizer(str(folder))
    first, second = zip(*PAIRS, strict=True)
    batch = tokenizer(list(first), list(second), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return (optimize(model) if fast else model)(**batch).logits


@pytest.mark.parametrize("pruned_type", PRUNED_TYPES)
def test_ranking(pruned_type: str, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": len(LEFT), "intermediate_size": 40}
    source = saved(pruned_type, TEXTS, tmp_path / "source", num_labels=1, **small)
    decided = decision(tmp_path)

    def compacted(model: Path, name: str) -> Path:
        argv = ["compact", "--model", model, "--decision", decided, "--out", tmp_path / name]
        assert trainer_main([*map(str, argv)]) == 0
        return tmp_path / name

    narrow = compacted(source, "narrow")
    shapes = load_any_head(str(narrow)).config.layer_shapes
    assert [(shape["num_heads"], shape["ffn_width"]) for shape in shapes] == list(LEFT)

    trim_vocabulary(source, tmp_path / "trimmed", USED)
    trim_vocabulary(narrow, tmp_path / "narrow trimmed", USED)
    weights = [
        load_file(folder / "model.safetensors")
        for folder in (compacted(tmp_path / "trimmed", "trimmed narrow"), tmp_path / "narrow trimmed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    expected = logits(narrow)
    torch.testing.assert_close(logits(tmp_path / "narrow trimmed"), expected, rtol=1e-5, atol=1e-6)

    report = quantize(str(narrow), tmp_path / "int8", [*PAIRS, *PAIRS], 0.9)
    assert report.of_linears == report.linears > 0
    in_int8 = logits(tmp_path / "int8", fast=True)
    trim_vocabulary(tmp_path / "int8", tmp_path / "int8 trimmed", USED)
    quantize(str(tmp_path / "narrow trimmed"), tmp_path / "trimmed int8", [*PAIRS, *PAIRS], 0.9)
    for name in ("int8 trimmed", "trimmed int8"):
        assert torch.equal(logits(tmp_path / name, fast=True), in_int8)
    _is_served(tmp_path / "int8 trimmed", in_int8)
    _ranks(tmp_path / "int8 trimmed", in_int8)
    _runs_in_onnx(tmp_path / "narrow trimmed", expected)


def _is_served(folder: Path, expected: torch.Tensor) -> None:
    """The server loads the folder, and gives these logits."""
    try:
        from pruned_ops.serving.models import Loading, load
    except ModuleNotFoundError:  # the extra "serve" is not here
        return
    model = load(str(folder), "ranker", Loading(device="cpu"))
    found = model.compute(model.encoder.encode(PAIRS, cut=True))
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=1e-5)


def _ranks(folder: Path, expected: torch.Tensor) -> None:
    """A CrossEncoder gives the probabilities of these logits, and so does the folder that it saves."""
    try:
        from sentence_transformers import CrossEncoder
    except ModuleNotFoundError:  # the extra "st" is not here
        return
    for name in (folder, folder.with_name("saved")):
        model = optimize(CrossEncoder(str(name), device="cpu"))
        found = model.predict(PAIRS)
        np.testing.assert_allclose(found, expected.sigmoid().squeeze(1), rtol=1e-4, atol=1e-5)
        if name == folder:
            model.save_pretrained(str(folder.with_name("saved")))


def _runs_in_onnx(folder: Path, expected: torch.Tensor) -> None:
    """ONNX Runtime gives these logits."""
    try:
        import onnx as onnx
        import onnxruntime
    except ModuleNotFoundError:  # the extra "onnx" is not here
        return
    path = export_onnx(folder, folder.with_name("onnx"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first, second = zip(*PAIRS, strict=True)
    batch = load_tokenizer(str(folder))(list(first), list(second), padding=True, return_tensors="np")
    given = {one.name: batch[one.name] for one in session.get_inputs()}
    np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_of_more_types_than_the_model_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BERT's beside a RoBERTa, as some are published: every command leaves the types out."""
    folder = save_checkpoint(inputs.stock_model("roberta"), tmp_path / "model")
    squad, texts = squad_file(tmp_path / "squad.json", 8, 1), tmp_path / "texts.txt"
    texts.write_text("\n".join(f"w{i}\tw2 w3" for i in range(8)))
    assert main(["check", str(folder), "--backends", "reference", "--device", "cpu"]) == 0
    argv = ["evaluate", "--model", folder, "--eval-file", squad, "--max-length", 30, "--stride", 4]
    assert trainer_main([*map(str, argv)]) == 0
    argv = ["quantize", folder, tmp_path / "int8", "--texts", texts, "--tolerance", 0.9]
    assert main([*map(str, argv)]) == 0
    assert QuestionAnswerer(tmp_path / "int8").answer("w1", "w1 w2").answer in "w1 w2"
    capsys.readouterr()
