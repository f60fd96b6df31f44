"""What DeBERTa's attentions multiply by distance is made of the weights as they run, whichever of them int8
or bfloat16 rounds, and whenever that changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import pruned_ops
from family_models import TEXTS, batch, pruned, stock
from inputs import stock_model
from int8_anywhere import int8_anywhere
from pruned_ops.checkpoints.quantizing import quantize
from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.ops import panels
from pruned_ops.runtime import int8_choice
from pruned_ops.runtime.refusals import refuse_encoder
from text_models import sentences
from tiny_tokenizers import word_tokenizer

QKV = "layers.0.attention.qkv"


@pytest.fixture(autouse=True)
def _int8() -> Iterator[None]:
    with int8_anywhere(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about the linears that stay fp32
        yield


def planted(size: float = 60.0) -> Any:
    """A model with a column of the first query's and key's weights that is so many times what it was: int8
    rounds the others to a few levels, and the states of distances have next to nothing there."""
    model, channel = stock("DebertaV2", TEXTS, pad_token_id=0), 5
    encoder = model.deberta.encoder
    with torch.no_grad():
        for linear in ("query_proj", "key_proj"):
            encoder.layer[0].attention.self.get_submodule(linear).weight[:, channel] *= size
        encoder.LayerNorm.weight[channel] = encoder.LayerNorm.bias[channel] = 0.02
    return model


def planted_head(linear: str, size: float) -> Any:
    """The same in one head's queries or keys alone."""
    model, before = planted(size), planted(1.0)
    parts = [of.deberta.encoder.layer[0].attention.self for of in (model, before)]
    with torch.no_grad():
        for name in ("query_proj", "key_proj"):
            weight, weight_before = (part.get_submodule(name).weight for part in parts)
            stays = slice(16 if name == linear else 0, None)
            weight[stays] = weight_before[stays]
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch("right")).logits


def stack_of(model: Any) -> PrunedEncoder:
    return model.base_model.packed.encoder


def tables(model: Any) -> list[Tensor]:
    """The keys and the queries by distance of every layer."""
    parts = [layer.attention for layer in stack_of(model).layers]
    return [table.clone() for part in parts for table in (part.position_key, part.position_query)]


def same(found: list[Tensor], expected: list[Tensor]) -> list[bool]:
    return [torch.equal(*pair) for pair in zip(found, expected, strict=True)]


def test_without_a_tolerance_all_of_it_is_fp32() -> None:
    exact = pruned_ops.optimize(planted())
    fast = pruned_ops.optimize(planted(), dtype="int8", calibration=[batch("right")], tolerance=0.0)
    assert not stack_of(fast).int8_linears
    assert torch.equal(logits(fast), logits(exact)) and all(same(tables(fast), tables(exact)))


def test_a_calibration_sees_what_rounding_costs_there() -> None:
    """The error of a linear is that of its rounded weight in the products by distance, too."""
    everywhere = planted()
    exact, name = logits(everywhere), f"deberta.encoder.{QKV}"
    with torch.no_grad():  # what int8 makes of the weights in a plain model
        for linear in ("query_proj", "key_proj"):
            weight = everywhere.deberta.encoder.layer[0].attention.self.get_submodule(linear).weight
            values, scales = panels.quantize(weight)
            weight.copy_(values * scales)
    expected = int8_choice.relative_error([logits(everywhere)], [exact])
    fast = pruned_ops.optimize(planted(), dtype="int8", calibration=[batch("right")], tolerance=0.1)
    assert fast.int8_errors[name] == pytest.approx(expected, rel=0.05) and expected > 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda: planted(1000.0),
        lambda: planted_head("query_proj", 1000.0),
        lambda: planted_head("key_proj", 1000.0),
    ],
)
def test_random_tokens_see_what_rounding_costs_there(make: Any) -> None:
    """Without a calibration: next to nothing of a token is lost, and the keys and queries by distance are, of
    one head or of all: with them in int8 the logits of all were off by 1.1."""
    model = make()
    exact = logits(model)
    with pytest.warns(RuntimeWarning, match=r"1 of 8 linears stay in float32.*deberta\.encoder\.layers\.0"):
        fast = pruned_ops.optimize(model, dtype="int8")
    assert set(stack_of(fast).linear_names) - stack_of(fast).int8_linears == {QKV}
    assert fast.int8_losses[f"deberta.encoder.{QKV}"] > 0.3
    assert all(same(tables(fast)[:2], tables(pruned_ops.optimize(make()))[:2]))
    assert (logits(fast) - exact).abs().max() < 0.15


def test_random_tokens_leave_a_model_without_outliers_in_int8() -> None:
    fast = pruned_ops.optimize(planted(1.0), dtype="int8")
    assert stack_of(fast).int8_linears == set(stack_of(fast).linear_names)
    assert max(fast.int8_losses.values()) < 0.05


def test_random_tokens_judge_linears_where_all_before_is_fp32() -> None:
    """Also what is multiplied by distance before them: it is no loss of theirs."""
    model = planted()
    pruned_ops.optimize(model, dtype="int8")
    stack = stack_of(model)
    before = dict(model.int8_losses)
    stack.pack(True, stack.linear_names)
    again = model.base_model.packed.losses_on_random_tokens()
    assert {f"deberta.encoder.{name}": loss for name, loss in again.items()} == before


@pytest.mark.parametrize("options", [{"calibration": [batch("right")], "tolerance": 0.1}, {}])
def test_moved_or_saved_it_says_the_same_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen by a calibration, or on random tokens, where the first attention is left out here."""
    if not options:
        monkeypatch.setattr(
            int8_choice, "above_limit", lambda losses: {name: 1.0 for name in losses if name.endswith(QKV)}
        )
    fast = pruned_ops.optimize(planted(), dtype="int8", **options)
    assert QKV not in stack_of(fast).int8_linears and stack_of(fast).int8_linears
    expected, before = logits(fast), tables(fast)
    fast.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for other in (fast.to("cpu"), pruned_ops.optimize(again), copy.deepcopy(fast)):
        assert torch.equal(logits(other), expected) and all(same(tables(other), before))


def test_an_optimize_that_fails_gives_them_back() -> None:
    """It had changed what of an earlier optimised part runs in int8."""
    part = pruned_ops.optimize(planted(), dtype="int8", calibration=[batch("right")], tolerance=0.1)
    expected, before = logits(part), tables(part)
    with pytest.raises(NotImplementedError, match="forward"):
        pruned_ops.optimize(nn.ModuleList([part, stock_model()]), dtype="int8", calibration=[{}])
    assert torch.equal(logits(part), expected) and all(same(tables(part), before))


def test_a_layout_that_fails_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = pruned_ops.optimize(planted())
    stack, before = stack_of(fast), tables(fast)
    stack.pack(True)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(PrunedEncoder, "_lay_out", lambda *_: (_ for _ in ()).throw(MemoryError()))
        stack.pack(True, [QKV])
    assert all(same(tables(fast), before))
    stack.pack(True, [QKV])
    assert same(tables(fast), before) == [False, False, True, True]
    stack.unpack()
    assert all(same(tables(fast), before))


@pytest.mark.skipif(
    refuse_encoder(stock_model().bert, bfloat16=True) is not None, reason="no bfloat16 kernels here"
)
@pytest.mark.parametrize("keep_fp32", [True, False])
@pytest.mark.parametrize("make", [planted, lambda: pruned("pruned_deberta_v2", TEXTS)])
def test_bfloat16_that_is_moved_or_saved(make: Any, keep_fp32: bool, tmp_path: Path) -> None:
    """Without fp32 weights they are made of the rounded ones, which are the model's own then."""
    fast = pruned_ops.optimize(make(), dtype="bfloat16", keep_fp32=keep_fp32)
    expected, before = logits(fast), tables(fast)
    assert all(same(before, tables(pruned_ops.optimize(make())))) == keep_fp32
    fast.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for other in (fast.to("cpu"), pruned_ops.optimize(again, dtype="bfloat16")):
        assert torch.equal(logits(other), expected) and all(same(tables(other), before))


def test_quantize_writes_what_it_measured_where_linears_stay_fp32(tmp_path: Path) -> None:
    planted().save_pretrained(tmp_path / "fp32")
    word_tokenizer(96).save_pretrained(tmp_path / "fp32")
    report = quantize(str(tmp_path / "fp32"), tmp_path / "int8", sentences([5, 20, 9] * 8), 0.15)
    assert any("query_proj" in name for name in report.fp32_linears) and report.linears
