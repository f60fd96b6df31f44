"""What `pruned_trainer.prune` keeps of what its caller gave: what is frozen, the tokenizer, and the precision
of the launcher."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

import pruned_trainer
from calls import HALF, arguments, classifier, rows
from matching import save_checkpoint
from pruned_ops.measure.timing import Workload
from pruned_trainer.training.trainer import PruningTrainer
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


def mean_loss(outputs: Any, batch: Any) -> Tensor:
    return outputs.logits.pow(2).mean()


def other_loss(outputs: Any, batch: Any) -> Tensor:
    return outputs.logits.pow(4).mean()


def test_a_resumed_call_with_another_function_is_refused_and_the_sentence_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, the collator, the metrics, and what of the arguments decides."""
    out, step = tmp_path / "out", PruningTrainer.training_step
    collator, other = DataCollatorWithPadding(word_tokenizer(90)), partial(default_data_collator)

    def call(**more: Any) -> Any:
        options = {"loss": mean_loss, "data_collator": collator, "args": arguments(tmp_path), **more}
        return pruned_trainer.prune(classifier(), HALF, rows(24), rows(8, 1), out=out, **options)

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.gate_phase is None:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PruningTrainer, "training_step", interrupted)
        call()
    this_module, library = __name__, "transformers.data.data_collator"
    for changes, told in (
        ({"loss": other_loss}, rf"loss \({this_module}.mean_loss then, {this_module}.other_loss now\)"),
        ({"loss": None}, rf"loss \({this_module}.mean_loss then, none now\)"),
        (
            {"data_collator": other},
            rf"data_collator \({library}.DataCollatorWithPadding then, {library}.default_data_collator now\)",
        ),
        ({"compute_metrics": lambda predicted: {}}, r"compute_metrics \(none then, .*<lambda> now\)"),
        ({"args": arguments(tmp_path, weight_decay=0.5)}, r"args.weight_decay \(0.0 then, 0.5 now\)"),
        (
            {"args": arguments(tmp_path, neftune_noise_alpha=5.0)},
            r"args.neftune_noise_alpha \(None then, 5.0 now\)",
        ),
        ({"workload": Workload.fixed(8, 2, 2)}, r"workload \(none then, fixed8-b2 .* now\)"),
    ):
        with pytest.raises(ValueError, match=f"^{told} changed since .*out.partial was started: put back"):
            call(resume=True, **changes)
    assert call(resume=True, data_collator=DataCollatorWithPadding(word_tokenizer(90))).report
    assert not out.with_name("out.partial").exists()


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


@pytest.mark.parametrize("launched", ["bf16", None])
def test_the_launchers_precision_is_there_for_the_callers_next_training(
    launched: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call itself trains in its own, also by the caller's arguments."""
    name = "ACCELERATE_MIXED_PRECISION"
    args, data = arguments(tmp_path), rows(24)
    monkeypatch.setenv(name, launched) if launched else monkeypatch.delenv(name, raising=False)
    for options in ({"args": args}, {"gate_steps": 1, "retrain_steps": 1}):
        report = pruned_trainer.prune(classifier(), HALF, data, data[:8], **options).report  # type: ignore[arg-type]
        assert report["plan"]["precision"] == "fp32"
        assert os.environ.get(name) == launched
