"""Compaction under every head: hard-gated = compacted, as the pruned class or in the user's own."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaModel,
)

import pruned_ops
from head_models import CLASSES, MODELS, SIZES, fields, stock
from inputs import padded_batch, shake
from pruned_ops.models.stock import choose_encoder, find_encoder
from pruned_ops.runtime.optimize import optimized
from pruned_trainer import Decision, SizeBudget, Target, attached, compact, decide
from pruned_trainer.pruning.compact import check_prunable, without_autocast
from tiny_tokenizers import word_tokenizer, words

BATCH = padded_batch((20, 3, 11), pad_token_id=1)


def dense_config(**more: Any) -> BertConfig:
    return BertConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, **more
    )


def decided(model: nn.Module, call: Any, **target: float) -> tuple[Decision, Any, Any]:
    """A decision about random gates, the outputs under it, and the compacted model."""
    parts = ("heads", "ffn", "hidden") if target.pop("hidden", False) else ("heads", "ffn")
    with attached(model, parts=parts) as gates:
        for i, log_alpha in enumerate(gates.locations()):
            noise = torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(i))
            log_alpha.data = 4 * noise
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.5), align=4)
        gates.fix(decision.values(gates.shape))
        with torch.no_grad():
            expected = call(model)
        narrow = compact(model, decision)
    assert not any("pruning_gates" in name for name, _ in narrow.named_modules())
    return decision, expected, narrow


@pytest.mark.parametrize("name", [name for name in MODELS if "answering" not in name])
def test_known_heads_become_their_pruned_counterparts(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    _, expected, narrow = decided(model, lambda m: fields(m(**BATCH)))
    assert type(narrow).__name__ == type(model).__name__.replace("Bert", "PrunedBert").replace(
        "Roberta", "PrunedRoberta"
    ).replace("PrunedPruned", "Pruned")
    with torch.no_grad():
        found = fields(narrow(**BATCH))
    for key, value in expected.items():
        real = BATCH["attention_mask"].bool() if value.shape[:2] == BATCH["attention_mask"].shape else ...
        torch.testing.assert_close(found[key][real], value[real], atol=1e-4, rtol=1e-4)


def test_it_is_saved_and_loaded_by_the_auto_class(tmp_path: Path) -> None:
    _, _, narrow = decided(stock("bert", "sequence"), lambda m: m(**BATCH).logits)
    narrow.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, narrow(**BATCH).logits)


@pytest.mark.parametrize("bare", [BertModel, RobertaModel])
def test_bare_encoders_keep_their_pooler(bare: Any) -> None:
    torch.manual_seed(0)
    model = shake(bare(dense_config() if bare is BertModel else stock("roberta", "token").config).eval(), 0)
    _, expected, narrow = decided(model, lambda m: m(**BATCH))
    with torch.no_grad():
        found = narrow(**BATCH)
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(
        found.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)


class TwoTowers(nn.Module):
    """Two encoders, of which one is pruned, and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = BertModel(dense_config(), add_pooling_layer=False)
        self.passage = BertModel(dense_config(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        pair = [tower(input_ids, attention_mask)[0][:, 0] for tower in (self.query, self.passage)]
        return {"loss": (pair[0] - pair[1]).square().mean(), "embedding": torch.cat(pair, -1)}


def test_a_model_with_two_encoders_is_pruned_in_the_one_that_is_named() -> None:
    torch.manual_seed(0)
    model = TwoTowers().eval()
    with pytest.raises(ValueError, match="2 encoders, query, passage: name the one"):
        find_encoder(model)
    with pytest.raises(ValueError, match="no encoder 'document'; .*query, passage"):
        choose_encoder(model, "document")
    choose_encoder(model, "passage")
    assert find_encoder(copy.deepcopy(model)) is not find_encoder(model) is model.passage
    decision, expected, narrow = decided(model, lambda m: m(**BATCH)["embedding"])
    assert type(narrow) is TwoTowers and type(narrow.query) is BertModel
    assert type(narrow.passage) is pruned_ops.PrunedBertModel and find_encoder(narrow) is narrow.passage
    with torch.no_grad():
        torch.testing.assert_close(narrow(**BATCH)["embedding"], expected, atol=1e-4, rtol=1e-4)
    # As a new process shapes a model to load the weights into.
    again = compact(TwoTowers(), decision, encoder="passage")
    again.load_state_dict(narrow.state_dict())
    assert type(again.query) is BertModel and type(again.passage) is pruned_ops.PrunedBertModel


def test_what_is_tied_stays_tied_in_the_users_own_class() -> None:
    torch.manual_seed(0)
    model = shake(BertForMaskedLM(dense_config()).eval(), 0)
    _, expected, narrow = decided(model, lambda m: m(**BATCH).logits)
    assert type(narrow) is BertForMaskedLM and type(narrow.bert) is pruned_ops.PrunedBertModel
    assert narrow.cls.predictions.decoder.weight is narrow.bert.embeddings.word_embeddings.weight
    assert narrow.config is narrow.bert.config and narrow.config.model_type == "pruned_bert"
    real = BATCH["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(narrow(**BATCH).logits[real], expected[real], atol=1e-4, rtol=1e-4)
    labels = BATCH["input_ids"].masked_fill(~real, -100)
    assert narrow.train()(**BATCH, labels=labels).loss.requires_grad


class Weighted(BertForSequenceClassification):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_changed_head_keeps_its_class() -> None:
    torch.manual_seed(0)
    subclass = shake(Weighted(dense_config()).eval(), 0)
    deeper = shake(BertForSequenceClassification(dense_config()).eval(), 0)
    deeper.classifier = nn.Sequential(nn.Linear(32, 7), nn.Tanh(), nn.Linear(7, 3))
    for model in (subclass, deeper):
        _, expected, narrow = decided(model, lambda m: m(**BATCH).logits)
        assert type(narrow) is type(model) and type(narrow.bert) is pruned_ops.PrunedBertModel
        with torch.no_grad():
            torch.testing.assert_close(narrow(**BATCH).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_forward_of_the_model_s_own_outlives_autocast() -> None:
    """Accelerate wraps it to train under autocast; compaction and the end of a training take that off."""

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = BertForSequenceClassification.forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._original_forward(*args, **kwargs)

    torch.manual_seed(0)
    model: Any = shake(BertForSequenceClassification(dense_config()).eval(), 0)
    model.forward = own = MethodType(doubled, model)
    without_autocast(model)  # there is none: in fp32 Accelerate leaves a model as it is
    assert model.forward is own
    model._original_forward, model.forward = own, MethodType(wrapped, model)
    _, expected, narrow = decided(model, lambda m: m(**BATCH).logits)
    assert narrow.forward.__func__ is doubled and "_original_forward" not in vars(narrow)
    with torch.no_grad():
        torch.testing.assert_close(narrow(**BATCH).logits, expected, atol=1e-4, rtol=1e-4)
    without_autocast(model)
    assert model.forward is own and "_original_forward" not in vars(model)
    del model.forward
    model._original_forward, model.forward = model.forward, MethodType(wrapped, model)
    without_autocast(model)
    assert not {"forward", "_original_forward"} & vars(model).keys()


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_hidden_dimensions_go_where_the_head_can_lose_them(kind: str, head: str, tmp_path: Path) -> None:
    """A pooler reads fewer of them, and is as wide as it was; twice, and from disk."""
    model = stock(kind, head)
    for _ in range(2):
        decision, expected, narrow = decided(model, lambda m: m(**BATCH).logits, hidden=True)
        assert decision.hidden is not None
        assert narrow.config.hidden_size == len(decision.hidden.indices) < model.config.hidden_size
        real = BATCH["attention_mask"].bool() if head == "token" else ...
        with torch.no_grad():
            torch.testing.assert_close(narrow(**BATCH).logits[real], expected[real], atol=1e-3, rtol=1e-3)
        model = narrow
    if head == "sequence":
        assert narrow.config.pooled_width == 64
    narrow.save_pretrained(tmp_path)
    again = CLASSES[kind, head][2].from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, narrow(**BATCH).logits)
        with optimized(again) as fast:
            found = fast(**BATCH).logits[real]
        torch.testing.assert_close(found, narrow(**BATCH).logits[real], atol=1e-4, rtol=1e-4)


def test_hidden_dimensions_stay_under_other_heads() -> None:
    torch.manual_seed(0)
    for model in (TwoTowersOnOne(), BertModel(dense_config()).eval()):
        with pytest.raises(ValueError, match="hidden dimensions cannot be pruned under the head of this"):
            check_prunable(model, ["hidden"])
        with pytest.raises(ValueError, match="hidden dimensions cannot be pruned under the head of this"):
            decided(model, lambda m: m(**BATCH), hidden=True)


class TwoTowersOnOne(nn.Module):
    """A module of one's own around one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = BertModel(dense_config(), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.tower(input_ids, attention_mask)[0][:, 0]


def test_sentence_transformers_keep_their_modules(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    BertModel(dense_config()).save_pretrained(tmp_path)
    word_tokenizer(90).save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    texts = [words(3), words(40), words(11)]
    _, expected, narrow = decided(model, lambda m: m.encode(texts))
    assert isinstance(narrow, library.SentenceTransformer)
    assert type(find_encoder(narrow)).__name__ == "PrunedBertModel"
    torch.testing.assert_close(
        torch.tensor(narrow.encode(texts)), torch.tensor(expected), atol=1e-4, rtol=1e-4
    )
    narrow.save(str(tmp_path / "narrow"))
    again = library.SentenceTransformer(str(tmp_path / "narrow"), device="cpu")
    torch.testing.assert_close(torch.tensor(again.encode(texts)), torch.tensor(narrow.encode(texts)))
