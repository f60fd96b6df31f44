"""A small RoBERTa with RoBERTa's own tokenizer goes the whole way: pruned, made anew from its decision,
reloaded, optimised, asked; on SQuAD and on Natural Questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, RobertaTokenizerFast

import pruned_ops
from inputs import logits, padded_batch, stock_model
from nq_pages import matching_file
from pruned_ops import QuestionAnswerer
from pruned_ops.models.natural_questions import load_natural_questions
from pruned_trainer.cli import main
from real_data import real_data

CUT = ["--max-length", "40", "--stride", "8", "--batch-size", "8"]
STEPS = ["--macs", "0.6", "--gate-steps", "2", "--retrain-steps", "2"]
CONTEXTS = (
    "Zoë  Müller, née 😀 Straße, moved to Kraków in 1905; Łódź was next.",
    "The river Avon — slow, with willows — flows through the old town to the sea. " * 4,
    "北京 and Москва are 5,800 km apart.\nNobody walks.",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = RobertaTokenizerFast.from_pretrained(real_data("models/roberta-base-tokenizer"))
    folder = tmp_path_factory.mktemp("roberta") / "source"
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    stock_model("roberta", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def squad_file(path: Path, questions: int) -> Path:
    """Questions for a word of a context, in articles of one each."""
    data = []
    for number in range(questions):
        context = CONTEXTS[number % len(CONTEXTS)]
        word = context.split()[number % len(context.split())]
        answer = {"text": word, "answer_start": context.index(word)}
        qa = {"id": str(number), "question": f"Où est {word}?", "answers": [answer], "is_impossible": False}
        data.append({"title": str(number), "paragraphs": [{"context": context, "qas": [qa]}]})
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def same_packed(load: Any, folder: Path, anew: Path) -> None:
    """The shapes that the decision makes of the dense model, and packed as padded."""
    model = load(folder)
    assert model.config.model_type == "pruned_roberta"
    assert load(anew).config.shape == model.config.shape
    batch = padded_batch((20, 3, 11), model.config.pad_token_id)
    real = batch["attention_mask"].bool()
    expected = logits(model, batch)[real]
    with pruned_ops.record() as ran:
        found = logits(pruned_ops.optimize(model), batch)[real]
    assert ran["encoder"]
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


def compacted(dense: Path, out: Path) -> Path:
    decision = str(out / "decision.json")
    anew = out.with_name(f"{out.name}-anew")
    assert main(["compact", "--model", str(dense), "--decision", decision, "--out", str(anew)]) == 0
    return anew


def test_squad(source: Path, tmp_path: Path) -> None:
    train, judged = squad_file(tmp_path / "train.json", 48), squad_file(tmp_path / "eval.json", 9)
    files = ["--train-file", str(train), "--eval-file", str(judged)]
    out = tmp_path / "out"
    assert main(["prune", "--model", str(source), *files, "--out", str(out), *STEPS, *CUT]) == 0
    same_packed(AutoModelForQuestionAnswering.from_pretrained, out, compacted(source, out))
    paragraphs = [article["paragraphs"][0] for article in json.loads(judged.read_text())["data"]]
    asked = [(one["qas"][0]["id"], one["qas"][0]["question"], one["context"]) for one in paragraphs]
    keys, questions, contexts = (list(part) for part in zip(*asked, strict=True))
    found = QuestionAnswerer(out, max_length=40, stride=8).answer(questions, contexts)
    predictions = json.loads((out / "predictions-pruned.json").read_text())
    assert {key: one.answer for key, one in zip(keys, found, strict=True)} == predictions
    for one, context in zip(found, contexts, strict=True):
        assert one.answer == context[one.start : one.end]
    assert any(one.answer for one in found)


def test_natural_questions(source: Path, tmp_path: Path) -> None:
    train, judged = matching_file(tmp_path / "train.jsonl", 80, 1), tmp_path / "eval.jsonl"
    matching_file(judged, 12, 2, annotators=5)
    dense, out, task = tmp_path / "dense", tmp_path / "out", ["--task", "natural_questions", *CUT]
    argv = ["--model", str(source), "--train-file", str(train), "--out", str(dense), "--epochs", "0.1"]
    assert main(["finetune", *argv, *task]) == 0
    files = ["--train-file", str(train), "--eval-file", str(judged), "--null-rate", "1"]
    assert (
        main(
            ["prune", "--model", str(dense), *files, "--out", str(out), *STEPS, "--compensate", "auto", *task]
        )
        == 0
    )
    same_packed(load_natural_questions, out, compacted(dense, out))
    argv = ["--model", str(out), "--eval-file", str(judged), "--predictions", str(tmp_path / "again.json")]
    assert main(["evaluate", *argv, *task[:-2]]) == 0
    assert (tmp_path / "again.json").read_text() == (out / "predictions-pruned.json").read_text()
    given = json.loads((tmp_path / "again.json").read_text())["predictions"]
    assert len(given) == 12 and any(one["short_answers"] for one in given)
