"""ONNX out: the graph is fused by ONNX Runtime, and gives the model's logits there and in OpenVINO."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

import pruned_ops
from head_models import MODELS as HEAD_MODELS
from head_models import natural_questions, pruned, stock
from inputs import logits, padded_batch, pruned_model, shake, stock_model
from matching import save_checkpoint
from pruned_ops.cli import main
from pruned_ops.models.encoder import PrunedBertModel
from pruned_ops.models.natural_questions import with_answer_types
from pruned_ops.models.stock import model_shape
from pruned_ops.runtime.packed_encoder import OptimisedEncoder
from tiny_tokenizers import byte_tokenizer

onnx = pytest.importorskip("onnx", reason='needs the extra "onnx"')
ort = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')

Batch = dict[str, Tensor]
Run = Callable[[Batch], dict[str, Tensor]]


def batches(model: Any) -> list[Batch]:
    """Several sizes and lengths, padded right, left and with holes; token types where the model has them."""
    pad = model.config.pad_token_id
    made = [padded_batch((20, 3, 11, 1), pad), padded_batch((9,), pad), padded_batch((40, 77), pad, seed=1)]
    left = {name: tensor.flip(1) for name, tensor in made[0].items()}
    holes = {**padded_batch((20, 20), pad), "attention_mask": (torch.arange(40) % 7 != 3).long().view(2, 20)}
    made += [left, holes]
    if model.config.type_vocab_size > 1:
        for batch in made:
            batch["token_type_ids"] = (torch.arange(batch["input_ids"].size(1)) > 4).long().expand_as(
                batch["input_ids"]
            ).contiguous()  # fmt: skip
    return made


def ort_run(path: Path | str) -> Run:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]

    def run(batch: Batch) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        return {name: torch.from_numpy(one) for name, one in zip(names, found, strict=True)}

    return run


def openvino_run(path: Path) -> Run:
    openvino = pytest.importorskip("openvino", reason='needs the extra "bench"')
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(batch: Batch) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in batch.items()})
        ports = {name: port for port in compiled.outputs for name in port.get_names()}
        return {name: torch.from_numpy(found[port].copy()) for name, port in ports.items()}

    return run


def check_logits(run: Run, model: Any, some: list[Batch]) -> None:
    """Start and end logits at the real positions, within fp32 rounding."""
    for batch in some:
        found, real = run(batch), batch["attention_mask"].bool()
        ours = torch.stack([found["start_logits"], found["end_logits"]], -1)
        torch.testing.assert_close(ours[real], logits(model, batch)[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("runtime", [ort_run, openvino_run])
def test_logits_are_the_models(model: Any, runtime: Callable[[Path], Run], tmp_path: Path) -> None:
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    onnx.checker.check_model(path, full_check=True)
    check_logits(runtime(path), model, batches(model))


@pytest.mark.parametrize("runtime", [ort_run, openvino_run])
def test_answer_types(runtime: Callable[[Path], Run], tmp_path: Path) -> None:
    """From the first real token, wherever it is; of a row of padding only from a zero hidden state."""
    model = with_answer_types(pruned_model()).eval()
    run = runtime(pruned_ops.export_onnx(model, tmp_path / "out"))
    some = batches(model)
    check_logits(run, model, some)
    some[0]["attention_mask"][1] = 0
    for batch in some:
        with torch.no_grad():
            expected = model(**batch).answer_type_logits
        found = run(batch)["answer_type_logits"]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def check_outputs(run: Run, model: Any, some: list[Batch]) -> None:
    """All outputs, those of tokens at the real positions alone, within fp32 rounding."""
    for batch in some:
        found, real = run(batch), batch["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            of_tokens = (
                value.shape[:2] == real.shape and "pooler" not in name and name != "answer_type_logits"
            )
            ours, theirs = (one[real] if of_tokens else one for one in (found[name], value))
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


BARE: dict[str, Callable[[], Any]] = {
    "stock-bert-pooled": lambda: stock("bert", "sequence").bert,
    "stock-roberta-bare": lambda: stock_model("roberta").roberta,
    "pruned-bert-pooled": lambda: pruned("bert", "sequence").bert,
    "pruned-roberta-bare": lambda: pruned("roberta", "token").roberta,
}


@pytest.mark.parametrize("kind", [*(name for name in HEAD_MODELS if "answer" not in name), *BARE])
def test_every_head(kind: str, tmp_path: Path) -> None:
    model = (HEAD_MODELS | BARE)[kind]()
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    onnx.checker.check_model(path, full_check=True)
    check_outputs(ort_run(path), model, batches(model))


def test_every_head_in_openvino(tmp_path: Path) -> None:
    for number, model in enumerate(
        (stock("bert", "sequence"), pruned("roberta", "sequence"), BARE["stock-bert-pooled"]())
    ):
        path = pruned_ops.export_onnx(model, tmp_path / str(number))
        check_outputs(openvino_run(path), model, batches(model)[:4])


@pytest.mark.parametrize(
    "make", [lambda: stock("bert", "sequence"), BARE["pruned-bert-pooled"], natural_questions]
)
def test_a_checkpoint_is_exported_under_its_head(make: Callable[[], Any], tmp_path: Path) -> None:
    """Optimised, too."""
    model = make()
    save_checkpoint(model, tmp_path / "in")
    expected = pruned_ops.export_onnx(model, tmp_path / "model").read_bytes()
    assert main(["export", str(tmp_path / "in"), "--onnx", str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "model.onnx").read_bytes() == expected
    fast = pruned_ops.optimize(model)
    assert pruned_ops.export_onnx(fast, tmp_path / "optimised").read_bytes() == expected


def test_a_pooler_is_exported_where_the_checkpoint_has_one(tmp_path: Path) -> None:
    """transformers would make a random one."""
    model = stock_model().bert
    assert model.pooler is None
    save_checkpoint(model, tmp_path / "in")
    path = pruned_ops.export_onnx(tmp_path / "in", tmp_path / "out")
    assert [one.name for one in ort.InferenceSession(str(path)).get_outputs()] == ["last_hidden_state"]


def test_token_types_are_asked_for_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    """As they are of multilingual BERTs with a tokenizer of XLM-R's kind: the model has two types, the
    tokenizer gives none, and all are 0."""
    model = shake(stock_model(vocab_size=300), 1)
    model.save_pretrained(tmp_path / "in")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "in")
    batch = dict(tokenizer("a", "bc", return_tensors="pt"))
    run = ort_run(pruned_ops.export_onnx(tmp_path / "in", tmp_path / "out"))
    check_logits(run, model, [batch])
    asked = pruned_ops.export_onnx(tmp_path / "in", tmp_path / "asked", token_types=True)
    names = [one.name for one in ort.InferenceSession(str(asked)).get_inputs()]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    with pytest.raises(ValueError, match="has no token types, and token_types asks for them"):
        pruned_ops.export_onnx(stock_model("roberta"), tmp_path / "none", token_types=True)


def fused_offline(path: Path, folder: Path) -> Any:
    """What ONNX Runtime's transformer optimizer makes of it, written to folder/fused.onnx."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    logging.disable(logging.WARNING)  # it warns of every layer whose sizes differ from the first one's
    try:
        fused = optimizer.optimize_model(str(path), model_type="bert", opt_level=0)
    finally:
        logging.disable(logging.NOTSET)
    fused.save_model_to_file(str(folder / "fused.onnx"))
    return fused.model.graph.node


def kinds(nodes: Any) -> Counter[str]:
    return Counter(node.op_type for node in nodes)


def left_in(model: Any) -> tuple[list[int], int]:
    """The head counts of the layers that have heads; how many layers have an FFN."""
    layers = model_shape(model).layers
    return [one.num_heads for one in layers if one.num_heads], sum(one.ffn_width > 0 for one in layers)


def test_the_transformer_optimizer_fuses_every_layer(model: Any, tmp_path: Path) -> None:
    """An Attention with its own head count for each layer with heads, a BiasGelu for each FFN, and a
    SkipLayerNormalization after each of both; and they compute the same. It takes padding for right-sided."""
    nodes = fused_offline(pruned_ops.export_onnx(model, tmp_path / "out"), tmp_path)
    heads, ffns = left_in(model)
    found = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "num_heads"]
    assert found == heads
    counts = kinds(nodes)
    assert counts["Attention"] == len(heads) and counts["BiasGelu"] == ffns
    assert counts["SkipLayerNormalization"] == len(heads) + ffns
    assert not {"Softmax", "Erf", "Reshape", "Transpose"} & set(counts)
    check_logits(ort_run(tmp_path / "fused.onnx"), model, batches(model)[:3])


def test_a_plain_session_fuses_what_surrounds_attention(model: Any, tmp_path: Path) -> None:
    """The embeddings' sum and norm too."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    counts = kinds(onnx.load(tmp_path / "session.onnx").graph.node)
    heads, ffns = left_in(model)
    assert counts["BiasGelu"] == ffns and counts["SkipLayerNormalization"] == len(heads) + ffns + 1


@pytest.mark.parametrize(("activation", "fused"), [("gelu_new", "FastGelu"), ("relu", "Relu"), ("silu", "")])
def test_other_activations(activation: str, fused: str, tmp_path: Path) -> None:
    model = stock_model(hidden_act=activation)
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    check_logits(ort_run(path), model, batches(model))
    assert not fused or kinds(fused_offline(path, tmp_path))[fused] == 3


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_an_optimised_model_is_exported_from_its_original(model: Any, dtype: Any, tmp_path: Path) -> None:
    """The same file, bit for bit; the model stays optimised and computes what it did."""
    expected = pruned_ops.export_onnx(model, tmp_path / "original").read_bytes()
    try:
        fast = pruned_ops.optimize(model, dtype=dtype)
    except ValueError as reason:
        pytest.skip(str(reason))
    before = logits(fast, batches(model)[0])
    assert pruned_ops.export_onnx(fast, tmp_path / "optimised").read_bytes() == expected
    assert isinstance(fast.base_model, OptimisedEncoder)
    assert torch.equal(logits(fast, batches(model)[0]), before)
    pruned_ops.restore(fast)
    assert pruned_ops.export_onnx(fast, tmp_path / "restored").read_bytes() == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pruned_model()
    model.config.null_score_threshold = 1.5
    return save_checkpoint(model, tmp_path_factory.mktemp("export") / "model")


def test_the_command_writes_a_folder_that_is_usable(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), "--onnx", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"written to {out / 'model.onnx'}" in said and "tokenizer.json" in said
    config, tokenizer = AutoConfig.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert config.null_score_threshold == 1.5 and config.architectures == ["PrunedBertForQuestionAnswering"]
    model = pruned_ops.PrunedBertForQuestionAnswering.from_pretrained(checkpoint).eval()
    batch = tokenizer(["w1", "w2"], ["w3 w4 w5", "w6"], padding="longest", return_tensors="pt")
    check_logits(ort_run(out / "model.onnx"), model, [dict(batch)])
    (out / "mine.txt").write_text("stays")
    before = (out / "model.onnx").read_bytes()
    assert main(["export", str(checkpoint), "--onnx", str(out)]) == 2
    assert f"{out} is not empty; --overwrite" in capsys.readouterr().err
    (out / "model.onnx").write_bytes(b"")
    assert main(["export", str(checkpoint), "--onnx", str(out), "--overwrite"]) == 0
    assert (out / "model.onnx").read_bytes() == before and (out / "mine.txt").read_text() == "stays"
    # What is exported is no checkpoint; and beside a checkpoint it leaves that one as it is.
    assert main(["export", str(out), "--onnx", str(out), "--overwrite"]) == 2
    assert (out / "model.onnx").read_bytes() == before
    assert (out / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert main(["export", str(checkpoint), "--onnx", str(checkpoint), "--overwrite"]) == 0
    assert pruned_ops.PrunedBertForQuestionAnswering.from_pretrained(checkpoint)


def test_another_export_leaves_nothing_of_the_earlier_tokenizer(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither does an export go into the folder of another checkpoint, whose config it would replace."""
    out, earlier = tmp_path / "out", ("vocab.txt", "added_tokens.json", "mine.txt")
    pruned_ops.export_onnx(checkpoint, out)
    for name in earlier:
        (out / name).write_text("{}")
    pruned_ops.export_onnx(stock_model(), out, overwrite=True)  # a model has no tokenizer of its own
    assert all((out / name).is_file() for name in earlier)
    pruned_ops.export_onnx(checkpoint, out, overwrite=True)
    assert [(out / name).exists() for name in earlier] == [False, False, True]
    other = save_checkpoint(stock_model(), tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    assert main(["export", str(checkpoint), "--onnx", str(other), "--overwrite"]) == 2
    assert "holds another checkpoint's weights" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    path = pruned_ops.export_onnx(stock_model(), tmp_path / "link")
    assert path == tmp_path / "link" / "model.onnx" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "model.onnx").is_file()


def test_bad_input_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, broken = tmp_path / "file", tmp_path / "broken"
    file.write_text("")
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    for folder, out, message in (
        (tmp_path, "out", "holds no config.json"),
        (tmp_path / "none", "out", "holds no config.json"),
        (broken, "out", f"{broken} cannot be loaded"),
        (checkpoint, "file", "is a file; a folder is needed"),
        (checkpoint, "out.onnx", "names a file; a folder is needed, model.onnx is written into it"),
        (checkpoint, "none/out", "is no folder; out is made in it"),
        (checkpoint, "file/out", "is no folder; out is made in it"),
        (checkpoint, "x" * 300, "name too long"),
    ):
        before = sorted(tmp_path.iterdir())
        assert main(["export", str(folder), "--onnx", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert sorted(tmp_path.iterdir()) == before


def with_hook(model: Any) -> Any:
    model.base_model.encoder.register_forward_hook(lambda *_: None)
    return model


def with_head(model: Any) -> Any:
    model.qa_outputs = nn.Sequential(model.qa_outputs)
    return model


def with_hook_on_head(model: Any) -> Any:
    model.classifier.dropout.register_forward_hook(lambda *_: None)
    return model


def with_classifier(model: Any) -> Any:
    model.classifier = nn.Linear(64, 3)
    return model


def with_pooler(model: PrunedBertModel) -> Any:
    assert model.pooler is not None
    model.pooler.dense = nn.Sequential(model.pooler.dense)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertForMaskedLM(stock_model().config), "a BertForMaskedLM cannot be exported: models for"),
        (lambda: nn.Linear(2, 2), "a Linear cannot be exported"),
        (
            lambda: with_classifier(stock("roberta", "sequence")),
            "its head is another one than its class makes",
        ),
        (lambda: with_pooler(pruned("bert", "sequence").bert), "its pooler.dense is a Sequential"),
        (lambda: stock_model().half(), r"it holds torch.float16: call model.float\(\) first"),
        (lambda: with_hook(stock_model()), "has forward hooks"),
        (lambda: with_hook_on_head(stock("roberta", "sequence")), "its head has hooks, or another forward"),
        (lambda: with_head(stock_model()), "its qa_outputs is a Sequential"),
        (lambda: stock_model(hidden_act="tanh"), "hidden_act is 'tanh'"),
    ],
)
def test_models_that_would_compute_something_else_are_refused(
    make: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pruned_ops.export_onnx(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_command_says_what_to_install(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "pruned_ops.checkpoints.onnx_graph", raising=False)
    assert main(["export", str(checkpoint), "--onnx", str(tmp_path / "out")]) == 2
    assert "pip install onnx" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    for out, above in ((tmp_path / "new", tmp_path), (tmp_path / "empty", tmp_path / "empty")):
        with pytest.raises(PermissionError, match=f"nothing may be written into {above}$"):
            pruned_ops.export_onnx(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
