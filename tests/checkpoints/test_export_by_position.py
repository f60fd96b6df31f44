"""ONNX of what ModernBERT alone has: windows, rotary positions, gated FFNs, LayerNorms that come first, and a
head before the last linear."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import pruned_ops
from family_models import ANSWERS, TEXTS, TOKENS, batch, pruned, stock
from pruned_ops.cli import main
from pruned_ops.models.natural_questions import with_answer_types
from tiny_tokenizers import byte_tokenizer

onnx = pytest.importorskip("onnx", reason='needs the extra "onnx"')
ort = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')

CLOSE = 3e-5
NAMES = ("last_hidden_state", "logits", "start_logits", "end_logits", "answer_type_logits")
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], dict[str, Tensor]]
# Texts that are longer and shorter than the window, one place padded on each side, and a batch of one.
BATCHES = [batch(kind, (70, 1, 33, 64)) for kind in ("right", "left", "holes")] + [batch("right", (11,))]


def ort_run(path: Path) -> Run:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def openvino_run(path: Path) -> Run:
    openvino = pytest.importorskip("openvino", reason='needs the extra "bench"')
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        # One port may have a second name, that of the node before.
        ports = {name: port for port in compiled.outputs for name in port.get_names() if name in NAMES}
        return {name: torch.from_numpy(found[port].copy()) for name, port in ports.items()}

    return run


def check(run: Run, model: Any, some: list[Inputs]) -> None:
    """All outputs, those of tokens at the real places alone, within fp32 rounding."""
    for inputs in some:
        real, found = inputs["attention_mask"].bool(), run(inputs)
        with torch.no_grad():
            expected = {name: value for name, value in model(**inputs).items() if value is not None}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            of_tokens = value.shape[:2] == real.shape
            ours, theirs = (one[real] if of_tokens else one for one in (found[name], value))
            torch.testing.assert_close(ours, theirs, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("runtime", [ort_run, openvino_run])
@pytest.mark.parametrize("window", [2, 8, 30, 128])
def test_windows_of_all_sizes(window: int, runtime: Callable[[Path], Run], tmp_path: Path) -> None:
    """Of five layers two are global."""
    model = stock("ModernBert", "", num_hidden_layers=5, local_attention=window)
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    onnx.checker.check_model(path, full_check=True)
    check(runtime(path), model, BATCHES)


def test_a_window_and_its_place_are_seen(tmp_path: Path) -> None:
    """The cases above would find a graph without windows, without rotary positions, or with one base for
    both kinds of layers."""
    fields = {"num_hidden_layers": 5, "local_attention": 8}
    model = stock("ModernBert", "", **fields, global_rope_theta=160000.0, local_rope_theta=10000.0)
    run = ort_run(pruned_ops.export_onnx(model, tmp_path / "out"))
    check(run, model, BATCHES)
    for other in ({"local_attention": 10}, {"global_rope_theta": 10000.0}, {"local_rope_theta": 160000.0}):
        bases = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
        wrong = stock("ModernBert", "", **fields | bases | other)
        wrong.load_state_dict(model.state_dict())
        with pytest.raises(AssertionError):
            check(run, wrong, BATCHES)


@pytest.mark.parametrize("runtime", [ort_run, openvino_run])
@pytest.mark.parametrize("head", [ANSWERS, TEXTS, TOKENS])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_every_head(is_pruned: bool, head: str, runtime: Callable[[Path], Run], tmp_path: Path) -> None:
    """Of texts also the head that reads the mean. Pruned layers have 0 heads and a width of 0 among them."""
    for number, pooling in enumerate(["cls", "mean"] if head == TEXTS else ["cls"]):
        more = {"classifier_pooling": pooling, "classifier_bias": True}
        model = pruned("pruned_modernbert", head, **more) if is_pruned else stock("ModernBert", head, **more)
        path = pruned_ops.export_onnx(model, tmp_path / str(number))
        # A stock model reads the first place, where padding on the left would be.
        reads_padding = head == TEXTS and pooling == "cls" and not is_pruned
        check(runtime(path), model, [BATCHES[0], *BATCHES[2:]] if reads_padding else BATCHES)


def test_a_row_of_padding_only_has_the_label_of_no_tokens(tmp_path: Path) -> None:
    for pooling in ("cls", "mean"):
        model = pruned("pruned_modernbert", TEXTS, classifier_pooling=pooling)
        inputs = batch("right")
        inputs["attention_mask"][1] = 0
        check(ort_run(pruned_ops.export_onnx(model, tmp_path / pooling)), model, [inputs])


def test_answer_types(tmp_path: Path) -> None:
    model = with_answer_types(pruned("pruned_modernbert", ANSWERS)).eval()
    check(ort_run(pruned_ops.export_onnx(model, tmp_path / "out")), model, BATCHES)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_with_and_without_biases(is_pruned: bool, biases: bool, tmp_path: Path) -> None:
    """Where layers of no heads and of no units leave nothing, or the biases of their outputs."""
    more = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), biases)
    make = pruned if is_pruned else stock
    model = make("pruned_modernbert" if is_pruned else "ModernBert", ANSWERS, **more)
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    check(ort_run(path), model, BATCHES)
    made = {name for node in onnx.load(path).graph.node for name in node.output}
    used = {name for node in onnx.load(path).graph.node for name in node.input}
    assert made - used == {"start_logits", "end_logits"}


@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_other_activations(activation: str, tmp_path: Path) -> None:
    more = {"hidden_activation": activation, "classifier_activation": activation}
    model = stock("ModernBert", ANSWERS, **more)
    check(ort_run(pruned_ops.export_onnx(model, tmp_path / "out")), model, BATCHES[:1])


@pytest.mark.parametrize("make", [stock, pruned])
def test_the_transformer_optimizer_takes_it(make: Any, tmp_path: Path) -> None:
    """It fuses LayerNorms with the sums before them, and leaves attention as it is."""
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    model = make("ModernBert" if make is stock else "pruned_modernbert", ANSWERS)
    logging.disable(logging.WARNING)
    try:
        path = pruned_ops.export_onnx(model, tmp_path / "out")
        fused = optimizer.optimize_model(str(path), model_type="bert", opt_level=0)
    finally:
        logging.disable(logging.NOTSET)
    fused.save_model_to_file(str(tmp_path / "fused.onnx"))
    kinds = {node.op_type for node in fused.model.graph.node}
    assert "SkipLayerNormalization" in kinds and "Softmax" in kinds
    check(ort_run(tmp_path / "fused.onnx"), model, BATCHES)


def test_what_comes_before_the_last_linear_is_plain_or_refused(tmp_path: Path) -> None:
    model = stock("ModernBert", ANSWERS)
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="before its last linear is not what its class makes"):
        pruned_ops.export_onnx(model, tmp_path / "out")
    odd = stock("ModernBert", ANSWERS, classifier_activation="sigmoid")
    with pytest.raises(ValueError, match="activation 'sigmoid' cannot be exported: gelu, "):
        pruned_ops.export_onnx(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_by_the_command(tmp_path: Path) -> None:
    """Pruned; what is optimised gives the same file, in int8, too."""
    folder, out = tmp_path / "in", tmp_path / "out"
    model = pruned("pruned_modernbert", ANSWERS, vocab_size=300)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert main(["export", str(folder), "--onnx", str(out)]) == 0
    inputs = dict(AutoTokenizer.from_pretrained(out)(["a", "bcd" * 9], padding=True, return_tensors="pt"))
    check(ort_run(out / "model.onnx"), model, [{name: inputs[name] for name in BATCHES[0]}])
    for dtype in (None, "int8"):
        fast = pruned_ops.optimize(model, dtype=dtype)
        again = pruned_ops.export_onnx(fast, tmp_path / str(dtype))
        assert again.read_bytes() == (out / "model.onnx").read_bytes()
        pruned_ops.restore(fast)
