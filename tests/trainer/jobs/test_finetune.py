"""Fine-tuning from whatever a question-answering model may start from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from head_models import pruned
from matching import WORDS, save_checkpoint, squad_file
from nq_pages import matching_file
from pruned_ops.models.encoder import NewHeadWarning
from pruned_ops.models.natural_questions import with_answer_types
from pruned_trainer.cli import main
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask, NqFiles

CUT = ("--max-length", "24", "--stride", "4", "--epochs", "0.1")
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": WORDS + 4, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("task", ["squad", "natural_questions"])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_gives_its_encoder(labels: int, task: str, tmp_path: Path) -> None:
    """An entailment model (3 labels) or a reranker (1) starts a question-answering model with a new head."""
    torch.manual_seed(0)
    source = BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels))
    model = save_checkpoint(source, tmp_path / "classifier")
    if task == "squad":
        train = squad_file(tmp_path / "train.json", 40, 1)
    else:
        train = matching_file(tmp_path / "train.jsonl", 40, 1)
    argv = ["--model", str(model), "--train-file", str(train), "--out", str(tmp_path / "out"), "--task", task]
    assert main(["finetune", *argv, *CUT]) == 0
    if task == "squad":
        made = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
        assert made.config.num_labels == 2 and made.qa_outputs.out_features == 2
        close = torch.isclose(
            made.bert.embeddings.position_embeddings.weight,
            source.bert.embeddings.position_embeddings.weight, atol=1e-3,
        )  # fmt: skip
        assert close.float().mean() > 0.9


def test_a_disk_too_full_for_the_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of Natural Questions lie on disk before the first step."""

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(NaturalQuestionsTask, "to_fine_tune", no_space)
    model = save_checkpoint(BertForQuestionAnswering(BertConfig(**SIZES)), tmp_path / "model")
    train = matching_file(tmp_path / "train.jsonl", 40, 1)
    argv = ["--model", str(model), "--train-file", str(train), "--out", str(tmp_path / "out")]
    assert main(["finetune", *argv, "--task", "natural_questions", *CUT]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pruned-trainer finetune: there is no room left to write " in error
    assert error.endswith("make room, then start again")


def test_a_pruned_classifier_gives_its_encoder(tmp_path: Path) -> None:
    model = save_checkpoint(pruned("bert", "token"), tmp_path / "classifier")
    train = squad_file(tmp_path / "train.json", 40, 1)
    argv = ["--model", str(model), "--train-file", str(train), "--out", str(tmp_path / "out")]
    with pytest.warns(NewHeadWarning, match="qa_outputs"):
        assert main(["finetune", *argv, *CUT]) == 0
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").qa_outputs.out_features == 2


def test_weights_stored_in_halves_are_trained_in_fp32(tmp_path: Path) -> None:
    """transformers loads them as they are stored, and a step is less than what a half can tell apart."""
    source = BertForQuestionAnswering(BertConfig(**SIZES))
    model = save_checkpoint(source.bfloat16(), tmp_path / "halves")
    train = squad_file(tmp_path / "train.json", 40, 1)
    argv = ["--model", str(model), "--train-file", str(train), "--out", str(tmp_path / "out")]
    assert main(["finetune", *argv, *CUT]) == 0
    for folder, dtype in ((model, torch.bfloat16), (tmp_path / "out", torch.float32)):
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    typed = save_checkpoint(with_answer_types(source.float()).bfloat16(), tmp_path / "typed")
    started = NaturalQuestionsTask().start_model(str(typed), NqFiles(()))
    assert {parameter.dtype for parameter in started.parameters()} == {torch.float32}


def test_prune_refuses_what_has_no_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(BertForTokenClassification(BertConfig(**SIZES)), tmp_path / "tagger")
    train = squad_file(tmp_path / "train.json", 40, 1)
    argv = ["--model", str(model), "--train-file", str(train), "--out", str(tmp_path / "out")]
    assert main(["prune", *argv, "--macs", "0.5", *CUT[:4]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pruned-trainer prune: ") and "lacks qa_outputs" in error


@pytest.mark.parametrize(
    ("precision", "error"), [("int4", "precision is 'int4'; one of"), ("fp16", "precision fp16 needs a GPU")]
)
def test_a_precision_that_cannot_be_is_refused(precision: str, error: str, tmp_path: Path) -> None:
    if precision == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 trains on a GPU")
    with pytest.raises(ValueError, match=error):
        FineTuneSettings("model", tmp_path / "train.json", tmp_path / "out", precision=precision)
