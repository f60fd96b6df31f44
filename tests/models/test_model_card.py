"""The card beside a checkpoint, and what push_to_hub would upload."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from transformers.utils import hub

import family_models
import pruned_ops
from inputs import logits, padded_batch, pruned_model
from matching import save_checkpoint
from pruned_ops import LayerShape
from pruned_ops.models.heads import PrunedBertForNaturalQuestions
from pruned_ops.models.model_card import MARKER
from pruned_ops.models.stock import model_shape
from pruned_trainer import Decision, compact
from pruned_trainer.pruning.decision import Kept, LayerDecision
from tiny_tokenizers import word_tokenizer

REPORT = {
    "dense": {"f1": 58.58, "f1_span": 72.9, "exact": 57.0, "workloads": {"w": {"ms": {"p50": 196.94}}}},
    "pruned": {"f1": 60.19, "f1_span": None, "exact": 58.0, "workloads": {"w": {"ms": {"p50": 96.8}}}},
    "speedup": {"asked": 2.0, "reached": 2.037, "workload": "w"},
    "evaluated_on": {"file": "eval.json", "questions": 3041},
    "machine": {"processor": "A Processor", "threads": 2, "accelerator": None},
    "versions": {"torch": "2.13.0"},
}


def with_report(model: Any, folder: Path, **changes: Any) -> str:
    """The card of a model that is saved beside a report."""
    folder.mkdir(exist_ok=True)
    report = {**REPORT, "shape": model.config.layer_shapes, **changes}
    (folder / "report.json").write_text(json.dumps(report))
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_shapes_and_task(kind: str, tmp_path: Path) -> None:
    model = pruned_model(kind)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "question-answering" and card.data.library_name == "transformers"
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", card.text, re.MULTILINE)
    shapes = [LayerShape(int(heads), int(width)) for _, heads, width in rows]
    assert shapes == list(model.config.shape.layers)
    assert f"{model.config.shape.parameters():,} of " in card.text
    assert "Not known of this checkpoint." in card.text and "`trust_remote_code` is not needed" in card.text


@pytest.mark.parametrize(("stem", "hidden"), [("Bert", None), ("Bert", 24), ("ModernBert", None)])
def test_parameters_are_counted_beside_the_dense_model_s_own(
    stem: str, hidden: int | None, tmp_path: Path
) -> None:
    """Which may have no biases, gated FFNs, and more hidden dimensions."""
    dense = family_models.stock(stem, family_models.ANSWERS)

    def kept(number: int) -> Kept:
        return Kept(tuple(range(number)), (1.0,) * number)

    decision = Decision((LayerDecision(kept(2), kept(40)),) * 2, 1, {}, {}, kept(hidden) if hidden else None)
    narrow = compact(dense, decision)
    narrow.save_pretrained(tmp_path)
    counts = [f"{model_shape(model).parameters():,}" for model in (narrow, dense)]
    assert f"{counts[0]} of {counts[1]} parameters in layers" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("natural_questions", [False, True])
def test_the_code_in_the_card_runs(natural_questions: bool, tmp_path: Path) -> None:
    model = pruned_model()
    if natural_questions:
        model = PrunedBertForNaturalQuestions(model.config).eval()
    folder = save_checkpoint(model, tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_HUB_NAME", str(folder)), names)
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        logits(names["model"], batch)[real], logits(model, batch)[real], atol=2e-5, rtol=1e-5
    )
    assert natural_questions or names["answerer"].answer("w1", "w2 w3").answer in ("", "w2", "w3", "w2 w3")


def test_scores_and_speed_are_the_reports(tmp_path: Path) -> None:
    card = with_report(pruned_model(), tmp_path)
    for line in (
        "| F1 | 58.58 | 60.19 |", "| exact match | 57.00 | 58.00 |", "| ms a batch (p50), w | 196.9 | 96.8 |",
        "| speed-up, both in our runtime | 1.00x | 2.04x |", "Scored on 3041 questions of eval.json.",
        "Timed on A Processor, 2 threads, torch 2.13.0.",
    ):  # fmt: skip
        assert line in card
    assert "span F1" not in card and "None" not in card


def test_a_report_of_something_else_is_not_quoted(tmp_path: Path) -> None:
    model = pruned_model()
    other = [{"num_heads": 1, "ffn_width": 1}] * 5
    assert "Not known" in with_report(model, tmp_path / "other", shape=other)
    for content in ("{", "[]", '"text"', "\xff"):
        (tmp_path / "other" / "report.json").write_bytes(content.encode("latin-1"))
        model.save_pretrained(tmp_path / "other")
        assert "Not known" in (tmp_path / "other" / "README.md").read_text()
    odd = with_report(model, tmp_path / "odd", dense=[], pruned={"f1": "high"}, speedup=7, machine=None)
    assert "| F1" not in odd and "Scored on 3041" in odd


def test_what_somebody_wrote_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("My model.")
    pruned_model().save_pretrained(tmp_path)
    assert card.read_text() == "My model." and (tmp_path / "model.safetensors").is_file()
    card.unlink()
    pruned_model().save_pretrained(tmp_path)
    assert MARKER in card.read_text() and "| 0 | 4 | 72 |" in card.read_text()
    pruned_model(shapes=[LayerShape(2, 7)]).save_pretrained(tmp_path)  # our own is brought up to date
    assert "| 0 | 2 | 7 |" in card.read_text() and "| 1 |" not in card.read_text()
    card.write_text(card.read_text().replace(MARKER, "Mine now."))
    pruned_model().save_pretrained(tmp_path)
    assert "Mine now." in card.read_text() and "| 0 | 2 | 7 |" in card.read_text()
    pruned_model().save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1" / "README.md").exists()


class DryHub:
    """Takes what would be uploaded into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        for one in operations:
            shutil.copyfile(one.path_or_fileobj, self.folder / one.path_in_repo)


@pytest.fixture
def uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a push ends; the repository holds no card yet."""

    def no_card(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("no README.md")

    monkeypatch.setattr(hub, "hf_api", lambda: DryHub(tmp_path / "uploaded"))
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    return tmp_path / "uploaded"


def test_push_to_hub_uploads_all_there_is(tmp_path: Path, uploaded: Path) -> None:
    """Card, weights, config, tokenizer: what is uploaded loads strictly, without code, to the same logits."""
    model = pruned_model()
    with_report(model, tmp_path / "model")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    loaded.push_to_hub("me/mine")
    assert {path.name for path in uploaded.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (uploaded / "README.md").read_text()
    assert MARKER in card and "| F1 | 58.58 | 60.19 |" in card
    word_tokenizer(90).push_to_hub("me/mine")
    assert AutoTokenizer.from_pretrained(uploaded)("w1").input_ids == word_tokenizer(90)("w1").input_ids
    assert "auto_map" not in json.loads((uploaded / "config.json").read_text())
    batch = padded_batch()
    again = AutoModelForQuestionAnswering.from_pretrained(uploaded, trust_remote_code=False)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_push_of_other_weights_quotes_no_scores(tmp_path: Path, uploaded: Path) -> None:
    with_report(pruned_model(), tmp_path / "model")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        loaded.qa_outputs.bias += 1
    loaded.push_to_hub("me/mine")
    assert "Not known of this checkpoint." in (uploaded / "README.md").read_text()
    pruned_ops.optimize(loaded).push_to_hub("me/mine")  # the same weights, as they were
    again = AutoModelForQuestionAnswering.from_pretrained(uploaded).state_dict()
    assert all(torch.equal(again[name], value) for name, value in loaded.state_dict().items())
