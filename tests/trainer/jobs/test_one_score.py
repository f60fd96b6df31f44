"""Models of one score, through the commands: fine-tuned on pairs with a score each, scored and pruned; and
judged by texts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertForSequenceClassification, BertModel

from pruned_trainer.cli import main
from text_files import CUT, checkpoint, classified, scored, write_rows


def test_scores_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A column of numbers makes a model of one output, which is judged by correlation."""
    train, judged = (write_rows(tmp_path / f"{n}.json", scored(n, n)) for n in (64, 30))
    start = checkpoint(tmp_path / "start", BertModel)
    task = ["--task", "pair-classification", "--scores", "score", *CUT]
    argv = ["finetune", *task, "--model", str(start), "--train-file", str(train), "--out"]
    assert main([*argv, str(tmp_path / "model")]) == 0
    assert BertForSequenceClassification.from_pretrained(tmp_path / "model").config.num_labels == 1
    capsys.readouterr()
    evaluate = ["evaluate", "--model", str(tmp_path / "model"), "--eval-file", str(judged), *CUT]
    assert main([*evaluate, *task]) == 0
    printed = capsys.readouterr().out
    assert "spearman" in printed and "pearson" in printed
    reranker = checkpoint(
        tmp_path / "reranker", BertForSequenceClassification, num_labels=1,
        problem_type="multi_label_classification",
    )  # fmt: skip
    prune = ["prune", *task, "--model", str(reranker), "--train-file", str(train), "--macs", "0.6"]
    steps = ["--gate-steps", "2", "--retrain-steps", "1", "--validation-file", str(judged)]
    assert main([*prune, *steps, "--out", str(tmp_path / "pruned")]) == 0
    rows = [{**row, "label": i % 2} for i, row in enumerate(scored(4, 4))]
    evaluate[evaluate.index(str(judged))] = str(write_rows(tmp_path / "classes.jsonl", rows))
    assert main([*evaluate, "--task", "pair-classification"]) == 2
    assert "gives one score: say which column" in capsys.readouterr().err.splitlines()[-1]


def test_texts_need_no_column_for_a_model_of_one_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint(tmp_path / "score", BertForSequenceClassification, num_labels=1)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["text"] for row in classified(20, 9)))
    argv = ["evaluate", "--task", "text-classification", "--model", str(model), "--teacher", str(model), *CUT]
    assert main([*argv, "--texts", str(texts)]) == 0
    assert "agreement  100.00" in capsys.readouterr().out
