"""Tasks on rows of texts, from the command line: fine-tuned, scored, pruned, reported; bad input is one line,
before any training."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

import pruned_ops
from jobs import killed, same_end
from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.runtime import optimize as packing
from pruned_trainer.cli import main, parse, settings_of
from pruned_trainer.jobs.prune import prune
from pruned_trainer.tasks.options import TEXT_COLUMNS, TaskOptions
from pruned_trainer.tasks.texts.classification import ClassificationTask
from pruned_trainer.training.batches import pad_batch
from text_files import CUT, checkpoint, classified, write_rows

PRUNE = ("--macs", "0.6", "--gate-steps", "4", "--retrain-steps", "4", "--batch-size", "8", *CUT)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned classifier beside its files, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("texts")
    write_rows(folder / "train.jsonl.gz", classified(320, 1))
    write_rows(folder / "validation.csv", classified(40, 2))
    write_rows(folder / "eval.jsonl", classified(100, 3))
    start = checkpoint(folder / "start", BertModel)
    argv = [
        "finetune", "--task", "text-classification", "--model", str(start),
        "--train-file", str(folder / "train.jsonl.gz"), "--out", str(folder / "model"), "--epochs", "4",
        "--learning-rate", "2e-3", *CUT,
    ]  # fmt: skip
    assert main(argv) == 0
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "prune", "--task", "text-classification", "--model", str(folder / "model"),
        "--train-file", str(folder / "train.jsonl.gz"), "--validation-file", str(folder / "validation.csv"),
        "--eval-file", str(folder / "eval.jsonl"), "--out", str(out), *PRUNE, *more,
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """Status 2, and a last line that says it."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("pruned-trainer ") and message in last and "Traceback" not in error, error


def test_finetune_names_the_labels_and_evaluate_scores_them(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier / "model")
    assert model.config.id2label == {0: "high", 1: "low"}
    predictions = tmp_path / "predictions.json"
    argv = ["evaluate", "--task", "text-classification", "--model", str(classifier / "model"), *CUT]
    argv += ["--eval-file", str(classifier / "eval.jsonl"), "--predictions", str(predictions)]
    assert main(argv) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    rows = [json.loads(line) for line in (classifier / "eval.jsonl").read_text().splitlines()]
    said = json.loads(predictions.read_text())
    right = [row["label"] == answer["label"] for row, answer in zip(rows, said, strict=True)]
    assert float(printed["accuracy"]) == pytest.approx(100 * sum(right) / len(right))
    assert float(printed["accuracy"]) > 85 and float(printed["mcc"]) > 60 and printed["total"] == "100"


def test_a_head_that_fits_is_kept_and_another_is_made_new(classifier: Path, tmp_path: Path) -> None:
    """More training of a classifier keeps its labels' order; other labels make a new head."""
    for name, labels, kept in (("same", ["low", "high"], True), ("others", ["a", "b", "c"], False)):
        rows = [{"text": f"w{i}", "label": labels[i % len(labels)]} for i in range(12)]
        train = write_rows(tmp_path / f"{name}.tsv", rows)
        argv = ["finetune", "--task", "text-classification", "--model", str(classifier / "model"), *CUT]
        assert main([*argv, "--train-file", str(train), "--out", str(tmp_path / name)]) == 0
        config = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).config
        assert list(config.id2label.values()) == (["high", "low"] if kept else labels)


def test_a_head_of_several_labels_at_once_learns_one_for_each_text(tmp_path: Path) -> None:
    """A classifier of such labels is a fine start, but its own loss takes a number for each label."""
    fields = {"num_labels": 3, "problem_type": "multi_label_classification"}
    folder = checkpoint(tmp_path / "model", BertForSequenceClassification, **fields)
    task = ClassificationTask(TaskOptions(task="text-classification", max_length=24))
    rows = [{"text": f"w{i}", "label": i % 3} for i in range(6)]
    examples = task.read(write_rows(tmp_path / "train.jsonl", rows), "train")
    model = task.start_model(str(folder), examples)
    batch = pad_batch(task.features(examples, load_tokenizer(str(folder)), model), 0)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, batch["labels"]))


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "missing columns": (
        [{"sentence": "w1", "tone": "high"}],
        "train.jsonl: no column 'text', 'label'; there are 'sentence', 'tone'; --texts takes texts without",
    ),
    "unknown label": (
        [{"text": "w1", "label": "high"}, {"text": "w2", "label": "middle"}],
        "train.jsonl, row 1: label 'middle' is none of the model's: 'high', 'low'",
    ),
    "unknown number": ([{"text": "w1", "label": 2}], "row 0: label 2 is none of the model's: 'high', 'low'"),
    "no label": ([{"text": "w1", "label": None}], "row 0: the label is None; a name or a whole number"),
    "empty label": ([{"text": "w1", "label": " "}], "train.jsonl, row 0: the label is empty"),
    "empty text": ([{"text": " \t", "label": "low"}], "train.jsonl, row 0: 'text' is empty"),
    "no text": ([{"text": 3, "label": "low"}], "row 0: 'text' has type int, not str"),
    "one class": (
        [{"text": "w1", "label": "low"}] * 3,
        "train.jsonl: all 3 rows have the label 'low': a model that always says so would be right",
    ),
    "no rows": ([], "train.jsonl: no rows at all"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows_are_refused_before_any_training(
    fault: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, message = BAD[fault]
    argv = arguments(classifier, tmp_path / "out")
    argv[argv.index("--train-file") + 1] = str(write_rows(tmp_path / "train.jsonl", rows))
    refused(capsys, argv, message)
    assert not list(tmp_path.glob("out*"))


def test_bad_rows_are_left_out_and_counted(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"text": "", "label": "low"}, {"text": "w1", "label": "middle"}, {"text": "w1"}]
    judged = write_rows(tmp_path / "eval.jsonl", [*classified(10, 4), *bad])
    argv = ["evaluate", "--task", "text-classification", "--model", str(classifier / "model"), *CUT]
    assert main([*argv, "--eval-file", str(judged), "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "bad lines skipped: 2; " in printed and "bad lines skipped: 1 more; " in printed
    assert "total  10" in printed


def test_whoever_forgets_the_task_is_told_of_it(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --task the files are SQuAD's, and texts alone are of no use."""
    model = ["--model", str(classifier / "model")]
    for name in ("validation.csv", "eval.jsonl"):
        argv = ["evaluate", *model, "--eval-file", str(classifier / name)]
        refused(capsys, argv, "; --task reads the rows of other tasks")
    argv = ["prune", *model, "--texts", str(tmp_path), "--macs", "0.5", "--out", str(tmp_path / "out")]
    refused(
        capsys,
        argv,
        "squad has no form without answers: --texts is for the tasks on rows of texts (--task)",
    )


def test_rows_that_are_held_out_are_named_so(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of twenty rows is held out, and one row has one class: the file itself has two."""
    train = write_rows(tmp_path / "train.csv", classified(20, 1))
    argv = arguments(classifier, tmp_path / "out")
    argv[argv.index("--train-file") + 1] = str(train)
    place = argv.index("--validation-file")
    del argv[place : place + 2]
    refused(capsys, argv, "train.csv, held out for want of a validation file: all 1 rows have the label ")


def test_where_all_rows_are_bad_the_first_fault_is_said(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of another model are no single label; nor does a row that is left out count as one."""
    others = [{"text": "w1", "label": label} for label in ("good", "bad")]
    argv = ["evaluate", "--task", "text-classification", "--model", str(classifier / "model"), *CUT]
    argv += ["--skip-bad", "--eval-file", str(write_rows(tmp_path / "eval.jsonl", others))]
    first = "eval.jsonl, row 0: label 'good' is none of the model's: 'high', 'low'"
    refused(capsys, argv, f"no rows at all (2 were skipped; the first: {tmp_path / first})")
    write_rows(tmp_path / "eval.jsonl", [*others, {"text": "w1", "label": "low"}])
    refused(capsys, argv, "eval.jsonl: all 1 rows have the label 'low'")


def test_bad_rows_are_refused_before_a_latency_table_is_measured(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring one takes minutes."""
    monkeypatch.setattr("pruned_trainer.jobs.job.measure_table", lambda *_, **__: pytest.fail("measured"))
    rows = [*classified(20, 1), {"text": "w1", "label": "middle"}]
    argv = arguments(classifier, tmp_path / "out")
    argv[argv.index("--train-file") + 1] = str(write_rows(tmp_path / "train.jsonl", rows))
    place = argv.index("--macs")
    argv[place : place + 2] = ["--speedup", "1.5"]
    refused(capsys, argv, "row 20: label 'middle' is none of the model's: 'high', 'low'")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", "w1\n", "rows are read from .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, not"),
        ("train.json", '{"data": []}', "train.json: a list of objects, one for each row, is needed"),
        (
            "train.csv", "text,label\nw1\n",
            "train.csv, row 0: 1 values, and 2 in the first line ('text', 'label'), separated by ','",
        ),
        (
            "train.csv", "text;label\nw1, w2;low\n",
            "train.csv, row 0: 2 values, and 1 in the first line ('text;label'), separated by ','",
        ),
        (
            "train.jsonl", '{"text": "w1", "label": "low", "label": "high"}\n',
            "train.jsonl: line 1 is not JSON: an object names 'label' twice",
        ),
        ("train.json", '[{"text": "w1", "text": "w2"}]', "is no JSON: an object names 'text' twice"),
        ("train.jsonl.gz", "text", "train.jsonl.gz: not .gz: "),
        ("train.parquet", "PAR1", "train.parquet: not .parquet: "),
    ],
)  # fmt: skip
def test_a_file_of_another_format(
    name: str,
    content: str,
    message: str,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(content)
    argv = arguments(classifier, tmp_path / "out")
    argv[argv.index("--train-file") + 1] = str(tmp_path / name)
    refused(capsys, argv, message)


def test_models_with_another_head(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(classifier, tmp_path / "out")
    place = argv.index("--model") + 1
    argv[place] = str(checkpoint(tmp_path / "answers", BertForQuestionAnswering))
    refused(capsys, argv, "is a BertForQuestionAnswering, and text-classification needs one whose class ends")
    argv[place] = str(checkpoint(tmp_path / "score", BertForSequenceClassification, num_labels=1))
    refused(capsys, argv, "gives one score: say which column has them with --scores")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text-columns", "a", "b"], "text_columns names 2 columns, and text-classification has 1"),
        (["--scores", "s", "--label-column", "l"], "name one of them"),
        (["--stride", "8"], "stride is for tasks in overlapping windows, and text-classification cuts"),
        (["--num-proc", "2"], "null_rate and num_proc are for --task natural_questions"),
        (["--texts", "t.txt"], "name one of them"),
        (["--cache-teacher", "c", "--distil-hidden", "0"], "start and end logits, which text-classification"),
        (["--task", "squad", "--label-column", "l"], "label_column is for tasks on rows of texts"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], message: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, arguments(classifier, tmp_path / "out", *more), message)


def test_the_commands_on_the_page_of_other_tasks_parse() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "other_tasks.md"
    if not page.exists():
        pytest.skip("installed without the checkout")
    text = page.read_text(encoding="utf-8")
    lines = [block.replace("\\\n", " ").strip() for block in text.split("```")[1::2]]
    parsed = [parse(shlex.split(line)[1:]) for line in lines]
    assert len(lines) >= 7 and {one.task for one in parsed} == set(TEXT_COLUMNS)
    for one in parsed:
        if one.command != "evaluate":
            settings_of(one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--distil-in", "retrain"], "texts have no labels, so that the teacher teaches in both phases"),
        (["--distil-logits", "0", "--distil-hidden", "0"], "with a weight above 0"),
        (["--recipe", "gain"], "recipe gain scores by the loss on them: fast and joint need none"),
        (["--distil-task", "0.9"], "distil_task weighs the loss on labels, and the training has none"),
        (["--task", "squad"], "squad has no form without answers"),
        (["--task", "pair-classification"], "pairs are read from .jsonl"),
    ],
)
def test_what_texts_without_labels_cannot_do(
    more: list[str], message: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("w1 w2\n\nw3\n")
    argv = arguments(classifier, tmp_path / "out", *more)
    place = argv.index("--train-file")
    argv[place : place + 2] = ["--texts", str(tmp_path / "texts.txt")]
    refused(capsys, argv, message)


def test_a_column_of_labels_is_for_files_that_have_labels(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--task", "text-classification", "--texts", "t.txt", "--label-column", "l", *CUT]
    model = str(classifier / "model")
    argv = ["prune", *texts, "--model", model, "--macs", "0.5", "--out", str(tmp_path / "out")]
    refused(capsys, argv, "label_column: for examples with labels, which this run does not have")
    evaluate = ["evaluate", *texts, "--model", model, "--teacher", model]
    refused(capsys, evaluate, "--label-column is for examples with labels")


def test_prune_says_what_was_lost(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores, intervals and words of the task on the screen, in the report, on the page, in the card; the
    pruned checkpoint scores again what the report says."""
    out = tmp_path / "out"
    assert main(arguments(classifier, out)) == 0
    screen = capsys.readouterr().out
    assert "100 texts; timing" in screen and "accuracy" in screen and "questions" not in screen
    report = json.loads((out / "report.json").read_text())
    judged = {"file": "eval.jsonl", "noun": "texts", "texts": 100, "threshold_chosen_on_these": False}
    assert judged.items() <= report["evaluated_on"].items()
    assert [line["key"] for line in report["score_lines"]] == ["accuracy", "f1", "mcc"]
    for key in ("accuracy", "f1", "mcc"):
        loss, (low, high) = report[f"{key}_loss"], report[f"{key}_loss_interval"]
        assert loss == pytest.approx(report["dense"][key] - report["pruned"][key]) and low <= loss <= high
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "100 texts of eval.jsonl" in page and "F1 (mean over classes)" in page and "MCC" in page
    card = (out / "README.md").read_text()
    accuracies = [report[name]["accuracy"] for name in ("dense", "pruned")]
    assert "| accuracy | {:.2f} | {:.2f} |".format(*accuracies) in card and "100 texts of eval.jsonl" in card
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "PrunedBertForSequenceClassification"
    assert model.config.id2label == {0: "high", 1: "low"}
    argv = ["evaluate", "--task", "text-classification", "--model", str(out), *CUT]
    assert main([*argv, "--eval-file", str(classifier / "eval.jsonl")]) == 0
    assert f"accuracy  {report['pruned']['accuracy']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["joint", "fast"])
def test_prune_without_labels(recipe: str, classifier: Path, tmp_path: Path) -> None:
    """Texts alone: the dense model agrees with itself, and the pruned one by so much. The recipe that trains
    no gates counts its passes into the minutes."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["text"] for row in classified(100, 9)) + "\n")
    argv = arguments(classifier, tmp_path / "out")
    for name in ("--train-file", "--validation-file", "--eval-file"):
        place = argv.index(name)
        del argv[place : place + 2]
    if recipe == "fast":
        place = argv.index("--gate-steps")
        argv[place : place + 2] = ["--recipe", "fast", "--max-minutes", "10"]
    assert main([*argv, "--texts", str(texts)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"] == recipe and report["plan"]["retrain_steps"] == 4
    assert report["dense"]["agreement"] == 100 and 0 <= report["pruned"]["agreement"] <= 100
    assert report["agreement_loss"] == pytest.approx(100 - report["pruned"]["agreement"])
    low, high = report["agreement_loss_interval"]
    assert low <= report["agreement_loss"] <= high and report["evaluated_on"]["texts"] == 5
    assert report["evaluated_on"]["file"] == "held-out validation texts"


def test_a_killed_run_goes_on(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same weights, bit for bit, as the run that nobody killed."""
    whole = settings_of(parse(arguments(classifier, tmp_path / "whole", "--save-steps", "2")))
    prune(whole)
    broken = replace(whole, out=tmp_path / "broken")
    killed(broken, "retrain", 3, monkeypatch)
    prune(replace(broken, resume=True))
    same_end(whole.out, broken.out)


def test_sweep_and_report(classifier: Path, tmp_path: Path) -> None:
    argv = arguments(classifier, tmp_path / "out")
    argv[0] = "sweep"
    argv.insert(argv.index("--macs") + 1, "0.8")
    assert main(argv) == 0
    summary = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [point["folder"] for point in summary["points"]] == ["macs-0.8", "macs-0.6"]
    assert all(point["accuracy_loss_interval"] for point in summary["points"])
    (tmp_path / "out" / "report.html").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "accuracy" in page and "Scores against speed" in page


def test_evaluate_says_how_far_a_checkpoint_agrees_with_its_teacher(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On texts without labels; with itself, in all of them."""
    texts, model = tmp_path / "texts.txt", str(classifier / "model")
    texts.write_text("\n".join(row["text"] for row in classified(30, 9)) + "\n")
    argv = ["evaluate", "--task", "text-classification", "--model", model, "--texts", str(texts), *CUT]
    assert main([*argv, "--teacher", model, "--predictions", str(tmp_path / "said.json")]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert printed["agreement"] == "100.00" and printed["total"] == "30"
    other = BertForSequenceClassification.from_pretrained(model)
    other.classifier.weight.data.neg_()
    other.classifier.bias.data.neg_()
    other.save_pretrained(classifier / "opposite")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (classifier / "opposite" / file).write_bytes((classifier / "model" / file).read_bytes())
    assert main([*argv, "--teacher", str(classifier / "opposite")]) == 0
    assert "agreement  0.00" in capsys.readouterr().out
    other.config.id2label = dict(enumerate(reversed(other.config.id2label.values())))
    other.save_pretrained(classifier / "opposite")
    refused(
        capsys, [*argv, "--teacher", str(classifier / "opposite")], "its labels are low, high, in another"
    )
    refused(capsys, argv, "texts without labels are judged beside a teacher: name it with --teacher")
    refused(
        capsys,
        [*argv, "--teacher", model, "--validation-file", str(classifier / "eval.jsonl")],
        "--validation-file does not go with --texts",
    )
    argv[argv.index("--texts") : argv.index("--texts") + 2] = ["--eval-file", str(classifier / "eval.jsonl")]
    refused(capsys, [*argv, "--teacher", model], "--teacher is for --texts")


def test_evaluate_scores_the_dtype_that_will_run(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = str(classifier / "model"), []

    def optimize(model: Any, dtype: str | None = None) -> Any:
        asked.append(dtype)
        return packing.optimize(model, dtype)

    monkeypatch.setattr(pruned_ops, "optimize", optimize)
    argv = ["evaluate", "--task", "text-classification", "--model", model, *CUT]
    argv += ["--eval-file", str(classifier / "eval.jsonl")]
    printed = []
    for dtype in ([], ["--dtype", "fp32"], ["--dtype", "int8"]):
        assert main([*argv, *dtype]) == 0
        printed.append(capsys.readouterr().out)
    assert asked == ["int8"] and printed[0] == printed[1]
    assert "accuracy" in printed[2]
