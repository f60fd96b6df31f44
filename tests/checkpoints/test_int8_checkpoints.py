"""int8 weights on disk: saved, loaded without fp32, the same logits bit for bit; quantised with a gate."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
)

import family_models
import pruned_ops
from head_models import stock
from inputs import logits, padded_batch, pruned_model, stock_model
from int8_anywhere import int8_anywhere
from pruned_ops.checkpoints import loading, quantizing
from pruned_ops.checkpoints.loading import load_model
from pruned_ops.checkpoints.quantizing import GateNotMet, quantize
from pruned_ops.cli import main
from pruned_ops.commands.quantize import read_texts
from pruned_ops.layers.int8 import DEQUANTIZE, Int8Linear
from pruned_ops.models.int8_checkpoints import Int8Config, halved
from text_models import sentences, text_folder
from tiny_tokenizers import word_tokenizer


@pytest.fixture(autouse=True)
def _int8() -> Iterator[None]:
    with int8_anywhere():
        yield


def saved(model: Any, folder: Path) -> Any:
    """The model in int8, after it was saved."""
    fast = pruned_ops.optimize(model, dtype="int8")
    fast.save_pretrained(folder)
    return fast


def test_it_loads_and_says_the_same_bit_for_bit(model: Any, tmp_path: Path) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    exact, original = logits(model, batch), copy.deepcopy(model)
    fast = saved(model, tmp_path)
    expected = logits(fast, batch)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    linears = [module for module in again.modules() if isinstance(module, Int8Linear)]
    layers = {
        id(p) for p in again.base_model.encoder.parameters() if p.dtype == torch.float32 and p.dim() > 1
    }
    assert linears and not layers
    real = batch["attention_mask"].bool()
    unoptimised = logits(again, batch)[real]
    assert float((unoptimised - exact[real]).norm() / exact[real].norm()) < 0.1
    assert torch.equal(logits(pruned_ops.optimize(again), batch), expected)
    assert pruned_ops.optimize(again, dtype="int8") is again
    restored = pruned_ops.restore(fast)  # its fp32 weights are there still
    assert torch.equal(logits(restored, batch), exact)
    assert not hasattr(restored.config, "quantization_config") and "save_pretrained" not in vars(restored)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), original.parameters(), strict=True))


def test_the_file_is_small_and_plain(tmp_path: Path) -> None:
    model = stock_model(hidden_size=128, num_attention_heads=4, intermediate_size=512)
    model.save_pretrained(tmp_path / "fp32")
    saved(model, tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "int8")]
    assert sizes[1] < 0.5 * sizes[0]
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.key"
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    assert (weight.dtype, tuple(weight.shape), tuple(scale.shape)) == (torch.int8, (128, 128), (128,))
    own = pruned_ops.restore(model).bert.encoder.layer[1].attention.self.key.weight
    error = (weight.float() * scale[:, None] - own).abs()
    assert bool((error <= scale[:, None] * 0.501).all())  # row by row, as on any machine
    told = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert (
        told["quant_method"] == "pruned_ops_int8" and "encoder.layer.1.attention.self.key" in told["linears"]
    )
    assert len(told["linears"]) == 3 * 6


def test_a_loaded_model_is_saved_copied_and_pickled(tmp_path: Path) -> None:
    batch = padded_batch((9, 4, 1))
    expected = logits(saved(stock_model(), tmp_path / "first"), batch)
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "first").eval()
    own = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fast = pruned_ops.optimize(plain)
    state = fast.state_dict()
    assert list(state) == list(own) and all(torch.equal(state[name], own[name]) for name in own)
    fast.save_pretrained(tmp_path / "second")
    twins = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    twins.append(
        pruned_ops.optimize(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "second").eval())
    )
    assert all(torch.equal(logits(twin, batch), expected) for twin in twins)
    assert torch.equal(
        logits(pruned_ops.optimize(load_model(str(tmp_path / "second"), takes_int8=True)), batch), expected
    )
    for twin in (fast, *twins):
        with pytest.raises(
            ValueError, match="loaded from int8 weights, and there are no fp32 weights to restore"
        ):
            pruned_ops.restore(twin)
    with pytest.raises(RuntimeError, match=re.escape(f"beside float32 weights: {DEQUANTIZE}")):
        fast.bert.double()


def test_every_refusal_says_how_to_get_fp32_weights(tmp_path: Path) -> None:
    """And that way leads there: the same weights as those of the file, to export, restore, cast and train."""
    saved(stock_model(), tmp_path / "int8")
    plain, fast = (AutoModelForQuestionAnswering.from_pretrained(tmp_path / "int8") for _ in range(2))
    expected, own = logits(plain.eval(), padded_batch()), fast.state_dict()
    pruned_ops.optimize(fast)
    for refused in (
        lambda: pruned_ops.export_onnx(plain, tmp_path / "onnx"),
        lambda: pruned_ops.export_onnx(fast, tmp_path / "onnx"),
        lambda: pruned_ops.restore(fast),
        fast.dequantize,
        fast.bert.double,
    ):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(DEQUANTIZE)):
            refused()
    assert fast.is_quantized and fast.state_dict().keys() == own.keys()
    for fp32 in (plain.dequantize(), pruned_ops.restore(pruned_ops.optimize(plain))):
        assert torch.equal(logits(fp32, padded_batch()), expected)
    assert pruned_ops.export_onnx(pruned_ops.optimize(plain), tmp_path / "onnx").is_file()
    assert plain.double().dtype == torch.float64 and pruned_ops.restore(plain).train().training


def test_arguments_may_be_given_by_position(tmp_path: Path) -> None:
    batch, fast = padded_batch(), pruned_ops.optimize(stock_model(), dtype="int8")
    by_name: dict[str, Any] = {"state_dict": None}
    for name, arguments, named in (
        ("main", (True,), {}),
        ("no-state", (True, None), {}),
        ("no-push", (True, None, False), {}),
        ("no-state-by-name", (), by_name),
    ):
        fast.save_pretrained(tmp_path / name, *arguments, **named)
        again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / name).eval()
        assert torch.equal(logits(pruned_ops.optimize(again), batch), logits(fast, batch)), name


def test_linears_that_stay_fp32_are_saved_so(tmp_path: Path) -> None:
    batches = [padded_batch((9, 4, 1), seed=seed) for seed in range(2)]
    model = stock_model()
    fast = pruned_ops.optimize(model, dtype="int8", calibration=batches, tolerance=0.06)
    names = fast.bert.packed.encoder.int8_linears
    assert 0 < len(names) < 12
    fast.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(pruned_ops.optimize(again), batches[0]), logits(fast, batches[0]))
    assert again.bert.packed.encoder.int8_linears == names


def test_other_heads_and_the_bare_encoder(tmp_path: Path) -> None:
    batch = padded_batch((9, 4, 1), pad_token_id=1)
    fast = saved(stock("roberta", "sequence"), tmp_path / "labels")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "labels").eval()
    with torch.no_grad():
        assert torch.equal(pruned_ops.optimize(again)(**batch).logits, fast(**batch).logits)
    bare = AutoModel.from_pretrained(tmp_path / "labels", add_pooling_layer=False).eval()
    with torch.no_grad():
        found, expected = (m(**batch).last_hidden_state for m in (pruned_ops.optimize(bare), fast.roberta))
    assert torch.equal(found, expected)
    fast.roberta.save_pretrained(tmp_path / "bare")
    bare = AutoModel.from_pretrained(tmp_path / "bare", add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(pruned_ops.optimize(bare)(**batch).last_hidden_state, expected)


def test_the_state_of_an_int8_model_is_its_own(tmp_path: Path) -> None:
    """Its fp32 weights, as they were: `state_dict` is for them, and `save_pretrained` for what runs."""
    model = stock_model()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = pruned_ops.optimize(model, dtype="int8")
    state = fast.state_dict()
    assert list(state) == list(own) and all(torch.equal(state[name], own[name]) for name in own)
    fast.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_what_is_refused(tmp_path: Path) -> None:
    fast = saved(stock_model(), tmp_path)
    both = torch.nn.ModuleList([fast, pruned_ops.optimize(stock_model(seed=1), dtype="int8")])
    with pytest.raises(ValueError, match="optimised already, in another dtype"):
        pruned_ops.optimize(both)
    with pytest.raises(ValueError, match="stored in int8 already: calibration is for fp32 weights"):
        pruned_ops.optimize(
            AutoModelForQuestionAnswering.from_pretrained(tmp_path), "int8", calibration=[padded_batch((3,))]
        )
    broken = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    attention = broken.bert.encoder.layer[2].attention.self
    attention.query = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="of layer 2's query, key and value some are stored in int8"):
        pruned_ops.optimize(broken)
    with pytest.raises(ValueError, match="a list of names is needed"):
        Int8Config("encoder")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linears"].append("encoder.layer.9.output.dense")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'encoder.layer.9.output.dense' is stored in int8, and BertForQ"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_what_needs_fp32_refuses_int8(tmp_path: Path) -> None:
    saved(stock_model(), tmp_path)
    word_tokenizer(90).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its weights are quantised, and can only be run"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="is stored in int8 already"):
        quantize(str(tmp_path), tmp_path / "again", ["w1"] * 8, 0.1)
    answer = pruned_ops.QuestionAnswerer(str(tmp_path)).answer("w1", "w2 w3 w4")
    assert answer.answer in "w2 w3 w4"


@pytest.mark.parametrize("head", ["", "SequenceClassification"])
def test_linears_without_a_bias_are_stored_too(head: str, tmp_path: Path) -> None:
    """ModernBERT's, stock and pruned: loaded and optimised they say the same bit for bit."""
    for name, model in (
        ("stock", family_models.stock("ModernBert", head)),
        ("pruned", family_models.pruned("pruned_modernbert", head)),
    ):
        inputs = family_models.batch("right")
        fast = saved(model, tmp_path / name)
        expected = family_models.outputs(fast, inputs)
        again = type(pruned_ops.restore(fast)).from_pretrained(tmp_path / name).eval()
        assert any(isinstance(module, Int8Linear) and module.bias is None for module in again.modules())
        padded = family_models.outputs(again, inputs)
        assert family_models.cosine(padded, expected) > 0.99
        found = family_models.outputs(pruned_ops.optimize(again), inputs)
        assert family_models.largest_difference(found, expected) == 0


def test_matrices_that_fp16_holds_exactly_take_half_the_bytes() -> None:
    exact, other, vector = torch.randn(3, 4).half().float(), torch.randn(3, 4), torch.ones(3)
    found = halved({"exact": exact, "other": other, "vector": vector})
    assert [found[name].dtype for name in found] == [torch.float16, torch.float32, torch.float32]
    assert torch.equal(found["exact"].float(), exact)


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    """A masked language model's decoder is its table of tokens."""
    tied = BertForMaskedLM.from_pretrained(text_folder(tmp_path / "fp32", "SparseEncoder"))
    word_tokenizer(400).save_pretrained(tmp_path / "fp32")
    quantize(str(tmp_path / "fp32"), tmp_path / "int8", sentences([5, 20, 60] * 8), 0.5)
    shape = tuple(tied.get_input_embeddings().weight.shape)
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert [tensor.dtype for tensor in stored.values() if tuple(tensor.shape) == shape] == [torch.float16]
    again = BertForMaskedLM.from_pretrained(tmp_path / "int8")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_quantize_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_folder(tmp_path / "fp32", "CrossEncoder", hidden_size=64, intermediate_size=256)
    texts = tmp_path / "texts.txt"
    pairs = zip(sentences([3, 7] * 12), sentences([20, 40] * 12, seed=1), strict=True)
    texts.write_text("\n".join("\t".join(pair) for pair in pairs))
    out = tmp_path / "int8"
    command = ["quantize", str(tmp_path / "fp32"), str(out), "--texts", str(texts), "--tolerance", "0.2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "on 12 texts that nothing was chosen by" in shown and "of 12 linear layers are int8" in shown
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "int8")]
    assert sizes[1] < 0.5 * sizes[0]
    told = json.loads((out / "config.json").read_text())["quantization_config"]["measured"]
    assert told["texts"] == 12 and 0 < told["error"] <= 0.2 and told["megabytes"] == sizes[1] / 1e6
    pruned_ops.optimize(AutoModelForSequenceClassification.from_pretrained(out))
    assert main(command) == 2 and "is there already" in capsys.readouterr().err


def test_that_int8_is_slow_here_is_said_whenever_a_model_begins_to_run_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by `quantize`, once, and for a model that was loaded from int8 weights."""
    monkeypatch.setattr("pruned_ops.runtime.optimize.slow_int8", lambda: "it has no VNNI")
    message = "^int8 will not be faster than float32 here: it has no VNNI$"
    text_folder(tmp_path / "fp32", "CrossEncoder", hidden_size=64, intermediate_size=256)
    with pytest.warns(RuntimeWarning, match=message) as warned:
        quantize(str(tmp_path / "fp32"), tmp_path / "int8", sentences([5, 20, 60] * 8), 0.5)
    assert [entry.filename for entry in warned if issubclass(entry.category, RuntimeWarning)] == [__file__]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    with pytest.warns(RuntimeWarning, match=message) as warned:
        pruned_ops.optimize(again)
    assert warned[0].filename == __file__


def test_texts_and_pairs_to_quantize_by(tmp_path: Path) -> None:
    """Lines, and JSON lines as other commands read them; a label is not the second of a pair."""
    lines, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    lines.write_bytes("a\u2028b\r\n\n \t \nc\td\ne\t\n".encode())
    assert read_texts(lines, 9) == ["a\u2028b", ("c", "d"), ("e", "")]
    rows.write_text("".join(json.dumps({"q": f"q{i}", "n": i, "p": f"p{i}"}) + "\n" for i in range(3)))
    assert read_texts(rows, 9, ["p"]) == ["p0", "p1", "p2"]
    assert read_texts(rows, 9, ["q", "p"]) == [("q0", "p0"), ("q1", "p1"), ("q2", "p2")]
    with pytest.raises(ValueError, match=r"line 1 of .*rows.jsonl has 2 strings: name --text-columns"):
        read_texts(rows, 9)
    lines.write_text("".join(f"{number}\n" for number in range(19)))
    assert read_texts(lines, 10) == ["0", "2", "4", "6", "8", "10", "12", "14", "16", "18"]  # to the end
    assert read_texts(lines, 19) == read_texts(lines, 99) == [str(number) for number in range(19)]
    lines.write_text("a\nb\tc\td")
    with pytest.raises(ValueError, match=r"line 2 of .*texts.txt has 3 texts; a text, or two, are needed"):
        read_texts(lines, 9)


def test_the_texts_of_a_pair_keep_their_places(tmp_path: Path) -> None:
    """A blank first text is no reason to take the second for the first, nor a label for the only text."""
    rows, blank = tmp_path / "rows.jsonl", [("", "x"), ("x", " "), ("", ""), ("a", "b")]
    rows.write_text("".join(json.dumps({"p": p, "q": q}) + "\n" for p, q in blank))
    assert read_texts(rows, 9, ["p", "q"]) == [("", "x"), ("x", " "), ("a", "b")]
    assert read_texts(rows, 9, ["p"]) == ["x", "a"]
    with pytest.raises(ValueError, match=r"line 1 of .* has 2 strings: name --text-columns"):
        read_texts(rows, 9)
    for value in (5, None, ["one", "two"], {"text": "x"}):
        rows.write_text(json.dumps({"p": value, "q": "x"}))
        for columns in (["p"], ["q", "p"]):
            with pytest.raises(
                ValueError, match=r"rows.jsonl, line 1: column 'p' holds .*; a text is needed"
            ):
                read_texts(rows, 9, columns)


def test_quantize_refuses_what_changes_too_much(tmp_path: Path) -> None:
    model = pruned_model()
    model.save_pretrained(tmp_path / "fp32")
    word_tokenizer(96).save_pretrained(tmp_path / "fp32")
    texts = [" ".join(f"w{i % 96}" for i in range(length)) for length in range(1, 21)]
    with pytest.raises(GateNotMet, match="on 10 texts int8 changes the outputs by .* nothing was written"):
        quantize(str(tmp_path / "fp32"), tmp_path / "out", texts, 1e-6)
    assert not (tmp_path / "out").exists()
    for wrong, message in (((texts[:7], 0.1), "there are 7 texts"), ((texts, 0.0), "tolerance is 0.0")):
        with pytest.raises(ValueError, match=message):
            quantize(str(tmp_path / "fp32"), tmp_path / "out", *wrong)


def test_quantize_takes_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    st.SentenceTransformer(text_folder(tmp_path / "bare"), device="cpu").save_pretrained(
        str(tmp_path / "fp32")
    )
    texts = sentences([5, 20, 60] * 8)
    report = quantize(str(tmp_path / "fp32"), tmp_path / "int8", texts, 0.2)
    assert report.texts == 12 and report.linears == report.of_linears == 12
    plain, fast = (st.SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("fp32", "int8"))
    found, expected = pruned_ops.optimize(fast).encode(texts), plain.encode(texts)
    assert ((found - expected) ** 2).sum() <= 0.2**2 * (expected**2).sum()


def test_quantize_refuses_what_it_would_load_as_another_model(tmp_path: Path) -> None:
    """sentence-transformers would give a model of another class a mean pooling, and save it so."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = Path(text_folder(tmp_path / "many vectors"))
    (folder / "modules.json").write_text("[]")
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "MultiVectorEncoder"}')
    with pytest.raises(ValueError, match="says that it is a 'MultiVectorEncoder'; known are"):
        quantizing.load(str(folder))


def test_an_embedder_on_the_hub_keeps_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded as sentence-transformers loads it; a bare encoder would have another pooling."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.SentenceTransformer(text_folder(tmp_path / "bare"), device="cpu")
    model.save_pretrained(str(tmp_path / "on the hub"))

    def on_the_hub(name: str, file: str, **_: Any) -> str | None:
        path = tmp_path / "on the hub" / file
        return str(path) if name == "publisher/embedder" and path.is_file() else None

    monkeypatch.setattr(loading, "cached_file", on_the_hub)
    monkeypatch.setattr(st, "SentenceTransformer", lambda name, device: model if "/" in name else None)
    assert quantizing.load("publisher/embedder") == (model, None)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("weights", "cannot be loaded: "),
        ("config", "it is a 'gpt2' model"),
        (
            "shapes",
            "its tensors have other shapes than its config says: bert.embeddings.word_embeddings.weight",
        ),
        ("head", "it is 'BertForMultipleChoice'; known are"),
        ("tokenizer", "holds no tokenizer"),
        ("limit", "--limit is 0: at least 1"),
    ],
)
def test_what_quantize_cannot_read_is_one_line(
    fault: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a library says of a broken file; and a head that would be lost is no bare encoder."""
    folder = tmp_path / "model"
    stock("bert", "sequence").save_pretrained(folder)
    word_tokenizer(90).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "config": {"model_type": "gpt2"}, "shapes": {"vocab_size": 120},
        "head": {"architectures": ["BertForMultipleChoice"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **changes.get(fault, {})}))
    if fault == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-99])
    if fault == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    (tmp_path / "texts.txt").write_text("\n".join(["w1 w2"] * 9))
    more = ["--limit", "0"] if fault == "limit" else []
    out = tmp_path / "out"
    assert main(["quantize", str(folder), str(out), "--texts", str(tmp_path / "texts.txt"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()
