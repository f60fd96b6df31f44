"""What `pruned_trainer.prune` keeps of what its caller gave: what is frozen, and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding

import pruned_trainer
from calls import HALF, classifier, rows
from matching import save_checkpoint
from tiny_tokenizers import word_tokenizer


def test_what_the_caller_froze_stays_frozen_and_the_tokenizer_is_the_callers(tmp_path: Path) -> None:
    """Also where the folder that the model came from has another tokenizer."""
    save_checkpoint(classifier(), tmp_path / "start")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "start")
    model.classifier.requires_grad_(False)
    tokenizer = word_tokenizer(90)
    tokenizer.add_tokens(["brandnew"])
    result = pruned_trainer.prune(
        model, HALF, rows(24), rows(8), data_collator=DataCollatorWithPadding(tokenizer),
        out=tmp_path / "out", gate_steps=1, retrain_steps=2,
    )  # fmt: skip
    assert torch.equal(result.model.classifier.weight, model.classifier.weight)
    assert not torch.equal(result.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert "brandnew" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_collators_tokenizer_that_cannot_be_saved_is_left_out() -> None:
    """It may be of another library."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(padded(batch))

    padded = DataCollatorWithPadding(word_tokenizer(90))
    collate.tokenizer = padded.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    data = rows(24)
    assert pruned_trainer.prune(
        classifier(), HALF, data, data[:8], data_collator=collate, gate_steps=1, retrain_steps=1
    )
