"""optimize(model, dtype="bfloat16"): what runs, what is kept and saved, what is refused, and the commands."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering

import pruned_ops
from bf16_cases import in_bf16
from inputs import READY, encoder_arguments, logits, padded_batch, pruned_model, stock_model
from matching import save_checkpoint, squad_file
from pruned_ops.cli import main
from pruned_ops.measure.comparison import compare
from pruned_ops.measure.timing import Workload
from pruned_ops.ops.backends import cpu
from pruned_ops.ops.registry import OPS, BackendError, record, use_backend
from pruned_ops.runtime.refusals import refuse_encoder
from pruned_ops.serving.models import Loading

REFUSED = refuse_encoder(stock_model().bert, bfloat16=True)
needs_bf16 = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@needs_bf16
def test_optimize_runs_every_linear_in_bfloat16(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)[real]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = pruned_ops.optimize(model, dtype="bfloat16")
    encoder = fast.base_model.packed.encoder
    assert encoder.runs_in_bfloat16 and not encoder.int8_linears
    assert {w.dtype for w in encoder.laid_out.weights if w.dim() == 3} == {torch.bfloat16}
    with record() as ran:
        found = logits(fast, batch)[real]
    assert ran["encoder"] == {"cpu": 1}
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9995
    assert not torch.equal(found, expected)
    state = fast.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    restored = pruned_ops.restore(fast).state_dict()
    assert all(torch.equal(restored[name], value) for name, value in before.items())
    assert torch.equal(logits(model, batch)[real], expected)


def own_bytes(model: Any) -> int:
    """The memory of the weights of a model's linears and of their layout; released ones have next to none."""
    encoder = model.base_model.packed.encoder
    tensors = [linear.weight for part in encoder.parts for linear in part.linears]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages |= {
        w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
        for w in encoder.laid_out.weights
        if w.dim() == 3
    }
    return sum(storages.values())


@needs_bf16
def test_the_rounded_weights_take_half_the_memory_where_that_is_asked_for() -> None:
    batch = padded_batch()
    plain = pruned_ops.optimize(stock_model())
    kept = pruned_ops.optimize(stock_model(), dtype="bfloat16")
    rounded = pruned_ops.optimize(stock_model(), dtype="bfloat16", keep_fp32=False)
    assert own_bytes(rounded) < 0.55 * own_bytes(plain) < own_bytes(kept)
    assert torch.equal(logits(rounded, batch), logits(kept, batch))
    state, own = rounded.state_dict(), stock_model().state_dict()
    for name, value in own.items():
        is_linear = ".layer." in name and "LayerNorm" not in name and name.endswith("weight")
        assert torch.equal(state[name], value.bfloat16().float() if is_linear else value), name
    again = pruned_ops.restore(rounded)
    assert torch.equal(
        again.bert.encoder.layer[0].output.dense.weight, state["bert.encoder.layer.0.output.dense.weight"]
    )
    # Nothing is lost of these weights, so they are not kept twice.
    assert own_bytes(pruned_ops.optimize(again, dtype="bfloat16")) < 0.55 * own_bytes(plain)


@needs_bf16
def test_save_pretrained_writes_the_fp32_weights(tmp_path: Path) -> None:
    model = stock_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    pruned_ops.optimize(model, dtype="bfloat16").save_pretrained(tmp_path)
    state = AutoModelForQuestionAnswering.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@needs_bf16
def test_copies_hidden_states_and_stacks_without_heads() -> None:
    batch = padded_batch()
    fast = pruned_ops.optimize(pruned_model(), dtype="bfloat16")
    found = logits(fast, batch)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(logits(other, batch), found)
    with torch.no_grad():
        hidden = fast(**batch, output_hidden_states=True)
    assert len(hidden.hidden_states) == 6
    torch.testing.assert_close(torch.stack([hidden.start_logits, hidden.end_logits], -1), found)


@needs_bf16
def test_refusals() -> None:
    with pytest.raises(ValueError, match="calibration is for dtype='int8'"):
        pruned_ops.optimize(stock_model(), dtype="bfloat16", calibration=[padded_batch()])
    with pytest.raises(ValueError, match="bfloat16 takes a float32 model.*float16"):
        pruned_ops.optimize(stock_model().half(), dtype="bfloat16")
    with pytest.raises(ValueError, match="with relu"):
        pruned_ops.optimize(stock_model(hidden_act="relu"), dtype="bfloat16")
    fast = pruned_ops.optimize(stock_model(), dtype="bfloat16")
    assert pruned_ops.optimize(fast, dtype="bfloat16") is fast
    with pytest.raises(ValueError, match="optimised already, and keep_fp32=False would have no effect"):
        pruned_ops.optimize(fast, dtype="bfloat16", keep_fp32=False)
    inner = stock_model()
    pruned_ops.optimize(inner.bert, dtype="bfloat16")
    with pytest.raises(ValueError, match="optimised already, and keep_fp32=False would have no effect"):
        pruned_ops.optimize(inner, dtype="bfloat16", keep_fp32=False)
    rounded = pruned_ops.optimize(stock_model(), dtype="bfloat16", keep_fp32=False)
    for keep in (False, True):  # serving asks for the first, and what it is built of for the second
        assert pruned_ops.optimize(rounded, dtype="bfloat16", keep_fp32=keep) is rounded
    for other in (None, "int8"):
        with pytest.raises(ValueError, match="optimised already, in another dtype"):
            pruned_ops.optimize(fast, dtype=other)
    with pytest.raises(RuntimeError, match=r"runs in bfloat16.*call pruned_ops.restore\(model\) before"):
        fast.to(torch.bfloat16)
    expected = logits(fast, padded_batch())
    assert torch.equal(logits(fast.to("cpu"), padded_batch()), expected)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match='dtype is .float16.; None, "bfloat16" or "int8" is needed'):
        pruned_ops.optimize(stock_model(), dtype="float16")
    with pytest.raises(ValueError, match="keep_fp32=False is for dtype='bfloat16'"):
        pruned_ops.optimize(stock_model(), dtype="int8", keep_fp32=False)
    with pytest.raises(ValueError, match="tolerance is for calibration"):
        pruned_ops.optimize(stock_model(), dtype="int8", tolerance=0.01)


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_a_processor_without_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "bf16_capability", lambda: None)
    model = stock_model()
    with pytest.raises(ValueError, match="a processor with AVX512_BF16 or AMX, and this one has none"):
        pruned_ops.optimize(model, dtype="bfloat16")
    assert type(model.bert).__name__ == "BertModel" and not hasattr(model.bert, "packed")
    with use_backend("cpu"), pytest.raises(BackendError, match="AVX512_BF16"):
        OPS["encoder"](*in_bf16(encoder_arguments(9, 32, 48, seed=0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(pruned_model(), tmp_path_factory.mktemp("bfloat16") / "model")


@needs_bf16
def test_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = squad_file(tmp_path / "squad.json", 10, 1)
    argv = ["check", str(folder), "--device", "cpu", "--dtype", "bfloat16", "--questions", str(questions)]
    argv += ["--backends", "reference"]
    assert main(argv) == 0
    screen = capsys.readouterr().out
    assert "passed: every error but that of bfloat16 is at most" in screen
    assert "passed: bfloat16 is off by 0.0" in screen
    assert main([*argv, "--tolerance", "1e-6"]) == 1
    screen = capsys.readouterr().out
    assert "FAILED: bfloat16 is off by 0.0" in screen and "run it in float32" in screen


@needs_bf16
def test_bench_and_ask(folder: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    found = compare({"model": stock_model()}, Workload.fixed(6, 2, 1), 1, "bfloat16")
    assert [row.dtype for row in found.rows] == ["bfloat16", "fp32"]
    text = tmp_path / "text.txt"
    text.write_text("It opened in 1905.")
    argv = ["ask", str(folder), "--question", "When?", "--context-file", str(text), "--device", "cpu"]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert b'"answer"' in capsysbinary.readouterr().out


def test_what_serving_refuses() -> None:
    with pytest.raises(ValueError, match="calibration texts are for int8"):
        Loading(dtype="bfloat16", calibration=["a text"])
    with pytest.raises(ValueError, match="a plain model runs in its own dtype, not in bfloat16"):
        Loading(dtype="bfloat16", plain=True)


@needs_bf16
def test_what_is_served_keeps_no_fp32_weights() -> None:
    model = stock_model()
    Loading(device="cpu", dtype="bfloat16").prepare(model, None, 0)  # type: ignore[arg-type]
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert model.bert.packed.encoder.runs_in_bfloat16
    assert torch.equal(weight, weight.bfloat16().float())
