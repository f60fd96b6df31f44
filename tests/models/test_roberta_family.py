"""XLM-R and CamemBERT, which are RoBERTa with other vocabularies, go every way that RoBERTa goes; other model
types are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForQuestionAnswering,
    AutoModelForQuestionAnswering,
    CamembertConfig,
    CamembertForSequenceClassification,
    MobileBertConfig,
    MobileBertForQuestionAnswering,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import pruned_ops
from inputs import logits, padded_batch, stock_model
from pruned_ops import LayerShape, QuestionAnswerer
from pruned_ops.checkpoints.loading import load_model
from pruned_ops.cli import main
from pruned_ops.measure.launch_bound import tiny_twin
from pruned_ops.measure.layer_times import empty_config
from pruned_ops.models.families.known import BY_TYPE
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.natural_questions import load_natural_questions, with_answer_types
from pruned_trainer import SizeBudget, Target, attached, compact, decide
from pruned_trainer.cli import main as trainer_main
from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask
from tiny_tokenizers import byte_tokenizer

CLOSE = {"atol": 3e-5, "rtol": 1e-4}


@pytest.fixture(params=["xlm-roberta", "camembert"])
def stock(request: pytest.FixtureRequest) -> Any:
    return stock_model(request.param, vocab_size=300, max_position_embeddings=82)


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_is_stock(stock: Any, side: str) -> None:
    """Padded on either side: positions count from the padding index, wherever it stands."""
    batch = padded_batch((20, 3, 11, 80), stock.config.pad_token_id)
    if side == "left":
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    real = batch["attention_mask"].bool()
    expected = logits(stock, batch)
    with torch.no_grad():
        states = stock.base_model(**batch).last_hidden_state
    fast = pruned_ops.optimize(stock)
    with pruned_ops.record() as ran:
        found = logits(fast, batch)
    assert ran["encoder"]
    torch.testing.assert_close(found[real], expected[real], **CLOSE)
    assert (found[~real] == torch.finfo(torch.float32).min).all()
    with torch.no_grad():
        torch.testing.assert_close(fast.base_model(**batch).last_hidden_state[real], states[real], **CLOSE)
    with pytest.raises(ValueError, match="an optimised model does not take start_positions"):
        fast(**batch, start_positions=torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(logits(pruned_ops.restore(fast), batch), expected, atol=0, rtol=0)


def test_too_long_is_refused(stock: Any) -> None:
    assert longest_sequence(stock.config) == 80
    with pytest.raises(ValueError, match="81 tokens; the model's position table allows 80"):
        pruned_ops.optimize(stock)(**padded_batch((81,), stock.config.pad_token_id))


@pytest.mark.parametrize("task", ["squad", "natural_questions"])
def test_pruned_it_is_a_pruned_roberta(stock: Any, task: str, tmp_path: Path) -> None:
    """Gated, compacted, saved, reloaded, optimised: the same numbers, under the type pruned_roberta."""
    model = with_answer_types(stock) if task == "natural_questions" else stock
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, batch)[real], logits(stock, batch)[real], **CLOSE)
    with attached(model) as gates:
        generator = torch.Generator().manual_seed(0)
        for log_alpha in gates.locations():
            log_alpha.data = torch.randn(log_alpha.shape, generator=generator) * 3
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.5), 1)
        gates.fix(decision.values(gates.shape))
        gated = logits(model, batch)
    narrow = compact(model, decision)
    assert narrow.config.model_type == "pruned_roberta"
    torch.testing.assert_close(logits(narrow, batch)[real], gated[real], atol=2e-4, rtol=1e-3)
    narrow.save_pretrained(tmp_path)
    load: Any = AutoModelForQuestionAnswering.from_pretrained if model is stock else load_natural_questions
    again = load(tmp_path)
    assert type(again) is type(narrow) and torch.equal(logits(again, batch), logits(narrow, batch))
    torch.testing.assert_close(
        logits(pruned_ops.optimize(again), batch)[real], logits(narrow, batch)[real], **CLOSE
    )


def test_checkpoints_answer_and_are_checked(stock: Any, tmp_path: Path) -> None:
    """A stock folder: the same answers as in memory; `pruned-ops check` and `import`; another task's head."""
    folder, out, question = tmp_path / "stock", tmp_path / "out", "Who?"
    text = "Ada did it, and nobody else. " * 10
    stock.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    expected = QuestionAnswerer(stock, byte_tokenizer(), max_length=60).answer(question, text, top_k=3)
    assert QuestionAnswerer(folder, max_length=60).answer(question, text, top_k=3) == expected
    assert type(load_model(str(folder))) is type(stock)
    (tmp_path / "text.txt").write_text(text)
    assert main(["check", str(folder), "--text-file", str(tmp_path / "text.txt")]) == 0
    assert main(["import", str(folder), str(out)]) == 0
    batch = padded_batch((20, 3, 11), stock.config.pad_token_id)
    real = batch["attention_mask"].bool()
    pruned_ops.restore(stock)
    torch.testing.assert_close(logits(load_model(str(out)), batch)[real], logits(stock, batch)[real], **CLOSE)
    imported = QuestionAnswerer(out, max_length=60).answer(question, text, top_k=3)
    assert imported[0].answer == expected[0].answer
    examples: Any = ()  # it needs none
    started = NaturalQuestionsTask().start_model(str(folder), examples)
    assert started.config.model_type == "pruned_roberta"


def test_what_is_timed_is_a_roberta(stock: Any) -> None:
    empty, widest = empty_config(stock.config)
    assert empty.model_type == "pruned_roberta" and widest == LayerShape(4, 96)
    assert tiny_twin(stock).config.model_type == "pruned_roberta"


SMALL = {"vocab_size": 100, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (XLMRobertaConfig, XLMRobertaForSequenceClassification),
        (CamembertConfig, CamembertForSequenceClassification),
    ],
)
def test_stock_classifiers(config_class: Any, model_class: Any) -> None:
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL, num_attention_heads=4, initializer_range=0.2)).eval()
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    with torch.no_grad():
        expected = model(**batch).logits
        found = pruned_ops.optimize(model)(**batch).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    with pytest.raises(ValueError, match="reads position 0, where attention_mask says there is padding"):
        model(**{name: tensor.flip(1) for name, tensor in batch.items()})
    with pytest.raises(ValueError, match="an optimised model does not take labels"):
        model(**batch, labels=torch.zeros(3, dtype=torch.long))


OTHERS = {
    "albert": lambda: AlbertForQuestionAnswering(AlbertConfig(**SMALL, num_attention_heads=4)),
    "mobilebert": lambda: MobileBertForQuestionAnswering(MobileBertConfig(**SMALL, num_attention_heads=4)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_model_types_are_refused_by_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = OTHERS[kind]().eval()
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"no encoder that is known here found in {type(model).__name__}"):
        pruned_ops.optimize(model)
    known = ", ".join(BY_TYPE)
    assert known.startswith("bert, pruned_bert, roberta, xlm-roberta, camembert, pruned_roberta, ")
    with pytest.raises(ValueError, match=f"it is a '{kind}' model; only {known} are supported"):
        load_model(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"it is a '{kind}' model; one of {known} is needed"):
        with_answer_types(model)
    with pytest.raises(ValueError, match=f"a {kind} model is not measured"):
        empty_config(model.config)
    assert main(["import", str(tmp_path / "other"), str(tmp_path / "out")]) == 2
    assert f"is a '{kind}' model; bert, roberta, xlm-roberta, camembert, " in capsys.readouterr().err
    train = tmp_path / "train.jsonl"
    train.write_text("")
    argv = ["finetune", "--task", "natural_questions", "--model", str(tmp_path / "other"), "--train-file"]
    assert trainer_main([*argv, str(train), "--out", str(tmp_path / "out")]) == 2
    assert f"it is a '{kind}' model" in capsys.readouterr().err
