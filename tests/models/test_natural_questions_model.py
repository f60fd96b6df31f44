"""Natural Questions models: the stock model's numbers and an answer type; packed, saved, compacted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering

import pruned_ops
from inputs import logits, padded_batch, pruned_model, stock_model
from pruned_ops.models.heads import AnswerType
from pruned_ops.models.natural_questions import load_natural_questions, with_answer_types
from pruned_trainer import SizeBudget, Target, attached, compact, decide

MAKERS = {
    "stock-bert": lambda: stock_model("bert"),
    "stock-roberta": lambda: stock_model("roberta"),
    "pruned-bert": lambda: pruned_model("bert"),
    "pruned-roberta": lambda: pruned_model("roberta"),
}


@pytest.fixture(params=MAKERS)
def source(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MAKERS[request.param]()


def labels(rows: int) -> dict[str, torch.Tensor]:
    return {
        "start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 1,
        "answer_types": torch.arange(rows) % len(AnswerType),
    }  # fmt: skip


def test_start_and_end_are_the_source_s(source: Any) -> None:
    model = with_answer_types(source)
    batch = padded_batch((20, 3, 11), source.config.pad_token_id)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real], logits(source, batch)[real], atol=2e-5, rtol=1e-4)
    output = model(**batch, **labels(3), output_hidden_states=True)
    last = output.hidden_states[-1]
    torch.testing.assert_close(output.answer_type_logits, model.answer_type_outputs(last[:, 0]))
    expected = [
        F.cross_entropy(output.start_logits, labels(3)["start_positions"]),
        F.cross_entropy(output.end_logits, labels(3)["end_positions"]),
        F.cross_entropy(output.answer_type_logits, labels(3)["answer_types"]),
    ]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    assert model(**batch, **labels(3), return_dict=False)[0] == output.loss
    output.loss.backward()
    assert model.answer_type_outputs.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_is_padded(source: Any, side: str) -> None:
    """Also where a row is padding only, and where padding comes first."""
    model = with_answer_types(source)
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    if side == "left":
        batch = {name: values.flip(1) for name, values in batch.items()}
        if model.config.model_type == "pruned_bert":  # positions count padding there: said by the caller
            batch["position_ids"] = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)
        pruned_ops.optimize(model)
        with pruned_ops.record() as ran:
            found = model(**batch)
    assert ran["encoder"]
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][real], expected[name][real], atol=2e-5, rtol=1e-4)
        assert (found[name][~real] == torch.finfo(torch.float32).min).all()
    torch.testing.assert_close(found.answer_type_logits, expected.answer_type_logits, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="an optimised model does not take start_positions"):
        model(**batch, **labels(5))
    as_tuple = model(**batch, return_dict=False)
    assert len(as_tuple) == 3 and torch.equal(as_tuple[2], found.answer_type_logits)


def test_only_padding_is_no_error(source: Any) -> None:
    model = with_answer_types(source)
    batch = padded_batch((4, 0), model.config.pad_token_id)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with torch.no_grad():
        padded, packed = model(**batch), pruned_ops.optimize(model)(**batch)
    bias = model.answer_type_outputs.bias.expand(2, -1)
    assert torch.equal(padded.answer_type_logits, bias) and torch.equal(packed.answer_type_logits, bias)


def test_save_and_load_is_strict(source: Any, tmp_path: Path) -> None:
    model = with_answer_types(source).eval()
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    model.save_pretrained(tmp_path / "nq")
    again = load_natural_questions(tmp_path / "nq")
    assert type(again) is type(model)
    with torch.no_grad():
        for one, other in zip(model(**batch).to_tuple(), again(**batch).to_tuple(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"unexpected answer_type_outputs\.bias"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "nq")
    source.save_pretrained(tmp_path / "qa")
    message = r"missing answer_type_outputs\.bias|without answer types: fine-tune it on Natural Questions"
    with pytest.raises(ValueError, match=message):
        load_natural_questions(tmp_path / "qa")


def test_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertModel is no question-answering model: missing"):
        with_answer_types(stock_model("bert").bert)
    other = stock_model("bert")
    other.config.model_type = "albert"
    with pytest.raises(ValueError, match="it is a 'albert' model; one of bert, pruned_bert"):
        with_answer_types(other)


@pytest.mark.parametrize("parts", [("heads", "ffn"), ("heads", "ffn", "hidden")])
def test_compacted_is_gated(source: Any, parts: tuple[str, ...]) -> None:
    """The narrow model, with its answer types, computes what the gated one does."""
    model = with_answer_types(source)
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    with attached(model, parts=parts) as gates:
        generator = torch.Generator().manual_seed(0)
        for log_alpha in gates.locations():
            log_alpha.data = torch.randn(log_alpha.shape, generator=generator) * 3
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.6), 1)
        gates.fix(decision.values(gates.shape))
        with torch.no_grad():
            gated = model(**batch)
    narrow = compact(model, decision)
    assert type(narrow) is type(model)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        found = narrow(**batch)
    close = {"atol": 2e-4, "rtol": 1e-3}
    torch.testing.assert_close(found.answer_type_logits, gated.answer_type_logits, **close)
    torch.testing.assert_close(found.start_logits[real], gated.start_logits[real], **close)
