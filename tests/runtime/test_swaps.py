"""Optimised models where people have them: copied, pickled, cast, compiled, autocast, with a device map.
What cannot be is refused by name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

import family_models
import pruned_ops
from inputs import logits, padded_batch, pruned_model, stock_model
from int8_anywhere import int8_anywhere
from pruned_ops import LayerShape
from pruned_ops.ops.registry import OPS, Backend, Kernel
from pruned_ops.runtime.engine import Engine
from stand_in_graphs import StandIn, ids_of, with_engine


def test_copies_and_pickles_are_models_of_their_own(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = pruned_ops.optimize(model)
    expected = logits(fast, batch)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(logits(twin, batch), expected)
        twin.qa_outputs.weight.data.zero_()
        assert not torch.equal(logits(twin, batch), expected)  # its own head, not the other's
        restored = pruned_ops.restore(twin).state_dict()
        assert restored.keys() == before.keys()
        assert all(torch.equal(restored[n], before[n]) for n in before if n != "qa_outputs.weight")
    assert torch.equal(logits(fast, batch), expected)


def test_casts_run_in_the_dtype_asked_for(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    plain = copy.deepcopy(model)
    fast, engine = with_engine(model)
    for dtype, rtol, atol in ((torch.bfloat16, 0.2, 0.5), (torch.float32, 1e-5, 2e-5)):
        expected = logits(plain.to(dtype), batch)
        found = logits(fast.to(dtype), batch)
        assert found.dtype == dtype and (found[~real] == torch.finfo(dtype).min).all()
        torch.testing.assert_close(found[real], expected[real], rtol=rtol, atol=atol)
    assert engine.stats.captures == 2 and engine.stats.invalidated == 1


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("stem", ["Bert", "MPNet", "DebertaV2", "ModernBert"])
def test_defaults_of_the_process_change_nothing(stem: str, dtype: str | None) -> None:
    """Neither another dtype nor another device; the meta device stands for a GPU."""
    batch, models = family_models.batch("left"), [family_models.stock(stem, "") for _ in range(2)]
    with int8_anywhere():
        expected = family_models.outputs(pruned_ops.optimize(models[0], dtype), batch)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                fast = pruned_ops.optimize(models[1], dtype).to("cpu").float()
                outputs = family_models.outputs(fast, batch)
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_autocast_is_obeyed_or_refused() -> None:
    """An encoder packed in one dtype computes in no other; in its own, autocast changes nothing."""
    fast, batch = pruned_ops.optimize(stock_model()), padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"autocast asks for torch.bfloat16.*model.to\(torch.bfloat16\)"):
            fast(**batch)
        with torch.autocast("cpu", enabled=False):
            logits(fast, batch)
    fast.to(torch.bfloat16)
    expected = logits(fast, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fast, batch), expected)


def test_a_device_map_of_one_device_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = pruned_model()
    model.save_pretrained(tmp_path)
    mapped = AutoModelForQuestionAnswering.from_pretrained(tmp_path, device_map={"": "cpu"})
    batch = padded_batch()
    expected = logits(mapped, batch)
    real = batch["attention_mask"].bool()
    found = logits(pruned_ops.optimize(mapped), batch)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)
    spread = accelerate.cpu_offload(pruned_model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="optimize cannot take bert.*forward of its .* was replaced"):
        pruned_ops.optimize(spread)


def test_compiled_code_does_not_run_by_our_graphs() -> None:
    """It is another's to record; the engine is asked again outside."""
    model = pruned_model("roberta", [LayerShape(2, 24), LayerShape(0, 0)])
    fast, engine = with_engine(model)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = logits(fast, batch)
    replays = engine.stats.replays
    torch._dynamo.reset()
    found = logits(torch.compile(fast, backend="eager", fullgraph=True), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)
    assert engine.stats.replays == replays and engine.stats.eager == 0
    logits(fast, batch)
    assert engine.stats.replays == replays + 1


def test_a_moved_model_is_captured_anew_and_an_eager_one_never() -> None:
    fast, engine = with_engine(stock_model())
    fast(**ids_of([5]))
    fast.to("cpu")  # also where nothing moves: who asks for it may have done more
    fast(**ids_of([5]))
    assert engine.stats.captures == 2
    eager = pruned_ops.optimize(stock_model(), graphs=False)
    assert eager.base_model.packed.engine is None and not hasattr(eager, "engine")


def test_asynchronous_errors_name_their_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under debug() each op is waited for before and after: an error is the op's that caused it."""
    waits: list[int] = []

    def wait(*tensors: Any) -> None:
        waits.append(len(waits) + 1)
        if waits[-1] == fails_at[0]:
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("pruned_ops.ops.registry._wait", wait)
    fast = pruned_ops.optimize(stock_model())
    fast.base_model.packed.encoder.unpack()
    # Each op waits twice. Embedding, attention: the 3rd is before the attention, the 4th after it.
    for number, message in (
        (4, r"attention on \w+: CUDA error: device-side assert"),
        (3, r"before attention on \w+ began: CUDA error: device-side assert"),
        (2, r"embed_layer_norm on \w+: CUDA error"),
    ):
        waits.clear()
        fails_at = [number]
        with pruned_ops.debug(), pytest.raises(RuntimeError, match=f"^{message}"):
            fast(**ids_of([5]))
    waits.clear()
    fast(**ids_of([5]))
    assert not waits  # nothing waits without it


def test_a_kernels_own_error_names_op_and_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> Any:
        raise RuntimeError("misaligned address")

    broken = Backend("broken", None, "fails")
    kernels = {"broken": Kernel(broken, launch, lambda *_: None)}
    monkeypatch.setattr(OPS["attention"], "kernels", kernels)
    fast, engine = with_engine(pruned_ops.optimize(stock_model()), recorder=StandIn())
    fast.base_model.packed.encoder.unpack()
    with pruned_ops.debug(), pytest.raises(RuntimeError, match="^attention on broken: misaligned address"):
        fast(**ids_of([5]))
    assert isinstance(engine, Engine) and engine.stats.replays == 0
