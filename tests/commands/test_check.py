"""`pruned-ops check` as users meet it: what agrees passes, what does not fails by name."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from head_models import pruned, stock
from inputs import READY, logits, padded_batch, pruned_model, stock_model
from matching import save_checkpoint, squad_file
from pruned_ops import QuestionAnswerer
from pruned_ops.cli import main
from pruned_ops.models.natural_questions import with_answer_types
from pruned_ops.ops.registry import BACKENDS, OPS, Backend
from pruned_ops.qa.agreement import SAMPLE, check, cut_material
from pruned_ops.qa.questions import Question, answer_scores, read_questions
from tiny_tokenizers import word_tokenizer, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random pruned model, with its tokenizer of 24 words."""
    return save_checkpoint(pruned_model(), tmp_path_factory.mktemp("check") / "model")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def row(screen: str, name: str) -> list[str]:
    """The cells of a way's line."""
    (line,) = [line for line in screen.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_sample_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, screen, error = run(capsys, folder, "--device", "cpu")
    assert (status, error) == (0, "") and "passed: " in screen and "the built-in sample" in screen
    ready = [name for name in READY if name != "triton"]
    for name in ("optimised", *ready):
        assert float(row(screen, name)[0]) < 1e-4 and row(screen, name)[2:] == ["-", "0"]
    assert "reference ran embed_layer_norm: reference" in screen
    assert f"optimised ran embed_layer_norm: {ready[-1]}" in screen
    assert "triton" not in screen


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (lambda: stock("bert", "sequence"), "0"),
        (lambda: pruned("roberta", "token"), "0"),
        (lambda: pruned("bert", "sequence").bert, "-"),
    ],
)
def test_every_head(
    make: Callable[[], Any], changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(make(), tmp_path)
    status, screen, error = run(capsys, tmp_path, "--backends", "reference", "--device", "cpu")
    assert (status, error) == (0, "") and "passed: " in screen
    for name in ("optimised", "reference"):
        assert float(row(screen, name)[0]) < 1e-4 and row(screen, name)[2:] == ["-", changed]


def test_another_label_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error in the pooled output alone is found."""
    asked = [Question("w1", words(20)), Question("w2", words(9)), Question("w5", words(30))]
    right = OPS["embed_layer_norm"].reference
    for model in (stock("bert", "token"), stock("bert", "sequence").bert):
        material = cut_material(word_tokenizer(90), model.config, "words", asked)
        with monkeypatch.context() as patched:
            patched.setattr(OPS["embed_layer_norm"], "reference", lambda *a: right(*a).flip(-1))
            found = check(model, material, ["reference"])
        assert "reference" in found.faulty
        assert found.findings[-1].changed == (3 if hasattr(model, "classifier") else None)


def test_f1_is_the_answerers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = squad_file(tmp_path / "squad.json", 30, 1, unanswerable=0.3)
    status, screen, _ = run(capsys, folder, "--questions", path, "--backends", "reference", "--device", "cpu")
    assert status == 0 and f"all 30 questions of {path}" in screen
    answerer = QuestionAnswerer(folder, device="cpu")
    scores = [
        answer_scores(answerer.answer(one.question, one.context).answer, one.answers or ())[1]
        for one in read_questions(path)
    ]
    assert 0 < statistics.fmean(scores) < 100
    for name in ("saved", "optimised", "reference"):
        assert row(screen, name)[2] == f"{statistics.fmean(scores):.2f}"
    status, screen, _ = run(capsys, folder, "--questions", path, "--limit", 7, "--device", "cpu")
    assert status == 0 and "7 of 30 questions" in screen and "7 windows" in screen


def test_a_backend_that_errs_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OPS["embed_layer_norm"].reference
    for wrong in (1.001, float("nan")):
        monkeypatch.setattr(OPS["embed_layer_norm"], "reference", lambda *a, w=wrong: right(*a) * w)
        status, screen, _ = run(capsys, folder, "--device", "cpu")
        assert status == 1 and "passed" not in screen
        failed = ["reference"] if "cpu" in READY else ["optimised", "reference"]
        assert f"FAILED: {', '.join(failed)} err by more than" in screen


def test_a_backend_that_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "other", Backend("other", None, "has no op"))
    status, screen, _ = run(capsys, folder, "--device", "cpu")
    assert status == 0 and "other did not run: backend 'other' has no embed_layer_norm" in screen
    status, _, error = run(capsys, folder, "--backends", "other", "--device", "cpu")
    assert status == 2 and "backend 'other' has no embed_layer_norm" in error


@pytest.mark.skipif("triton" not in READY, reason="no Triton in its interpreter here")
def test_triton_where_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(12))
    status, screen, _ = run(capsys, folder, "--text-file", text, "--backends", "triton", "--device", "cpu")
    assert status == 0 and "attention: triton" in screen and f"{text}: 1 window of 15 tokens" in screen


@pytest.mark.parametrize("natural_questions", [False, True])
def test_the_model_is_as_before(natural_questions: bool) -> None:
    model, batch = stock_model(), padded_batch()
    if natural_questions:
        model = with_answer_types(model)
    before = logits(model, batch)
    report = check(
        model, cut_material(word_tokenizer(90), model.config, "sample", list(SAMPLE)), ["reference"]
    )
    assert not report.faulty and [one.name for one in report.findings] == ["saved", "optimised", "reference"]
    assert torch.equal(logits(model, batch), before)


def test_answers_that_change_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock_model()
    right = OPS["embed_layer_norm"].reference
    asked = [Question("w1", words(20)), Question("w2", words(9)), Question("w5", words(30))]
    material = cut_material(word_tokenizer(90), model.config, "words", asked)
    monkeypatch.setattr(OPS["embed_layer_norm"], "reference", lambda *a: right(*a).flip(-1))
    reference = check(model, material, ["reference"]).findings[-1]
    assert 0 < reference.changed <= 3 and reference.difference > 0.1


LINES = [
    {"question": "q", "context": "c"},
    {"question": "q", "context": "c", "answers": []},
    {"question": "q", "context": "c", "answers": ["a", "b"]},
    {"question": "q", "context": "c", "answers": [{"text": "a", "answer_start": 0}]},
    {"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}},
]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in LINES))
    assert [one.answers for one in read_questions(path)] == [None, (), ("a", "b"), ("a",), ("a",)]
    for bad in ("[1]", "{", '{"question": "q"}', '{"question": 1, "context": "c"}', '"q"',
                '{"question": "q", "context": "c", "answers": "a"}',
                '{"question": "q", "context": "c", "answers": [7]}'):  # fmt: skip
        path.write_text(json.dumps(LINES[0]) + "\n" + bad)
        with pytest.raises(ValueError, match="line 2 is no object with a question and a context"):
            read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(path)


def test_bad_questions_are_skipped_where_that_is_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both formats: those that cannot be read, and those that are too long for the model."""
    lines, squad = tmp_path / "asked.jsonl", tmp_path / "asked.json"
    good = {"question": "w1", "context": words(9), "answers": ["w2"]}
    records = [good, {"question": 1}, {**good, "question": words(300), "context": words(200)}, good]
    lines.write_text("\n".join([*map(json.dumps, records), "{"]))
    paragraphs = [{"context": one.get("context"), "qas": [{**one, "answers": []}]} for one in records]
    squad.write_text(json.dumps({"data": [{"paragraphs": [*paragraphs, {"context": "c", "qas": [3]}]}]}))
    for path, place in ((lines, "line 2 is no object"), (squad, r"data[0].paragraphs[1].qas[0]")):
        command = (folder, "--questions", path, "--backends", "reference", "--device", "cpu")
        status, _, error = run(capsys, *command)
        assert status == 2 and place in error
        status, screen, error = run(capsys, *command, "--skip-bad")
        assert status == 0 and "2 windows" in screen
        assert f"3 bad questions skipped; the first: {path}" in error and place in error
    lines.write_text(json.dumps(records[2]))
    status, _, error = run(capsys, folder, "--questions", lines, "--device", "cpu", "--skip-bad")
    assert status == 2 and "no question can be asked" in error


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, bare = tmp_path / "text.txt", tmp_path / "bare"
    text.write_bytes(b"\xff\xfe")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    pruned_model().save_pretrained(bare)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path,), "holds no config.json"),
        ((bare,), "tokenizer"),
        ((folder, "--text-file", text), "is no UTF-8 text"),
        ((folder, "--text-file", empty), "is empty"),
        ((folder, "--text-file", tmp_path / "none"), "No such file"),
        ((folder, "--questions", text), "is no SQuAD-format JSON"),
        ((folder, "--limit", 0), "--limit is 0"),
        ((folder, "--limit", 5), "--limit and --skip-bad go with --questions"),
        ((folder, "--skip-bad"), "--limit and --skip-bad go with --questions"),
        ((folder, "--backends", "fast"), "there is no backend 'fast'; there are reference, "),
        ((folder, "--device", "nowhere"), "device nowhere cannot be used here"),
    ]
    for argv, message in cases:
        status, screen, error = run(capsys, *argv)
        assert (status, screen) == (2, "") and message in error and error.count("\n") == 1
